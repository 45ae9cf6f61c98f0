"""Colour jitter of RGB images, every image by the four random words of its own:

    out = grey?( saturate( turn( x ) ) )   or   grey?( turn( saturate( x ) ) )        mirrored in half of the images

The hue turns by -0.05 to 0.05 of a circle, saturation is multiplied by 0.95 to 1.05, every tenth image becomes grey.
Computed in float32 on [0, 1] and rounded once, to nearest even. The kernel makes the same operations in the same order,
correctly rounded and none of them fused, so it gives the bits of the reference on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import jit, tl

GREY = 429_496_729  # a tenth of 2^32


def jitter(images: Tensor, words: Sequence[Tensor]) -> Tensor:
    """Images uint8 [B, H, W, 3], each changed by its words: four int64 [B] in [0, 2^32). The same shape and type."""
    first, second, third, fourth = words
    turn, saturation = ((_unit(word) - 0.5) * 0.1 for word in (first, second))
    saturate_first, mirrored, grey = third & 1 == 1, third >> 31 == 1, fourth < GREY

    colours = images.to(torch.float32) / 255
    colours = torch.where(_wide(saturate_first), _saturate(colours, saturation + 1), colours)
    colours = _turn_hue(colours, turn)
    colours = torch.where(_wide(saturate_first), colours, _saturate(colours, saturation + 1))
    colours = torch.where(_wide(mirrored), colours.flip(2), colours)
    colours = torch.where(_wide(grey), _luma(colours).expand_as(colours), colours)
    return (colours * 255).round().to(torch.uint8)


def _unit(word: Tensor) -> Tensor:
    """A word as float32 in [0, 1): its 24 upper bits, which float32 holds exactly."""
    return (word >> 8).to(torch.float32) / 2**24


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _luma(colours: Tensor) -> Tensor:
    red, green, blue = colours.unbind(-1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[..., None]


def _saturate(colours: Tensor, factor: Tensor) -> Tensor:
    """Away from grey (factor above 1) or towards it; colours float32 [B, H, W, 3] in [0, 1]."""
    return (_wide(factor) * colours + (1 - _wide(factor)) * _luma(colours)).clamp(0, 1)


def _turn_hue(colours: Tensor, turn: Tensor) -> Tensor:
    """Hue plus ``turn`` [B] (1 is a full circle), value and saturation kept; grey stays grey.

    With hue h in sixths, channel n of (5, 3, 1) is value - chroma * clamp(min(k, 4 - k), 0, 1), k = (n + h) mod 6.
    """
    red, green, blue = colours.unbind(-1)
    value, low = colours.amax(-1), colours.amin(-1)
    chroma = value - low
    safe = torch.where(chroma == 0, 1.0, chroma)
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    k = torch.remainder(torch.stack([n + sixth + 6 * turn[:, None, None] for n in (5, 3, 1)], -1), 6)
    return value[..., None] - chroma[..., None] * torch.minimum(k, 4 - k).clamp(0, 1)


@jit
def jittered(red, green, blue, w0, w1, w2, w3, GREY: tl.constexpr):  # type: ignore[no-untyped-def]
    """``jitter`` of the pixels of one image (levels, integers of any shape), without the mirror: int32 each."""
    turn = 6 * _share(w0)
    factor = _share(w1) + 1
    saturate_first = (w2 & 1) == 1
    red = tl.div_rn(red.to(tl.float32), 255.0)
    green = tl.div_rn(green.to(tl.float32), 255.0)
    blue = tl.div_rn(blue.to(tl.float32), 255.0)
    red, green, blue = _saturated(red, green, blue, factor, saturate_first)
    red, green, blue = _turned(red, green, blue, turn)
    red, green, blue = _saturated(red, green, blue, factor, saturate_first == 0)
    luma = _grey_level(red, green, blue)
    grey = w3 < GREY
    return _level(tl.where(grey, luma, red)), _level(tl.where(grey, luma, green)), _level(tl.where(grey, luma, blue))


@jit
def _share(word):  # type: ignore[no-untyped-def]
    """-0.05 to 0.05."""
    return ((word >> 8).to(tl.int32).to(tl.float32) * (1 / 16_777_216) - 0.5) * 0.1


@jit
def _grey_level(red, green, blue):  # type: ignore[no-untyped-def]
    return 0.2989 * red + 0.587 * green + 0.114 * blue


@jit
def _saturated(red, green, blue, factor, on):  # type: ignore[no-untyped-def]
    rest = (1 - factor) * _grey_level(red, green, blue)
    red = tl.where(on, _clamped(factor * red + rest), red)
    green = tl.where(on, _clamped(factor * green + rest), green)
    return red, green, tl.where(on, _clamped(factor * blue + rest), blue)


@jit
def _clamped(value):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(value, 0.0), 1.0)


@jit
def _turned(red, green, blue, turn):  # type: ignore[no-untyped-def]
    value = tl.maximum(tl.maximum(red, green), blue)
    chroma = value - tl.minimum(tl.minimum(red, green), blue)
    safe = tl.where(chroma == 0, 1.0, chroma)
    second, third = 2 + tl.div_rn(blue - red, safe), 4 + tl.div_rn(red - green, safe)
    sixth = tl.where(value == red, tl.div_rn(green - blue, safe), tl.where(value == green, second, third))
    red = value - chroma * _distance(5 + sixth + turn)
    green = value - chroma * _distance(3 + sixth + turn)
    return red, green, value - chroma * _distance(1 + sixth + turn)


@jit
def _distance(k):  # type: ignore[no-untyped-def]
    """clamp(min(k, 4 - k), 0, 1) of k modulo 6, for k between -6 and 12."""
    k = tl.where(k < 0, k + 6, tl.where(k >= 6, k - 6, k))
    return _clamped(tl.minimum(k, 4 - k))


@jit
def _level(value):  # type: ignore[no-untyped-def]
    """The level nearest to 0..1. Adding 1.5 x 2^23 rounds to nearest even, for which Triton has no operation."""
    return ((value * 255 + 12_582_912.0) - 12_582_912.0).to(tl.int32)
