"""Gradients of convolutions by shifted matrix products, for the layers where the library's are slower.

With x and its zero padding, stride s, and y[b, p, q, o] = sum over i, j of x[b, s p + i, s q + j] . w[o, :, i, j]:

    dw[o, c, i, j] = sum over b, p, q of dy[b, p, q, o] x[b, s p + i, s q + j, c]      one product per (i, j)
    dx[b, s p + i, s q + j] += w[:, :, i, j]^T dy[b, p, q]                             likewise

Channels last, each product is one call of the library's matrix multiplication on a slice of dy and a shifted slice of
x, taken where neither lies in the padding: on a 2x2 map 16 of 36 pairs, on a 4x4 map 100 of 144. On large maps the
library's convolution reads x fewer times and wins. ``faster`` finds out which it is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastlth.errors import RecipeError

GAIN = 1.1
"""by which shifted products must be faster than the library"""
LARGEST = 64
"""pixels of a map; above, the library won on every machine tried, so that nothing is timed there"""
PAIRS, PAIR_SECONDS = 5, 0.05
"""of one layer's both ways, timed alternately: at least so many, and for about so long"""
HOPELESS = (3.0, 1.3)
"""times the library's time at the first and at the second try: not timed again"""

Pair = tuple[int, int]


class ShiftedConv2d(nn.Conv2d):
    """An ``nn.Conv2d`` whose gradients of "weight" or "input" (those in ``shifted``) are shifted products."""

    shifted: tuple[str, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, O, P, Q], by the library."""
        if not torch.is_grad_enabled():
            return super().forward(x)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        y: Tensor = _Convolution.apply(x, self.weight, self.bias, self.stride, self.padding, self.shifted, dtype)
        return y


def can(layer: nn.Conv2d) -> bool:
    """Whether shifted products know this kind of convolution."""
    plain = layer.groups == 1 and layer.dilation == (1, 1)
    return plain and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def swap(model: nn.Module, names: Sequence[str]) -> None:
    """Make the gradients ``names`` ("conv13.weight", "conv13.input") of ``model`` by shifted products.

    Modules keep their names, parameters and hooks; "auto", not yet resolved, means none. Raises RecipeError for a
    name that is not a convolution's.
    """
    if tuple(names) == ("auto",):
        return
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and can(m)}
    allowed = [f"{layer}.{which}" for layer in layers for which in ("weight", "input")]
    for name in names:
        if name not in allowed:
            raise RecipeError(f"compute.shifted must hold gradients such as {allowed[:2]}, got {name!r}"
                              if allowed else f"compute.shifted must be empty for this net, got {name!r}")  # fmt: skip
        layer, which = name.rsplit(".", 1)
        layers[layer].__class__ = ShiftedConv2d
        cast(ShiftedConv2d, layers[layer]).shifted += (which,)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair,
        shifted: tuple[str, ...], dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        low, narrow = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(low, narrow)
        ctx.x, ctx.weight, ctx.shifted, ctx.geometry = x.dtype, weight.dtype, shifted, (stride, padding)
        return torch.conv2d(low, narrow, None if bias is None else bias.to(dtype), stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding = ctx.geometry
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        shift_x, shift_weight = needs_x and "input" in ctx.shifted, needs_weight and "weight" in ctx.shifted
        which = [needs_x and not shift_x, needs_weight and not shift_weight, False]
        dx, dw = library(x, weight, dy, stride, padding, which) if any(which) else (None, None)
        if shift_x:
            dx = input_gradient(x, weight, dy, stride, padding)
        if shift_weight:
            dw = weight_gradient(x, weight, dy, stride, padding, ctx.weight)
        # not by the library, which makes dw as well where it is asked for the bias alone
        db = dy.sum((0, 2, 3), dtype=ctx.weight) if needs_bias else None
        dx, dw = (g if g is None else g.to(kind) for g, kind in ((dx, ctx.x), (dw, ctx.weight)))
        return dx, dw, db, None, None, None, None


def library(
    x: Tensor, weight: Tensor, dy: Tensor, stride: Pair, padding: Pair, which: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The library's gradients of input and weight, None where not ``which`` ([input, weight, False])."""
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, (1, 1), False, (0, 0), 1, which
    )
    return (dx if which[0] else None), (dw if which[1] else None)


def weight_gradient(
    x: Tensor, weight: Tensor, dy: Tensor, stride: Pair, padding: Pair, dtype: torch.dtype | None = None
) -> Tensor:
    """dw [O, C, K, L], in memory like ``weight``; ``dtype`` instead of the weight's saves a pass over it."""
    gradient = torch.empty_like(weight, dtype=dtype)
    pixels, out = x.permute(0, 2, 3, 1), dy.permute(0, 2, 3, 1)
    for i, j, here, there in _taps(x, weight, dy, stride, padding):
        product = out[here].reshape(-1, out.shape[3]).t() @ pixels[there].reshape(-1, pixels.shape[3])
        gradient[:, :, i, j] = product
    return gradient


def input_gradient(x: Tensor, weight: Tensor, dy: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """dx [B, C, H, W], channels last, summed in float32 at least."""
    total = torch.promote_types(x.dtype, torch.float32)
    out = dy.permute(0, 2, 3, 1)
    gradient = x.new_zeros((x.shape[0], *x.shape[2:], x.shape[1]), dtype=total)
    for i, j, here, there in _taps(x, weight, dy, stride, padding):
        part = gradient[there]
        part += (out[here].reshape(-1, out.shape[3]) @ weight[:, :, i, j]).view(part.shape)
    return gradient.to(x.dtype).permute(0, 3, 1, 2)


Slices = tuple[slice, slice, slice]


def _taps(
    x: Tensor, weight: Tensor, dy: Tensor, stride: Pair, padding: Pair
) -> Iterator[tuple[int, int, Slices, Slices]]:
    """Each place (i, j) of the kernel, with the slices of dy and x (channels last) that meet there."""
    for i in range(weight.shape[2]):
        rows = _meeting(i - padding[0], stride[0], x.shape[2], dy.shape[2])
        for j in range(weight.shape[3]):
            columns = _meeting(j - padding[1], stride[1], x.shape[3], dy.shape[3])
            every = slice(None)
            yield i, j, (every, rows[0], columns[0]), (every, rows[1], columns[1])


def _meeting(shift: int, stride: int, inputs: int, outputs: int) -> tuple[slice, slice]:
    """The p in range(outputs) with 0 <= stride p + shift < inputs, and those numbers; both may be empty."""
    first = max(0, -(shift // stride))
    last = max(first, min(outputs, (inputs - 1 - shift) // stride + 1))
    begin = stride * first + shift
    return slice(first, last), slice(begin, begin + stride * (last - first), stride)


# ---- which layers


def faster(
    model: nn.Module, image: tuple[int, int, int], batch: int, precision: str, *, channels_last: bool,
    time_both: Callable[..., float] | None = None,
) -> tuple[str, ...]:  # fmt: skip
    """The gradients of ``model`` (on the meta device) that shifted products make faster here, for ``swap``.

    ``image`` is [C, H, W]. Each distinct layer is timed on random numbers of its real shapes, both ways alternately.
    """
    measure = time_both or _ratio
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    known: dict[tuple[Any, ...], float] = {}
    chosen = []
    for name, layer, shape, needs_input in _shapes(model, image, batch):
        if shape[2] * shape[3] > LARGEST:
            continue
        for which in ("weight", "input") if needs_input else ("weight",):
            key = (which, shape, layer.weight.shape, layer.stride, layer.padding)
            if key not in known:
                known[key] = measure(which, layer, shape, dtype, layout)
            if known[key] > GAIN:
                chosen.append(f"{name}.{which}")
    return tuple(chosen)


def _shapes(
    model: nn.Module, image: tuple[int, int, int], batch: int
) -> list[tuple[str, nn.Conv2d, tuple[int, ...], bool]]:
    """Name, layer, input shape and whether the input needs a gradient, of each convolution that ``can``."""
    found: list[tuple[str, nn.Conv2d, tuple[int, ...], bool]] = []
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and can(layer):

            def note(layer: nn.Module, inputs: tuple[Tensor], _: Tensor, name: str = name) -> None:
                assert isinstance(layer, nn.Conv2d)
                found.append((name, layer, tuple(inputs[0].shape), inputs[0].requires_grad))

            hooks.append(layer.register_forward_hook(note))
    model(torch.empty(batch, *image, device="meta"))
    for hook in hooks:
        hook.remove()
    return found


def _ratio(
    which: str, layer: nn.Conv2d, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format
) -> float:
    """The library's seconds by shifted products', the fastest fifth of each: what it does when it is left alone."""
    generator = torch.Generator().manual_seed(0)

    def numbers(size: Iterable[int]) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype).contiguous(memory_format=layout)

    x, weight = numbers(shape), numbers(layer.weight.shape)
    geometry: tuple[Any, Any] = (layer.stride, layer.padding)
    dy = torch.randn_like(torch.conv2d(x, weight, None, *geometry))
    ways: list[Callable[[], object]] = [
        lambda: library(x, weight, dy, *geometry, [which == "input", which == "weight", False]),
        lambda: (weight_gradient if which == "weight" else input_gradient)(x, weight, dy, *geometry),
    ]
    _seconds(ways[0])  # the library prepares itself
    theirs = _seconds(ways[0])
    for limit in HOPELESS:
        ours = _seconds(ways[1])
        if ours > limit * theirs:
            return theirs / ours
    times: list[list[float]] = [[], []]
    began = time.perf_counter()
    while len(times[0]) < PAIRS or time.perf_counter() - began < PAIR_SECONDS:
        for way, seconds in zip(ways, times, strict=True):
            seconds.append(_seconds(way))
    theirs, ours = (statistics.quantiles(t, n=5)[0] for t in times)
    return theirs / ours


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
