"""What a GPU can do to a run: be out of memory, or be gone. One line each, instead of a traceback."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastlth.errors import EnvironmentFailure

# A library that torch calls, or Triton, reports a lost device as a plain RuntimeError.
_LOST = re.compile(r"(CUDA|cuDNN|cuBLAS|CUDNN|HIP|NCCL) error|Triton Error \[CUDA\]|CUDA driver error")


def reason(error: BaseException) -> str | None:
    """What happened to the device, as a clause, or None if ``error`` is about something else."""
    first = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {first.removeprefix('CUDA out of memory. ')}"
    if "captur" in first:  # of a graph: a mistake of ours, and the device is well
        return None
    if (
        isinstance(error, torch.AcceleratorError) and "out of memory" in first
    ):  # of the driver, not of torch's allocator
        return f"out of memory: {first}"
    if isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and _LOST.search(first)):
        return f"lost: {first}"
    return None


@contextmanager
def told(device: str, advice: Callable[[], str]) -> Iterator[None]:
    """Raise EnvironmentFailure, with ``advice()``, in place of what a device out of memory or lost raises."""
    try:
        yield
    except RuntimeError as error:
        if (what := reason(error)) is None:
            raise
        smaller = "; use a smaller --batch-size or another --device" if "out of memory" in what else ""
        raise EnvironmentFailure(f"{device} is {what}{smaller}; {advice()}") from error


def smaller_evaluation(device: torch.device, asked: int, now: int) -> str:
    return f"{device} has not memory enough to evaluate {asked} images at a time: {now} are"


def no_smaller_net(device: torch.device) -> str:
    return f"{device} has not memory enough for the graphs of a smaller net: this round trains the whole one"
