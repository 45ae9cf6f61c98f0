"""Random changes of training images, on the device, uint8 to uint8.

Image j of a batch draws the four words of counter (position + j, 0, epoch, 0), so what happens to an image
depends on where it is in the epoch's order and on nothing else: not on the batch size, the loader or the device.
``epoch`` and ``position`` are integers or 0-d int64 tensors; nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from fastlth_kernels.colour import jitter
from fastlth_kernels.philox import Key, philox
from torch import Tensor

Where = int | Tensor


def _draw(images: Tensor, epoch: Where, position: Where, key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words per image: int64 [B] in [0, 2^32)."""
    place = torch.arange(images.shape[0], device=images.device) + position
    words: tuple[Tensor, Tensor, Tensor, Tensor] = philox(place, 0, epoch, 0, key)
    return words


def none(images: Tensor, epoch: Where, position: Where, key: Key) -> Tensor:
    """The images as they are."""
    return images


def flip_crop(images: Tensor, epoch: Where, position: Where, key: Key, pad: int = 4) -> Tensor:
    """Shift by -pad..pad pixels each way, black where nothing was, then mirror every second image.

    images: uint8 [B, C, H, W]; the same shape comes back, with channels-last strides.
    """
    count, _, height, width = images.shape
    first, second, third, _ = _draw(images, epoch, position, key)
    down, right = ((word * (2 * pad + 1)) >> 32 for word in (first, second))
    padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, pad, pad, pad, pad))
    # A view of every window of every image, [B, 2 pad + 1, 2 pad + 1, H, W, C]; one of each image is copied.
    windows = padded.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)
    cropped = windows[torch.arange(count, device=images.device), down, right]
    return torch.where(_wide(third >> 31 == 1), cropped.flip(2), cropped).permute(0, 3, 1, 2)


def lecode(images: Tensor, epoch: Where, position: Where, key: Key) -> Tensor:
    """Colour jitter (hue +-0.05 of a turn, saturation 0.95 to 1.05, in random order), mirror, 10 % grey.

    images: uint8 [B, 3, H, W]; the same shape comes back, with channels-last strides. Computed in float32 and
    rounded once at the end, where torchvision cuts off after every step.
    """
    words = _draw(images, epoch, position, key)
    return jitter(images.permute(0, 2, 3, 1), words).permute(0, 3, 1, 2)


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _unit(word: Tensor) -> Tensor:
    """A word as float32 in [0, 1): its 24 upper bits, which float32 holds exactly."""
    return (word >> 8).to(torch.float32) / 2**24


def resized_crop(images: Tensor, epoch: Where, position: Where, key: Key) -> Tensor:
    """A random rectangle of each image, stretched to the whole, every second one mirrored: the crop of Szegedy et al.
    2015, 8 to 100 % of the area at aspect ratios 3/4 to 4/3, sides cut to the image's where torchvision draws again.

    images: uint8 [B, C, H, W]; the same shape comes back, with channels-last strides. Bilinear.
    """
    first, second, third, fourth = _draw(images, epoch, position, key)
    area, ratio = 0.08 + 0.92 * _unit(first), (0.75 * (16 / 9) ** _unit(second)).sqrt()
    width, height = ((area.sqrt() * r).clamp(max=1) for r in (ratio, 1 / ratio))
    left, top = _unit(third) * (1 - width), _unit(fourth) * (1 - height)
    side = 1 - 2 * (fourth & 1)  # -1: mirrored; the bit is none of those in ``top``
    zero = torch.zeros_like(width)
    # The image as a square from -1 to 1: where output (x, y) comes from is linear in it.
    rows = torch.stack((torch.stack((side * width, zero, 2 * left + width - 1), 1),
                        torch.stack((zero, height, 2 * top + height - 1), 1)), 1)  # fmt: skip
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    crops = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return crops.round().to(torch.uint8).contiguous(memory_format=torch.channels_last)


# Of photo-crop nothing is left to do: the loader cuts the photographs before they are here (photos.py).
AUGMENT: dict[str, Callable[[Tensor, Where, Where, Key], Tensor]] = {
    "none": none,
    "flip-crop": flip_crop,
    "lecode": lecode,
    "resized-crop": resized_crop,
    "photo-crop": none,
}
