"""What the machine can do at most, measured in the same run: a large matrix product and a large copy."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastlth.models import build
from fastlth.recipe import Recipe


def measure(device: str = "cpu", seconds: float = 0.4) -> dict[str, float]:
    """{"fp32": FLOP/s, "bf16": FLOP/s, "copy": bytes/s read and written}: the best of repeated calls."""
    n = 2048 if device == "cpu" else 8192
    peaks: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(n, n, device=device).to(dtype)
        out = torch.empty_like(a)
        peaks[name] = 2 * n**3 / _best(functools.partial(torch.mm, a, a, out=out), device, seconds)
    source = torch.zeros(64 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    peaks["copy"] = 2 * source.numel() / _best(lambda: target.copy_(source), device, seconds)
    return peaks


def flops_per_image(recipe: Recipe) -> float:
    """Forward and backward pass of the dense net, by torch's counter; a multiply-add is two."""
    model = build(recipe)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, *recipe.data.facts.shape)).sum().backward()
    return float(counter.get_total_flops()) / 2


def _best(call: Callable[[], object], device: str, seconds: float) -> float:
    call()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        started = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best
