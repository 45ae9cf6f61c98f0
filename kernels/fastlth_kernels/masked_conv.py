"""y = conv2d(x, w m) + b, channels-last; the mask m is packed bits and no masked copy of w is stored.

    x [B, IN, H, W] activations, channels-last in memory (NHWC)      bias [OUT] or None
    w [OUT, IN, kh, kw] weights, channels-last in memory (OHWI)        y [B, OUT, P, Q] in x's dtype, NHWC
    bits int32 [OUT, kh, kw, ceil(IN / 32)]: ``bitmask.pack`` of the mask as [OUT, kh, kw, IN]

One stride and one padding for both directions; no groups, no dilation. Products are made in x's dtype and summed in
fp32. What stands in w where m is false, NaN included, is never used, and dw is +0.0 there. dw is a sum over all pixels
of the batch, made in parts: ``deterministic`` adds them in order, else they meet in memory in any order.

On CUDA the ops launch the kernels of ``masked_conv_kernels``; anywhere else they are the functions ``reference*``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from . import masked_conv_kernels as kernels
from .bitmask import unpack
from .launch import cdiv, on_gpu
from .masked_conv_kernels import aot_cases as aot_cases
from .masked_conv_kernels import result_size


def reference(x: Tensor, w: Tensor, bits: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """y [B, O, P, Q] of images [B, C, H, W], w [O, C, KH, KW], bits int32 [O, KH, KW, ceil(C / 32)] and bias [O]."""
    own = None if bias is None else _summed(bias.to(x.dtype))
    y = F.conv2d(_summed(x), _summed(_masked(w, bits).to(x.dtype)), own, stride, padding)
    return _channels_last(y.to(x.dtype))


def reference_input_grad(
    dy: Tensor, w: Tensor, bits: Tensor, height: int, width: int, stride: int, padding: int
) -> Tensor:
    """dx [B, C, height, width] of dy [B, O, P, Q]."""
    size = (dy.shape[0], w.shape[1], height, width)
    masked = _summed(_masked(w, bits).to(dy.dtype))
    dx: Tensor = conv2d_input(size, masked, _summed(dy), stride, padding)  # type: ignore[no-untyped-call]
    return _channels_last(dx.to(dy.dtype))


def reference_weight_grad(dy: Tensor, x: Tensor, w: Tensor, bits: Tensor, stride: int, padding: int) -> Tensor:
    """dw of w's shape and type, +0.0 where pruned."""
    images, g = x.to(w.dtype), dy.to(w.dtype)
    dw = conv2d_weight(images, list(w.shape), g, stride, padding)  # type: ignore[no-untyped-call]
    return _channels_last(_masked(dw, bits))


def _summed(x: Tensor) -> Tensor:
    """bf16 as float32 on a CPU: one without bf16 units rounds a convolution's partial sums to bf16, too."""
    return x.float() if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x


def _launched(x: Tensor) -> bool:
    return on_gpu(x) and x.dtype != torch.float64  # the kernels sum in fp32


def _masked(w: Tensor, bits: Tensor) -> Tensor:
    return torch.where(unpack(bits, w.shape[1]).permute(0, 3, 1, 2), w, 0.0)


def _channels_last(tensor: Tensor) -> Tensor:
    """A copy laid out as the kernels lay out theirs, also where a dimension of size 1 leaves strides open."""
    return _empty(tensor, *tensor.shape).copy_(tensor)


def _empty(like: Tensor, first: int, channels: int, height: int, width: int) -> Tensor:
    return like.new_empty(first, height, width, channels).permute(0, 3, 1, 2)


@torch.library.custom_op("fastlth::masked_conv2d", mutates_args=())
def masked_conv2d(
    x: Tensor, w: Tensor, bits: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0,
    deterministic: bool = True,
) -> Tensor:  # fmt: skip
    """The op of the title. Raises ValueError where shapes do not fit."""
    _check(x, w, bits, bias, stride, padding)
    run = kernels.forward if _launched(x) else reference
    return run(x, w, bits, bias, stride, padding)


@torch.library.custom_op("fastlth::masked_conv2d_input_grad", mutates_args=())
def _input_grad(dy: Tensor, w: Tensor, bits: Tensor, height: int, width: int, stride: int, padding: int) -> Tensor:
    run = kernels.input_grad if _launched(dy) else reference_input_grad
    return run(dy, w, bits, height, width, stride, padding)


@torch.library.custom_op("fastlth::masked_conv2d_weight_grad", mutates_args=())
def _weight_grad(
    dy: Tensor, x: Tensor, w: Tensor, bits: Tensor, stride: int, padding: int, deterministic: bool
) -> Tensor:
    if _launched(dy):
        return kernels.weight_grad(dy, x, w, bits, stride, padding, deterministic=deterministic)
    return reference_weight_grad(dy, x, w, bits, stride, padding)


@masked_conv2d.register_fake
def _(
    x: Tensor, w: Tensor, bits: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0,
    deterministic: bool = True,
) -> Tensor:  # fmt: skip
    _check(x, w, bits, bias, stride, padding)
    rows, columns = (result_size(x.shape[d], w.shape[d], stride, padding) for d in (2, 3))
    return _empty(x, x.shape[0], w.shape[0], rows, columns)


@_input_grad.register_fake
def _(dy: Tensor, w: Tensor, bits: Tensor, height: int, width: int, stride: int, padding: int) -> Tensor:
    return _empty(dy, dy.shape[0], w.shape[1], height, width)


@_weight_grad.register_fake
def _(dy: Tensor, x: Tensor, w: Tensor, bits: Tensor, stride: int, padding: int, deterministic: bool) -> Tensor:
    return _empty(w, *w.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, bits, bias, ctx.stride, ctx.padding, ctx.deterministic = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, w, bits)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, w, bits = ctx.saved_tensors
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = _input_grad(dy, w, bits, x.shape[2], x.shape[3], ctx.stride, ctx.padding)
    if ctx.needs_input_grad[1]:
        dw = _weight_grad(dy, x, w, bits, ctx.stride, ctx.padding, ctx.deterministic)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:  # which is shorter where no bias was given
        db = dy.sum((0, 2, 3), dtype=ctx.bias_dtype)
    return dx, dw, None, db, None, None, None


masked_conv2d.register_autograd(_backward, setup_context=_save)


def conv_bytes(
    role: str, images: tuple[int, int, int, int], filters: tuple[int, int, int, int], stride: int, padding: int, *,
    image: int = 2, weight: int = 4, bias: bool = False, parts: int = 1,
) -> int:  # fmt: skip
    """Bytes read and written by one call, each tensor once; no masked copy of w is among them.

    role: forward, input_grad or weight_grad; images: (B, IN, H, W); filters: (OUT, IN, kh, kw); image, weight: bytes
    per activation and per weight; parts: of ``weight_parts``, each of which is written and read again as fp32 when
    there are several. Raises ValueError for another role.
    """
    (B, IN, H, W), (OUT, _, kh, kw) = images, filters
    x, w = B * IN * H * W, OUT * IN * kh * kw
    y = B * OUT * result_size(H, kh, stride, padding) * result_size(W, kw, stride, padding)
    bits = 4 * OUT * kh * kw * cdiv(IN, 32)
    moved = {
        "forward": image * (x + y) + weight * (w + OUT * bias) + bits,
        "input_grad": image * (y + x) + weight * w + bits,
        "weight_grad": image * (y + x) + weight * w + bits + (8 * parts * w if parts > 1 else 0),
    }
    if role not in moved:
        raise ValueError(f"role '{role}' is not one of {', '.join(moved)}")
    return moved[role]


def conv_operations(
    images: tuple[int, int, int, int], filters: tuple[int, int, int, int], stride: int, padding: int
) -> int:
    """Multiplications and additions, the same in every role; what a mask or the padding removes counts, too."""
    (B, IN, H, W), (OUT, _, kh, kw) = images, filters
    pixels = result_size(H, kh, stride, padding) * result_size(W, kw, stride, padding)
    return 2 * B * pixels * OUT * IN * kh * kw


def _check(x: Tensor, w: Tensor, bits: Tensor, bias: Tensor | None, stride: int, padding: int) -> None:
    (_, IN, H, W), (OUT, _, kh, kw) = x.shape, w.shape
    for name, tensor, shape in (
        ("w", w, (OUT, IN, kh, kw)), ("bits", bits, (OUT, kh, kw, cdiv(IN, 32))), ("bias", bias, (OUT,))
    ):  # fmt: skip
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"masked_conv2d: {name} has the shape {tuple(tensor.shape)}, x of {tuple(x.shape)} and "
                             f"w of {tuple(w.shape)} ask for {shape}")  # fmt: skip
    pixels = x.shape[0] * (H + 2 * padding) * (W + 2 * padding)
    if pixels * max(IN, OUT) >= 2**31 or pixels > 4_000_000:  # 32-bit offsets; 65,535 programs of 64 pixels
        raise ValueError(f"masked_conv2d: images of {tuple(x.shape)} and {OUT} filters make 2^31 values or more than "
                         "four million pixels; use smaller batches")  # fmt: skip
    if stride < 1 or padding < 0 or kh > H + 2 * padding or kw > W + 2 * padding:
        raise ValueError(f"masked_conv2d: a {kh}x{kw} filter with stride {stride} and padding {padding} does not fit "
                         f"images of {H}x{W}")  # fmt: skip
