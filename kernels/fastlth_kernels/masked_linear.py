"""y = relu?(x (w m)^T + b) for R replicates at once; the mask m is packed bits and no masked copy of w is stored.

    x [R, B, K] activations        w [R, N, K] weights, any float dtype        bias [R, N] or None
    bits int32 [R, N, ceil(K / 32)], packed along K by ``bitmask.pack``        y [R, B, N] in x's dtype

Products are made in x's dtype and summed in fp32. What stands in w where m is false, NaN included, is never used, and
dw is +0.0 there. With ``relu`` the gradient is read off y, so nothing else is saved. ``masked_linear_adam`` goes on
from the weight gradient's registers to Adam's update (Kingma & Ba 2015), so that gradients never reach memory.

On CUDA the ops launch the kernels of ``masked_linear_kernels``; anywhere else they are the functions ``reference*``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import masked_linear_kernels as kernels
from .bitmask import unpack
from .launch import cdiv, on_gpu
from .masked_linear_kernels import aot_cases as aot_cases


def reference(x: Tensor, w: Tensor, bits: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """y [R, B, N] of x [R, B, K], w [R, N, K], bits int32 [R, N, ceil(K / 32)] and bias [R, N]."""
    y = torch.bmm(x, _masked(w, bits).to(x.dtype).mT)
    if bias is not None:
        y = y + bias.to(x.dtype)[:, None]
    return y.relu() if relu else y


def reference_input_grad(dy: Tensor, y: Tensor | None, w: Tensor, bits: Tensor) -> Tensor:
    """dx [R, B, K] of dy [R, B, N]; ``y`` is given where a ReLU followed."""
    return torch.bmm(_through_relu(dy, y), _masked(w, bits).to(dy.dtype))


def reference_weight_grad(
    dy: Tensor, y: Tensor | None, x: Tensor, w: Tensor, bits: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """dw of w's shape and type, +0.0 where pruned, and db [R, N], or [R, 0] without bias."""
    g = _through_relu(dy, y).to(w.dtype)
    db = g.sum(1) if bias else g.new_empty(len(g), 0)
    return _masked(torch.bmm(g.mT, x.to(w.dtype)), bits), db


def reference_adam(p: Tensor, g: Tensor, m: Tensor, v: Tensor, kept: Tensor, settings: Tensor, decoupled: bool) -> None:
    """One update in place; where not ``kept``, p, m and v become 0."""
    lr, decay, _, _, rest1, log1, b2, rest2, log2, eps, steps = settings.unbind()
    g = g if decoupled else g + decay * p
    start = p * (1 - lr * decay) if decoupled else p
    first, second = m + rest1 * (g - m), b2 * v + rest2 * g * g
    rate, root = lr / -torch.expm1(steps * log1), (-torch.expm1(steps * log2)).sqrt()
    p.copy_(torch.where(kept, start - rate * (first / (second.sqrt() / root + eps)), 0.0))
    m.copy_(torch.where(kept, first, 0.0))
    v.copy_(torch.where(kept, second, 0.0))


def _masked(w: Tensor, bits: Tensor) -> Tensor:
    return torch.where(unpack(bits, w.shape[-1]), w, 0.0)


def _launched(x: Tensor) -> bool:
    return on_gpu(x) and x.dtype != torch.float64  # the kernels sum in fp32


def _through_relu(dy: Tensor, y: Tensor | None) -> Tensor:
    return dy if y is None else torch.where(y <= 0, 0.0, dy)


@torch.library.custom_op("fastlth::masked_linear", mutates_args=())
def masked_linear(x: Tensor, w: Tensor, bits: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """The op of the title. Raises ValueError where shapes do not fit."""
    _check(x, w, bits, bias)
    return kernels.forward(x, w, bits, bias, relu) if _launched(x) else reference(x, w, bits, bias, relu)


@torch.library.custom_op("fastlth::masked_linear_input_grad", mutates_args=())
def masked_linear_input_grad(dy: Tensor, y: Tensor | None, w: Tensor, bits: Tensor) -> Tensor:
    """dx [R, B, K] in dy's dtype, for whoever trains without autograd; ``y`` is given where a ReLU followed."""
    return kernels.input_grad(dy, y, w, bits) if _launched(dy) else reference_input_grad(dy, y, w, bits)


@torch.library.custom_op("fastlth::masked_linear_weight_grad", mutates_args=())
def _weight_grad(dy: Tensor, y: Tensor | None, x: Tensor, w: Tensor, bits: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    run = kernels.weight_grad if _launched(dy) else reference_weight_grad
    return run(dy, y, x, w, bits, bias)


@torch.library.custom_op("fastlth::masked_linear_adam", mutates_args=("w", "m", "v", "bias", "bias_m", "bias_v"))
def masked_linear_adam(
    dy: Tensor, y: Tensor | None, x: Tensor, bits: Tensor, w: Tensor, m: Tensor, v: Tensor,
    bias: Tensor | None, bias_m: Tensor | None, bias_v: Tensor | None, settings: Tensor, decoupled: bool = False,
) -> None:  # fmt: skip
    """Adam, or AdamW with ``decoupled``, on w and bias by the gradients of (dy, x), in place.

    ``y`` is given where a ReLU followed. w, bias and the moments m, v, bias_m, bias_v are contiguous float32 tensors;
    settings is ``masked_step.step_settings``; its count of steps, which the caller raises once for all layers, holds
    this one already. The gradient of x needs the old w: ask for it before. Raises ValueError for another layout.
    """
    for tensor in (w, m, v, bias, bias_m, bias_v):
        if tensor is not None and (tensor.dtype != torch.float32 or not tensor.is_contiguous()):
            raise ValueError(f"masked_linear_adam: weights and moments are contiguous float32 tensors; one of shape "
                             f"{tuple(tensor.shape)} is {tensor.dtype} with strides {tensor.stride()}")  # fmt: skip
    if _launched(dy):
        kernels.adam_step(dy, y, x, bits, w, m, v, bias, bias_m, bias_v, settings, decoupled)
        return
    dw, db = reference_weight_grad(dy, y, x, w, bits, bias is not None)
    reference_adam(w, dw, m, v, unpack(bits, w.shape[-1]), settings, decoupled)
    if bias is not None and bias_m is not None and bias_v is not None:
        reference_adam(bias, db, bias_m, bias_v, torch.ones_like(bias, dtype=torch.bool), settings, decoupled)


@masked_linear.register_fake
def _(x: Tensor, w: Tensor, bits: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    _check(x, w, bits, bias)
    return x.new_empty(x.shape[0], x.shape[1], w.shape[1])


@masked_linear_input_grad.register_fake
def _(dy: Tensor, y: Tensor | None, w: Tensor, bits: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[0], dy.shape[1], w.shape[2])


@_weight_grad.register_fake
def _(dy: Tensor, y: Tensor | None, x: Tensor, w: Tensor, bits: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    return w.new_empty(w.shape), w.new_empty(w.shape[0], w.shape[1] if bias else 0)


@masked_linear_adam.register_fake
def _(*arguments: Any) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, bits, bias, relu = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(x, w, bits, output if relu else None)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, w, bits, y = ctx.saved_tensors
    dx = masked_linear_input_grad(dy, y, w, bits) if ctx.needs_input_grad[0] else None
    dw = db = None
    if ctx.needs_input_grad[1] or (ctx.biased and ctx.needs_input_grad[3]):
        dw, db = _weight_grad(dy, y, x, w, bits, ctx.biased)
    return dx, dw, None, db if ctx.biased else None, None


masked_linear.register_autograd(_backward, setup_context=_save)


def linear_bytes(
    role: str, replicates: int, images: int, outputs: int, inputs: int, *, image: int = 2, weight: int = 4,
    bias: bool = True, relu: bool = False,
) -> int:  # fmt: skip
    """Bytes read and written by one call, each tensor once; no masked copy of w is among them.

    role: forward, input_grad, weight_grad, or adam_step, which is a weight_grad that goes on to the update of w, bias
    and their moments, all fp32. image, weight: bytes per activation and per weight. Raises ValueError for another role.
    """
    x, y, w = images * inputs, images * outputs, outputs * inputs
    bits, biases = 4 * outputs * cdiv(inputs, 32), outputs * bias
    g = y * (1 + relu)  # the gradient through a ReLU is read off y
    moved = {
        "forward": image * (x + y) + weight * (w + biases) + bits,
        "input_grad": image * (g + x) + weight * w + bits,
        "weight_grad": image * (g + x) + weight * (w + biases) + bits,
        "adam_step": image * (g + x) + 24 * (w + biases) + bits,
    }
    if role not in moved:
        raise ValueError(f"role '{role}' is not one of {', '.join(moved)}")
    return replicates * moved[role]


def linear_operations(replicates: int, images: int, outputs: int, inputs: int) -> int:
    """Multiplications and additions of the matrix product, the same in every role; what a mask removes counts, too."""
    return 2 * replicates * images * outputs * inputs


def _check(x: Tensor, w: Tensor, bits: Tensor, bias: Tensor | None) -> None:
    (R, _, K), N = x.shape, w.shape[1]
    for name, tensor, shape in (("w", w, (R, N, K)), ("bits", bits, (R, N, cdiv(K, 32))), ("bias", bias, (R, N))):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"masked_linear: {name} has the shape {tuple(tensor.shape)}, x of {tuple(x.shape)} "
                             f"asks for {shape}")  # fmt: skip
    if max(x[:1].numel(), w[:1].numel(), x.shape[1] * N) >= 2**31:  # 32-bit offsets within a replicate
        raise ValueError(f"masked_linear: x of {tuple(x.shape)} and w of {tuple(w.shape)} make 2^31 values or more in "
                         "one replicate; use smaller batches")  # fmt: skip
