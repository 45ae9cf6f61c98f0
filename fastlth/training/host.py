"""Settings of the host process that training needs, in force only while an engine computes."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def settings(threads: int) -> Iterator[None]:
    """``threads`` CPU threads and denormals flushed to zero, as they were before afterwards.

    Softmax residuals and Adam's moments decay into denormals, and a CPU gets slower and slower: by a quarter over
    30,000 steps of LeNet, and growing. But a process that embeds us wants its own arithmetic back.
    """
    before, flushing = torch.get_num_threads(), flushes_denormals()
    if threads != before:
        torch.set_num_threads(threads)
    if not flushing:
        torch.set_flush_denormal(True)
    try:
        yield
    finally:
        if not flushing:
            torch.set_flush_denormal(False)
        if threads != before:
            torch.set_num_threads(before)


@contextmanager
def algorithms(device: torch.device, *, deterministic: bool) -> Iterator[None]:
    """On CUDA: convolutions by the algorithms that measure fastest, or, if ``deterministic``, everything by algorithms
    that give the same bits every time. On other devices nothing: there these are one and the same.

    torch warns of the few operations for which it knows none. Of these a net uses the gradient of max pooling, whose
    additions meet no other where windows do not overlap, and kthvalue, whose value is the same whatever its index.
    """
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    elsewhere = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling: Any = torch.utils.deterministic
    filled = filling.fill_uninitialized_memory
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    try:
        cudnn.benchmark, cudnn.deterministic = not deterministic, deterministic
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        filling.fill_uninitialized_memory = False
        with torch.cuda.device(device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have a deterministic implementation")
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
        torch.use_deterministic_algorithms(elsewhere[0], warn_only=elsewhere[1])
        filling.fill_uninitialized_memory = filled


@contextmanager
def any_order() -> Iterator[None]:
    """For writes to places of which none occurs twice: their order cannot show, and ``deterministic`` algorithms would
    sort the places first."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


def flushes_denormals() -> bool:
    """Whether this thread's arithmetic turns denormal results into zero; torch has no way to ask."""
    smallest = sys.float_info.min
    return smallest / 2 == 0.0
