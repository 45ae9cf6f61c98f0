"""Settings of the host process that training needs, in force only while an engine computes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

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


def flushes_denormals() -> bool:
    """Whether this thread's arithmetic turns denormal results into zero; torch has no way to ask."""
    smallest = sys.float_info.min
    return smallest / 2 == 0.0
