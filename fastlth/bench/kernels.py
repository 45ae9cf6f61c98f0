"""What every Triton kernel moves and computes at a model's shapes, by arithmetic, beside the roofline of a named GPU.

A call cannot take less time than its bytes need at the memory's speed, nor than its operations need at the arithmetic
units' (Williams, Waterman and Patterson 2009). Nothing is measured here: ``python -m benchmarks.gpu kernels`` does.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fastlth_kernels.batch import batch_bytes
from fastlth_kernels.kth_magnitude import prune_bytes
from fastlth_kernels.masked_conv import conv_bytes, conv_operations
from fastlth_kernels.masked_conv_kernels import weight_parts
from fastlth_kernels.masked_linear import linear_bytes, linear_operations
from fastlth_kernels.masked_step import step_bytes, step_operations
from torch import nn

from fastlth.bench.subject import Row, recipe_for
from fastlth.errors import RecipeError, unknown
from fastlth.models import skeleton
from fastlth.recipe import Recipe


@dataclass(frozen=True)
class Gpu:
    """Bytes/s of its memory, and FLOP/s: fp32 outside the tensor cores, bf16 in them with dense operands."""

    memory: float
    fp32: float
    bf16: float


# NVIDIA's data sheets: H200 and H100 Tensor Core GPU (SXM), A100 80GB (SXM). Half of "with sparsity" for bf16.
GPUS = {
    "h200": Gpu(memory=4.8e12, fp32=67e12, bf16=989e12),
    "h100": Gpu(memory=3.35e12, fp32=67e12, bf16=989e12),
    "a100": Gpu(memory=2.039e12, fp32=19.5e12, bf16=312e12),
}
ITEMSIZE = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Call:
    """One launch. ``per`` says when it happens: step, round, or "or": a faster way to do two others."""

    kernel: str
    what: str
    bytes: float
    operations: float
    per: str = "step"
    tensor_cores: bool = False


@dataclass(frozen=True)
class Layer:
    """A Linear or Conv2d with what it is given for a batch."""

    module: nn.Linear | nn.Conv2d
    images: tuple[int, ...]
    first: bool
    """whether it is fed with images, which need no gradient"""


def rows(
    model: str, dataset: str, gpu: str = "h200", *, batch: int | None = None, precision: str = "bf16"
) -> Iterator[Row]:
    """A row per kernel and different shape; ``calls`` is how many such there are. Weights are fp32, activations of
    ``precision``. Raises RecipeError for an unknown GPU or precision."""
    if gpu not in GPUS:
        raise RecipeError(unknown("GPU", gpu, GPUS))
    if precision not in ITEMSIZE:
        raise RecipeError(f"--precision must be fp32 or bf16, got '{precision}'")
    recipe = recipe_for(model, dataset)
    recipe = dataclasses.replace(
        recipe, train=dataclasses.replace(recipe.train, batch_size=batch or recipe.train.batch_size)
    )
    for call, count in Counter(calls(recipe, precision)).items():
        yield _row(recipe, call, count, gpu, precision)


def calls(recipe: Recipe, precision: str) -> Iterator[Call]:
    """Of one training step in order, then of one pruning."""
    facts, train, itemsize = recipe.data.facts, recipe.train, ITEMSIZE[precision]
    channels, height, width = facts.shape
    taken = batch_bytes(train.batch_size, (height, width, channels), itemsize)
    yield Call("assemble_batch", f"{train.batch_size} images", taken, 0)
    net = skeleton(recipe)
    for layer in layers(net, train.batch_size, facts.shape):
        yield from _linear(layer, precision) if isinstance(layer.module, nn.Linear) else _conv(layer, precision)
    masked = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    every = sum(p.numel() for p in net.parameters())
    momentum = train.optimizer == "sgd" and train.momentum > 0
    moved = step_bytes(every, train.optimizer, momentum=momentum) - (every - masked) / 8  # those have no mask
    nesterov = momentum and train.nesterov
    done = step_operations(every, train.optimizer, momentum=momentum, nesterov=nesterov)
    yield Call("masked_step", f"{train.optimizer}, {every:,} values", moved, done)
    for name, given in (("", {}), (", ties", {"ties": True}), (", after a step's histogram", {"histogram": True})):
        yield Call("prune_lowest", f"{masked:,} weights{name}", prune_bytes(masked, **given), 0, "round")


def layers(net: nn.Module, batch: int, shape: tuple[int, int, int]) -> list[Layer]:
    """The Linear and Conv2d layers of a net on the meta device, in the order in which a batch meets them."""
    found: list[Layer] = []

    def meet(module: nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(module, nn.Linear | nn.Conv2d)
        found.append(Layer(module, tuple(given[0].shape), first=not found))

    hooks = [m.register_forward_pre_hook(meet) for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        net(torch.empty(batch, *shape, device="meta"))
    for hook in hooks:
        hook.remove()
    return found


def _linear(layer: Layer, precision: str) -> Iterator[Call]:
    outputs, inputs = layer.module.weight.shape
    size = (1, layer.images[0], outputs, inputs)
    done, bias = linear_operations(*size), layer.module.bias is not None
    for role in ("forward", "input_grad", "weight_grad", "adam_step"):
        if role == "input_grad" and layer.first:
            continue
        moved = linear_bytes(role, *size, image=ITEMSIZE[precision], bias=bias)
        name = "masked_linear_adam" if role == "adam_step" else f"masked_linear {role}"
        yield Call(name, f"{inputs}->{outputs}", moved, done, "or" if role == "adam_step" else "step",
                   precision == "bf16")  # fmt: skip


def _conv(layer: Layer, precision: str) -> Iterator[Call]:
    module = layer.module
    assert isinstance(module, nn.Conv2d)
    batch, inputs, height, width = layer.images
    outputs, _, rows, columns = module.weight.shape
    images, filters = (batch, inputs, height, width), (outputs, inputs, rows, columns)
    stride, padding = int(module.stride[0]), int(module.padding[0])
    done = conv_operations(images, filters, stride, padding)
    pixels = done // (2 * outputs * inputs * rows * columns)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    parts = weight_parts(outputs, inputs, rows * columns, pixels, dtype)[1]
    for role in ("forward", "input_grad", "weight_grad"):
        if role == "input_grad" and layer.first:
            continue
        moved = conv_bytes(role, images, filters, stride, padding, image=ITEMSIZE[precision],
                           bias=module.bias is not None, parts=parts)  # fmt: skip
        what = f"{inputs}->{outputs} {rows}x{columns} at {height}x{width}"
        yield Call(f"masked_conv2d {role}", what, moved, done, "step", precision == "bf16")


def _row(recipe: Recipe, call: Call, count: int, gpu: str, precision: str) -> Row:
    """``seconds_at_roofline`` is of one call, and no measurement; fields of measured rows are None."""
    limit = GPUS[gpu]
    memory = call.bytes / limit.memory
    arithmetic = call.operations / (limit.bf16 if call.tensor_cores else limit.fp32)
    return {
        "subject": "kernels", "model": recipe.model.name, "dataset": recipe.data.name, "path": call.kernel,
        "density": None, "images_per_second": None, "against": f"{gpu} roofline", "ratio": None, "ratio_low": None,
        "ratio_high": None, "measured": False, "what": call.what, "batch": recipe.train.batch_size,
        "precision": precision, "per": call.per, "calls": count, "bytes": round(call.bytes),
        "operations": round(call.operations), "seconds_at_roofline": max(memory, arithmetic),
        "bound": "memory" if memory >= arithmetic else "arithmetic",
    }  # fmt: skip
