"""What ``auto`` becomes: decided once per run, by looking at the machine and by timing a few steps.

The choice is written into the run's recipe.toml and kept for every round and resume.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn

import fastlth
from fastlth.data import ffcv
from fastlth.errors import DeviceError, RecipeError
from fastlth.models import skeleton
from fastlth.recipe import ComputeSection, Recipe
from fastlth.training.engines.base import Engine

# bf16 changes which weights rank lowest, so it must be clearly faster, not a coin toss between two runs.
BF16_GAIN = 1.25
COMPILE_GAIN = 1.05
# Threads that wait for each other collapse beside a busy process, the more the shorter a step is; so a small net
# gets one thread unless more are clearly faster.
ONE_THREAD_BONUS = 1.1
SMALL_STEP_SECONDS = 0.02
MEASURE_SECONDS = 1.0
# Compiling takes half a minute to a minute: it is tried where it can be a few percent of the search at most.
COMPILE_WORTH_SECONDS = 1800.0


@dataclass(frozen=True)
class Resolved:
    """A compute section without ``auto``, and the measurements (images/s) behind it."""

    compute: ComputeSection
    images_per_second: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.compute), "images_per_second": self.images_per_second}


def device(name: str) -> str:
    """The device that ``auto`` means here, or ``name`` itself. Raises DeviceError if it is not there."""
    cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    there = ["cpu", *(f"cuda:{i}" for i in range(cuda)), *(["mps"] if mps else [])]
    if name == "auto":
        return "cuda:0" if cuda else "mps" if mps else "cpu"
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in there:
        raise DeviceError(f"--device {name} is not there; this machine has {', '.join(there)}")
    return wanted


def environment(compute: ComputeSection) -> dict[str, str]:
    """What, beside the resolved recipe, the bits of a result depend on."""
    on_cuda = compute.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(compute.device) if on_cuda else platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "fastlth": fastlth.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def resolve(recipe: Recipe, make_engine: Callable[[Recipe], Engine]) -> Resolved:
    """Replace every ``auto`` of ``recipe.compute``. ``make_engine`` builds an engine for timing.

    Raises DeviceError and, for a loader that is not installed, RecipeError.
    """
    asked = recipe.compute
    fixed = dataclasses.replace(
        asked, device=device(asked.device), engine="dense", loader=loader(asked.loader),
        kernels=kernels(asked.kernels, device(asked.device)),
        threads=asked.threads or torch.get_num_threads(),
        compile="off" if asked.compile == "auto" else asked.compile,
        channels_last=asked.channels_last if asked.channels_last != "auto" else _channels_last(recipe),
    )  # fmt: skip
    precisions = ["fp32", "bf16"] if asked.precision == "auto" else [asked.precision]
    chosen = dataclasses.replace(fixed, precision=precisions[0])
    rates: dict[str, float] = {}
    if fixed.device == "cpu" and not asked.threads and fixed.threads > 1:
        alone = dataclasses.replace(chosen, threads=1)
        if recipe.train.batch_size / _measure(recipe, [alone], make_engine, steps=1)[alone] < SMALL_STEP_SECONDS:
            measured = _measure(recipe, [chosen, alone], make_engine)
            rates |= {_label(c): rate for c, rate in measured.items()}
            if measured[alone] > measured[chosen] / ONE_THREAD_BONUS:
                chosen = alone
    for other in precisions[1:]:
        candidate = dataclasses.replace(chosen, precision=other)
        measured = _measure(recipe, [chosen, candidate], make_engine)
        rates |= {_label(c): rate for c, rate in measured.items()}
        if measured[candidate] > BF16_GAIN * measured[chosen]:
            chosen = candidate
    if asked.compile == "auto":
        eager = rates.get(_label(chosen)) or _measure(recipe, [chosen], make_engine)[chosen]
        if _images_ahead(recipe) / eager > COMPILE_WORTH_SECONDS:
            compiled = dataclasses.replace(chosen, compile="on")
            measured = _measure(recipe, [chosen, compiled], make_engine)
            rates |= {_label(c): rate for c, rate in measured.items()}
            if measured[compiled] > COMPILE_GAIN * measured[chosen]:
                chosen = compiled
    return Resolved(chosen, {name: round(rate, 1) for name, rate in rates.items()})


def _label(compute: ComputeSection) -> str:
    plural = "s" if compute.threads > 1 else ""
    return f"{compute.precision}, {compute.threads} thread{plural}{', compiled' if compute.compile == 'on' else ''}"


def _measure(
    recipe: Recipe, candidates: list[ComputeSection], make_engine: Callable[[Recipe], Engine], steps: int = 3
) -> dict[ComputeSection, float]:
    """Training images/s per candidate, by alternated single steps, because a neighbour on the machine slows down
    whoever is being timed at the moment. At least ``steps`` each; about ``MEASURE_SECONDS`` in all."""
    engines = {c: make_engine(dataclasses.replace(recipe, compute=c)) for c in candidates}
    times: dict[ComputeSection, list[float]] = {c: [] for c in candidates}

    def step(compute: ComputeSection) -> float:
        engine = engines[compute]
        engine.interval()  # its record holds one interval's steps and no more
        started = time.perf_counter()
        engine.run(0, 1)
        return time.perf_counter() - started

    for compute in candidates:
        step(compute)  # warm-up; compiles where asked for
    began = time.perf_counter()
    while len(times[candidates[-1]]) < steps or (steps > 1 and time.perf_counter() - began < MEASURE_SECONDS):
        for compute in candidates:
            times[compute].append(step(compute))
    # the fastest fifth: what the candidate does when it is left alone
    fast = {c: statistics.quantiles(t, n=5)[0] if len(t) > 4 else min(t) for c, t in times.items()}
    return {c: recipe.train.batch_size / seconds for c, seconds in fast.items()}


def _images_ahead(recipe: Recipe) -> float:
    return float(recipe.train.iterations * recipe.train.batch_size * (recipe.prune.rounds + 1))


def loader(asked: str) -> str:
    """The loader that ``auto`` means here, or ``asked`` itself. Raises RecipeError if it is not installed."""
    if asked == "ffcv" and (reason := ffcv.available()):
        raise RecipeError(reason)
    return "resident" if asked == "auto" else asked


def kernels(asked: str, device: str) -> str:
    """The kernels that ``auto`` means on a device, or ``asked`` itself. Raises DeviceError if they cannot run there.

    ``auto`` is torch: no measurement yet says that the masked kernels win.
    """
    if asked == "triton" and not device.startswith("cuda"):
        raise DeviceError(f"--kernels triton needs a CUDA device, and this run is on {device}; use --kernels torch")
    if asked == "triton" and find_spec("triton") is None:
        raise DeviceError("--kernels triton needs Triton, which is not installed; install it or use --kernels torch")
    return "torch" if asked == "auto" else asked


def _channels_last(recipe: Recipe) -> str:
    return "on" if any(isinstance(m, nn.Conv2d) for m in skeleton(recipe).modules()) else "off"
