"""What the Triton kernels share: the optional import, and when a kernel is launched at all.

Triton exists for CUDA on Linux. Where it is not installed, ``jit`` leaves functions as they are and nobody calls
them: every public op runs its PyTorch reference.

For an integer argument that divides by 16 Triton compiles a kernel anew, since loads may then be wider. That matters
for the lengths of rows; where a masked layer's kernel has other integers, it names them in ``do_not_specialize``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

try:
    import triton
    import triton.language
except ModuleNotFoundError:
    triton = None

tl: Any = triton and triton.language


jit: Callable[[Any], Any] = triton.jit if triton else lambda fn: fn


def jit_but(*, do_not_specialize: Sequence[str]) -> Callable[[Any], Any]:
    """``jit`` that compiles nothing anew for the values of these integers."""
    return triton.jit(do_not_specialize=do_not_specialize) if triton else lambda fn: fn


def on_gpu(tensor: Tensor) -> bool:
    """Launch the kernel, and not the reference?"""
    return triton is not None and tensor.is_cuda


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class AotCase:
    """One kernel and configuration that is compiled ahead of time and held to ``benchmarks/kernel_budget.toml``.

    Every kernel file has ``aot_cases() -> list[AotCase]``. ``signature`` gives the Triton type of each argument that
    is not a constant: "*fp32", "i32", ...; arguments in ``aligned`` are multiples of 16 (addresses or sizes), as
    Triton's launcher would find them.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False  # must use HGMMA on sm_90, HMMA on sm_80
    ieee: bool = False  # fp32 products: must hold no TF32 instruction
    options: Mapping[str, Any] = field(default_factory=dict)  # further compiler options
