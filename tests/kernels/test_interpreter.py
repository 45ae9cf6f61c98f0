"""The interpreter that judges the kernels, judged itself: bf16 as torch has it, and gone without a trace."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from fastlth_kernels.launch import jit, tl

from tests.kernels.interpreter import interpreter


@jit
def _dot_kernel(a, b, out, as_bf16, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M)[:, None], tl.arange(0, K), tl.arange(0, N)[None]
    total = tl.zeros((M, N), dtype=tl.float32)
    total += tl.dot(tl.load(a + m * K + k[None]), tl.load(b + k[:, None] * N + n), input_precision="ieee")
    tl.store(out + m * N + n, total)
    tl.store(as_bf16 + m * N + n, total.to(tl.bfloat16))


@jit
def _add_kernel(x, out, N: tl.constexpr):
    value = tl.load(x + tl.arange(0, N))
    tl.store(out + tl.arange(0, N), value + value)


@jit
def _cast_kernel(x, narrow, wide, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(narrow + i, tl.load(x + i).to(tl.bfloat16))
    tl.store(wide + i, tl.load(narrow + i).to(tl.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot_and_rounding(interpreted, dtype):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, 32, generator=generator).to(dtype)
    b = torch.randn(32, 8, generator=generator).to(dtype)
    out, rounded = torch.empty(16, 8), torch.empty(16, 8, dtype=torch.bfloat16)
    _dot_kernel[(1,)](a, b, out, rounded, 16, 32, 8)
    exact = a.double() @ b.double()
    assert float((out.double() - exact).abs().max()) < 1e-5
    assert torch.equal(rounded, out.to(torch.bfloat16))


def test_casts_are_torchs(interpreted):
    nasty = [0.0, -0.0, 1e-45, -1e-40, 1.00390625, 1.01171875, 3.3961775e38, float("inf"), float("-inf"), float("nan")]
    x = torch.cat([torch.tensor(nasty), torch.randn(1014, generator=torch.Generator().manual_seed(1))])
    narrow, wide = torch.empty(1024, dtype=torch.bfloat16), torch.empty(1024)
    _cast_kernel[(1,)](x, narrow, wide, 1024)
    expected = x.to(torch.bfloat16)
    assert torch.equal(narrow.view(torch.int16), expected.view(torch.int16))
    assert torch.equal(wide.view(torch.int32), expected.float().view(torch.int32))


def test_bf16_arithmetic_raises(interpreted):
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="widen to fp32 first"):
        _add_kernel[(1,)](x, torch.empty_like(x), 16)


def test_leaves_triton_as_it_was():
    before = {**vars(tl), **vars(tl.core), **{f"tensor.{k}": v for k, v in vars(tl.tensor).items()}}
    with interpreter():
        # tl.zeros is itself a jit function: calling one patches more than a launch alone does
        a, b, out, rounded = (torch.ones(16, 16) for _ in range(4))
        _dot_kernel[(1,)](a, b, out, rounded.bfloat16(), 16, 16, 16)
    after = {**vars(tl), **vars(tl.core), **{f"tensor.{k}": v for k, v in vars(tl.tensor).items()}}
    assert before == after
    with pytest.raises(RuntimeError):
        _add_kernel(np.ones(16), np.ones(16), 16)
