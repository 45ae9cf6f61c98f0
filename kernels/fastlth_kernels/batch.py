"""A training batch from images that live on the device, in one launch:

    out[j, c, y, x] = table[c, image[rows[j]][y', x', c]]     (y', x') = shifted, mirrored (y, x); black outside

Gather, shift by -4..4 pixels each way, mirror, normalise by looking up, cast, channels last, labels; or ``lecode``:
colour jitter (``colour.py``) and mirror, no shift. Image j draws words of Philox counter (position + j, 0, epoch, 0),
so its fate depends on its place in the epoch and nothing else, and CPU and GPU give equal bits. Per value 1 byte is
read and one number written; as a sequence of PyTorch calls about ten times that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .colour import GREY, jitter, jittered
from .launch import AotCase, cdiv, jit, on_gpu, tl
from .philox import philox
from .philox_triton import philox_words

PAD = 4
AUGMENTS = ("none", "flip-crop", "lecode")
_BLOCK = 1024
_COLOUR_BLOCK = 256
_EXACT = {"enable_fp_fusion": False}  # a * b + c is rounded twice, as PyTorch's two operations are
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def _reference(
    pixels: Tensor, labels: Tensor, rows: Tensor, table: Tensor, epoch: Tensor, position: Tensor,
    key: Sequence[int], augment: str, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    images = pixels.index_select(0, rows)
    count, height, width, channels = images.shape
    place = torch.arange(count, device=rows.device) + position
    if augment == "lecode":
        images = jitter(images, philox(place, 0, epoch, 0, (key[0], key[1])))
    if augment == "flip-crop":
        w0, w1, w2, _ = philox(place, 0, epoch, 0, (key[0], key[1]))
        down, right = ((word * (2 * PAD + 1)) >> 32 for word in (w0, w1))
        y = torch.arange(height, device=rows.device)[None, :] + down[:, None]
        x = torch.arange(width, device=rows.device)[None, :]
        x = torch.where((w2 >> 31 == 1)[:, None], width - 1 - x, x) + right[:, None]
        image = torch.arange(count, device=rows.device)[:, None, None]
        images = F.pad(images, (0, 0, PAD, PAD, PAD, PAD))[image, y[:, :, None], x[:, None, :]]
    channel = torch.arange(channels, device=rows.device)
    return table.to(dtype)[channel, images.long()].permute(0, 3, 1, 2), labels.index_select(0, rows)


@jit
def _batch_kernel(  # type: ignore[no-untyped-def]
    pixels, labels, rows, table, epoch, position, out, out_labels, key0, key1,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, PAD: tl.constexpr, AUGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0)
    row = tl.load(rows + j).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel, x, y = element % CHANNELS, (element // CHANNELS) % WIDTH, element // (CHANNELS * WIDTH)
    inside = element < HEIGHT * WIDTH * CHANNELS
    within = inside
    if AUGMENT:
        w0, w1, w2, _ = philox_words(tl.load(position) + j, 0, tl.load(epoch), key0, key1)
        ways = tl.full((1,), 2 * PAD + 1, tl.uint32)
        down, right = tl.umulhi(w0, ways).to(tl.int32) - PAD, tl.umulhi(w1, ways).to(tl.int32) - PAD
        x = tl.where((w2 >> 31) == 1, WIDTH - 1 - x, x) + right
        y = y + down
        within = inside & (x >= 0) & (x < WIDTH) & (y >= 0) & (y < HEIGHT)
    source = pixels + row * (HEIGHT * WIDTH * CHANNELS) + (y * WIDTH + x) * CHANNELS + channel
    pixel = tl.load(source, mask=within, other=0).to(tl.int32)
    value = tl.load(table + channel * 256 + pixel, mask=inside, other=0.0)
    target = out + j.to(tl.int64) * (HEIGHT * WIDTH * CHANNELS) + element
    tl.store(target, value.to(out.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(out_labels + j, tl.load(labels + row))


@jit
def _colour_kernel(  # type: ignore[no-untyped-def]
    pixels, labels, rows, table, epoch, position, out, out_labels, key0, key1,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GREY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A pixel with its three channels at a time, where ``_batch_kernel`` takes single values."""
    j = tl.program_id(0)
    row = tl.load(rows + j).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < HEIGHT * WIDTH
    w0, w1, w2, w3 = philox_words(tl.load(position) + j, 0, tl.load(epoch), key0, key1)
    x = at % WIDTH
    mirrored = tl.where((w2 >> 31) == 1, WIDTH - 1 - x, x)
    source = pixels + row * (HEIGHT * WIDTH * 3) + (at - x + mirrored) * 3
    red, green = tl.load(source, mask=inside, other=0), tl.load(source + 1, mask=inside, other=0)
    red, green, blue = jittered(red, green, tl.load(source + 2, mask=inside, other=0), w0, w1, w2, w3, GREY)
    target = out + j.to(tl.int64) * (HEIGHT * WIDTH * 3) + at * 3
    tl.store(target, tl.load(table + red, mask=inside, other=0.0).to(out.dtype.element_ty), mask=inside)
    tl.store(target + 1, tl.load(table + 256 + green, mask=inside, other=0.0).to(out.dtype.element_ty), mask=inside)
    tl.store(target + 2, tl.load(table + 512 + blue, mask=inside, other=0.0).to(out.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(out_labels + j, tl.load(labels + row))


def _launch(
    pixels: Tensor, labels: Tensor, rows: Tensor, table: Tensor, epoch: Tensor, position: Tensor,
    key: Sequence[int], augment: str, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, out_labels = _empty(pixels, labels, rows, dtype)
    height, width, channels = pixels.shape[1:]
    if augment == "lecode" and len(rows) and pixels.numel():
        _colour_kernel[(len(rows), cdiv(height * width, _COLOUR_BLOCK))](
            pixels, labels, rows, table, epoch, position, out, out_labels, *key,
            HEIGHT=height, WIDTH=width, GREY=GREY, BLOCK=_COLOUR_BLOCK, num_warps=4, **_EXACT,
        )  # fmt: skip
    elif len(rows) and pixels.numel():
        _batch_kernel[(len(rows), cdiv(height * width * channels, _BLOCK))](
            pixels, labels, rows, table, epoch, position, out, out_labels, *key,
            HEIGHT=height, WIDTH=width, CHANNELS=channels, PAD=PAD, AUGMENT=augment == "flip-crop", BLOCK=_BLOCK,
            num_warps=4,
        )  # fmt: skip
    return out, out_labels


def _empty(pixels: Tensor, labels: Tensor, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    images = pixels.new_empty((rows.shape[0], *pixels.shape[1:]), dtype=dtype)
    return images.permute(0, 3, 1, 2), labels.new_empty(rows.shape)


@torch.library.custom_op("fastlth::assemble_batch", mutates_args=())
def assemble_batch(
    pixels: Tensor, labels: Tensor, rows: Tensor, table: Tensor, epoch: Tensor, position: Tensor,
    key: Sequence[int], augment: str, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Images ``rows`` of a set, augmented and normalised, and their labels [B].

    The images are dtype [B, C, H, W] with channels-last strides. pixels: uint8 [N, H, W, C]; labels: int64 [N]; rows:
    int32 or int64 [B], each in 0..N-1 (not checked on a GPU); table: fp32 [C, 256]; epoch, position: int64, 0-d, on
    the device; key: two integers below 2^32; augment: none, flip-crop or lecode (C = 3); dtype: fp32, bf16 or fp16.
    Raises ValueError otherwise.
    """
    if pixels.dtype != torch.uint8 or pixels.dim() != 4 or not pixels.is_contiguous():
        raise ValueError(f"pixels must be contiguous uint8 [N, H, W, C], not {_seen(pixels)}")
    if table.dtype != torch.float32 or table.shape != (pixels.shape[3], 256) or not table.is_contiguous():
        raise ValueError(f"table must be contiguous fp32 [{pixels.shape[3]}, 256], not {_seen(table)}")
    if rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64) or not rows.is_contiguous():
        raise ValueError(f"rows must be contiguous int32 or int64 [B], not {_seen(rows)}")
    if labels.shape != pixels.shape[:1] or labels.dtype != torch.int64 or not labels.is_contiguous():
        raise ValueError(f"labels must be contiguous int64 [{len(pixels)}], not {_seen(labels)}")
    if augment not in AUGMENTS or dtype not in _TYPES:
        raise ValueError(f"augment {augment!r} must be one of {AUGMENTS}, dtype {dtype} fp32, bf16 or fp16")
    if augment == "lecode" and pixels.shape[3] != 3:
        raise ValueError(f"augment 'lecode' changes colours: images must have 3 channels, not {pixels.shape[3]}")
    if not on_gpu(pixels):
        return _reference(pixels, labels, rows, table, epoch, position, key, augment, dtype)
    with torch.cuda.device(pixels.device):
        return _launch(pixels, labels, rows, table, epoch, position, key, augment, dtype)


def _seen(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


@assemble_batch.register_fake
def _(
    pixels: Tensor, labels: Tensor, rows: Tensor, table: Tensor, epoch: Tensor, position: Tensor,
    key: Sequence[int], augment: str, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty(pixels, labels, rows, dtype)


def batch_bytes(images: int, shape: tuple[int, int, int], itemsize: int) -> int:
    """Bytes read and written for that many images (H, W, C): pixels, values, rows, labels; the table stays cached."""
    height, width, channels = shape
    return images * (height * width * channels * (1 + itemsize) + 8 + 16)


def aot_cases() -> list[AotCase]:
    """CIFAR-10 shifted, in fp32 and bf16, and with other colours; MNIST as it is."""
    aligned = ("pixels", "labels", "rows", "table", "out", "out_labels")

    def case(
        name: str, kernel: Any, dtype: torch.dtype, constants: Mapping[str, Any], options: Mapping[str, Any]
    ) -> AotCase:
        signature = {
            "pixels": "*u8", "labels": "*i64", "rows": "*i64", "table": "*fp32", "epoch": "*i64", "position": "*i64",
            "out": _TYPES[dtype], "out_labels": "*i64", "key0": "i64", "key1": "i64",
        }  # fmt: skip
        return AotCase(f"assemble_batch {name}", kernel, signature, constants, aligned, options=options)

    cifar = {"HEIGHT": 32, "WIDTH": 32}
    shifted = {**cifar, "CHANNELS": 3, "PAD": PAD, "AUGMENT": True, "BLOCK": _BLOCK}
    plain = {"HEIGHT": 28, "WIDTH": 28, "CHANNELS": 1, "PAD": PAD, "AUGMENT": False, "BLOCK": _BLOCK}
    return [
        case("cifar fp32", _batch_kernel, torch.float32, shifted, {}),
        case("cifar bf16", _batch_kernel, torch.bfloat16, shifted, {}),
        case("mnist fp32", _batch_kernel, torch.float32, plain, {}),
        case("colours fp32", _colour_kernel, torch.float32, {**cifar, "GREY": GREY, "BLOCK": _COLOUR_BLOCK}, _EXACT),
    ]
