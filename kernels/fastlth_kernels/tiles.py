"""What the masked matrix kernels share: packed bits spread over registers, and how much of a result a program makes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import cdiv, jit, tl


@jit
def kept_columns(words, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words [X, BLOCK / 32] -> bool [X, BLOCK]: one load per word, spread over registers."""
    wide = tl.broadcast_to(words[:, :, None], (words.shape[0], BLOCK // 32, 32))
    spread = tl.reshape(wide, (words.shape[0], BLOCK))
    return ((spread >> (tl.arange(0, BLOCK) % 32)[None, :]) & 1) != 0


@jit
def kept_rows(words, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words [BLOCK / 32, X] -> bool [BLOCK, X]."""
    wide = tl.broadcast_to(words[:, None, :], (BLOCK // 32, 32, words.shape[1]))
    spread = tl.reshape(wide, (BLOCK, words.shape[1]))
    return ((spread >> (tl.arange(0, BLOCK) % 32)[:, None]) & 1) != 0


class Tiles(NamedTuple):
    """One program makes ``rows`` x ``columns`` results, ``inner`` terms of their sums at a time."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# Registers decide: none of these spills, on sm_80 or sm_90, where a launcher takes it (`python -m benchmarks.aot`).
# Four warps would at 128 rows and columns, at 64 in fp32, and at 64 where rows are odd. A launcher whose kernel holds
# more than the others takes less at a time: see its ``_..._tiles``.
FP32 = Tiles(64, 64, 32, 8, 2)
SMALL = Tiles(64, 64, 64, 4, 3)
LARGE = Tiles(128, 128, 64, 8, 3)
ODD = SMALL._replace(warps=8)


def choose(rows: int, columns: int, copies: int, dtype: torch.dtype, *lengths: int) -> Tiles:
    """The configuration for ``copies`` results of [rows, columns] from operands of ``dtype``, whose rows in memory have
    these ``lengths``: where they are no multiples of 16, values are loaded one by one, which takes more registers.

    Large tiles read less, but only where they are filled, and there are enough of them for every multiprocessor (an
    H200 has 132) to have one."""
    if dtype == torch.float32:
        return FP32
    if any(length % 16 for length in lengths):
        return ODD
    enough = cdiv(rows, LARGE.rows) * cdiv(columns, LARGE.columns) * copies >= 128
    return LARGE if enough and min(rows, columns) > SMALL.rows else SMALL


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on the tensor's GPU: Triton takes the current one. (The interpreter has none.)"""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
