"""What the launchers of the masked kernels would launch, without a GPU: tensors without values (on the meta device),
and every launch written down in place of being made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from fastlth_kernels import masked_conv_kernels as conv_kernels
from fastlth_kernels import masked_linear_kernels as linear_kernels
from fastlth_kernels.bitmask import words_shape
from fastlth_kernels.launch import AotCase
from torch import Tensor, nn

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}


@dataclass(frozen=True)
class Launch:
    """A launch as Triton would specialise it; ``aligned`` are the arguments it would find to divide by 16."""

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: frozenset[str]
    warps: int
    stages: int

    def as_case(self, name: str) -> AotCase:
        images = next(self.types[n] for n in ("x", "dy", "parts") if n in self.types)
        return AotCase(name, self.kernel, self.types, self.constants, tuple(self.aligned), self.warps, self.stages,
                       tensor_cores="16" in images, ieee=images == "*fp32")  # fmt: skip


@contextlib.contextmanager
def written_down() -> Iterator[list[Launch]]:
    """Within the block, launches are appended to the list and not made."""
    found: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | named
        warps, stages = given.pop("num_warps", 4), given.pop("num_stages", 3)
        types, constants, aligned = {}, {}, set()
        for parameter in self.params:
            name, value = parameter.name, given.pop(parameter.name)
            if parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
                constants[name] = value
            elif isinstance(value, Tensor):
                types[name] = TYPES[value.dtype]
                aligned.add(name)  # PyTorch's allocator sees to it
            else:
                types[name] = "i32"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    aligned.add(name)
        assert not given, f"{given} are no arguments of {self}"
        found.append(Launch(self, types, constants, frozenset(aligned), warps, stages))

    with mock.patch.object(JITFunction, "run", run):
        yield found


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear(sizes: tuple[int, int, int, int], dtype: torch.dtype, weights: torch.dtype, *, bias: bool = True,
           relu: bool = False, decoupled: bool = False) -> list[Launch]:  # fmt: skip
    """All launches of a layer of R, B, N, K; Adam's among them where the weights are fp32."""
    R, B, N, K = sizes
    x, y, dy = _empty(R, B, K, dtype=dtype), _empty(R, B, N, dtype=dtype), _empty(R, B, N, dtype=dtype)
    w, b = _empty(R, N, K, dtype=weights), _empty(R, N, dtype=weights) if bias else None
    bits, after_relu = _empty(*words_shape(w.shape), dtype=torch.int32), y if relu else None
    with written_down() as found:
        linear_kernels.forward(x, w, bits, b, relu)
        linear_kernels.input_grad(dy, after_relu, w, bits)
        linear_kernels.weight_grad(dy, after_relu, x, w, bits, bias)
        if weights == torch.float32:
            settings = _empty(11, dtype=torch.float32)
            linear_kernels.adam_step(dy, after_relu, x, bits, w, w, w, b, b, b, settings, decoupled)
    return found


def conv(images: tuple[int, int, int, int], filters: tuple[int, int, int, int], stride: int, padding: int,
         dtype: torch.dtype, weights: torch.dtype, *, bias: bool = True,
         deterministic: bool = True) -> list[Launch]:  # fmt: skip
    """All launches of a layer for images [B, IN, H, W] and filters [OUT, IN, kh, kw]."""
    (B, IN, H, W), (OUT, _, kh, kw) = images, filters
    P, Q = (conv_kernels.result_size(n, k, stride, padding) for n, k in ((H, kh), (W, kw)))
    x, dy = _empty(B, IN, H, W, dtype=dtype), _empty(B, OUT, P, Q, dtype=dtype)
    w, b = _empty(OUT, IN, kh, kw, dtype=weights), _empty(OUT, dtype=weights) if bias else None
    bits = _empty(*words_shape((OUT, kh, kw, IN)), dtype=torch.int32)
    with written_down() as found:
        conv_kernels.forward(x, w, bits, b, stride, padding)
        conv_kernels.input_grad(dy, w, bits, H, W, stride, padding)
        conv_kernels.weight_grad(dy, x, w, bits, stride, padding, deterministic=deterministic)
    return found


def of_layer(module: nn.Linear | nn.Conv2d, images: tuple[int, ...], dtype: torch.dtype, weights: torch.dtype, *,
             replicates: int = 1, **rest: bool) -> list[Launch]:  # fmt: skip
    """All launches of a net's layer that is given ``images``."""
    bias = module.bias is not None
    if isinstance(module, nn.Linear):
        sizes = (replicates, images[0], *module.weight.shape)
        return linear(sizes, dtype, weights, bias=bias, **rest)
    B, IN, H, W = images
    return conv((B, IN, H, W), tuple(module.weight.shape), int(module.stride[0]), int(module.padding[0]),
                dtype, weights, bias=bias, **rest)  # fmt: skip
