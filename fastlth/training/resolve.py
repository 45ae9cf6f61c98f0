"""What ``auto`` becomes: decided once per run, by looking at the machine and by timing a few steps.

The choice is written into the run's recipe.toml and kept for every round and resume.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastlth import specs
from fastlth.models import skeleton, weight_names
from fastlth.pruning import layer_rates
from fastlth.recipe import ComputeSection, Recipe
from fastlth.training import break_even, host, kept, lines, shifted, worth
from fastlth.training.available import device, engine, kernels, loader
from fastlth.training.engines import compact
from fastlth.training.engines.base import Engine
from fastlth.training.engines.graph import GraphEngine

MakeEngine = Callable[[Recipe], Engine]

# bf16 changes which weights rank lowest, so it must be clearly faster, not a coin toss between two runs.
BF16_GAIN = 1.25
COMPILE_GAIN = 1.05
# Threads that wait for each other collapse beside a busy process, the more the shorter a step is; so a small net
# gets one thread unless more are clearly faster.
ONE_THREAD_BONUS = 1.1
SMALL_STEP_SECONDS = 0.02
MEASURE_SECONDS = 1.0
CALL_SECONDS = 0.01
# OpenMP's threads go on spinning for about 6 ms after their work, on the cores of whoever is timed next.
REST_SECONDS = 0.01
BREAK_EVEN = 0.5
"""of the sparse engine, until it is measured"""
# Compiling takes half a minute to a minute: it is tried where it can be a few percent of the search at most.
COMPILE_WORTH_SECONDS = 1800.0
# Measuring each layer takes five to fifteen seconds, and the kernels ten more once per machine.
KEPT_WORTH_SECONDS = 300.0


@dataclass(frozen=True)
class Resolved:
    """A compute section without ``auto``, and the measurements (images/s) behind it."""

    compute: ComputeSection
    images_per_second: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As it is written under ``[resolved]`` in recipe.toml."""
        return {**dataclasses.asdict(self.compute), "images_per_second": self.images_per_second}


def resolve(recipe: Recipe, make_engine: MakeEngine) -> Resolved:
    """Replace every ``auto`` of ``recipe.compute``. ``make_engine`` builds an engine for timing.

    Raises DeviceError and, for a loader or an engine that cannot be used, RecipeError.
    """
    asked, rates = recipe.compute, dict[str, float]()
    fixed = dataclasses.replace(
        asked, device=device(asked.device), engine="dense", loader=loader(asked.loader, recipe), break_even=0.0,
        kernels=kernels(asked.kernels, device(asked.device)), compact=max(asked.compact, 0.0),
        threads=asked.threads or torch.get_num_threads(), precision=asked.precision.replace("auto", "fp32"),
        shifted=() if asked.shifted == ("auto",) else asked.shifted,
        compile=asked.compile.replace("auto", "off"),
        channels_last=asked.channels_last if asked.channels_last != "auto" else _channels_last(recipe),
    )  # fmt: skip
    kept.check(dataclasses.replace(recipe, compute=fixed))
    chosen, wanted = None, engine(recipe)
    if fixed.device == "cpu" and wanted in ("auto", "sparse"):
        chosen = _sparse(recipe, fixed, make_engine, rates)
    elif wanted != "dense":
        fixed = _graph(recipe, fixed, make_engine, rates)
    if chosen is None:
        chosen = _dense(recipe, fixed, make_engine, rates)
    if asked.compact == -1:
        chosen = dataclasses.replace(chosen, compact=_compact(recipe, chosen, make_engine))
    return Resolved(chosen, {name: round(rate, 1) for name, rate in rates.items()})


def _graph(
    recipe: Recipe, fixed: ComputeSection, make_engine: MakeEngine, rates: dict[str, float]
) -> ComputeSection:  # fmt: skip
    """``fixed`` with the graph engine, unless it was not asked for and the dense one is faster."""
    graphed = dataclasses.replace(fixed, engine="graph", channels_last=_channels_last(recipe))
    if recipe.compute.engine == "graph":
        return graphed
    measured = _measure(recipe, [fixed, graphed], make_engine)
    rates |= {_label(c): rate for c, rate in measured.items()}
    return max(measured, key=lambda c: measured[c])


def _sparse(
    recipe: Recipe, fixed: ComputeSection, make_engine: MakeEngine, rates: dict[str, float]
) -> ComputeSection | None:
    """The sparse engine with the threads that make the whole search fastest and their break-even, or None where the
    dense engine is faster in the middle of the search."""
    asked = recipe.compute
    guess = asked.break_even if asked.break_even != -1 else BREAK_EVEN
    wide = dataclasses.replace(fixed, engine="sparse", channels_last="off", break_even=guess)
    counts = [wide.threads] if asked.threads or wide.threads == 1 else [wide.threads, 1]
    candidates = [dataclasses.replace(wide, threads=t) for t in counts]
    if asked.engine == "auto":
        candidates.append(fixed)
    middle = (1 - recipe.prune.rate) ** (recipe.prune.rounds / 2)
    measured = _measure(recipe, candidates, make_engine, density=middle)
    rates |= {_label(c): rate for c, rate in measured.items()}
    if max(candidates, key=lambda c: measured[c]) is fixed:
        return None
    if len(counts) == 1 and asked.break_even != -1:
        return wide
    found = _lines(recipe, wide, counts, make_engine)
    densities = [(1 - recipe.prune.rate) ** k for k in range(recipe.prune.rounds + 1)]
    threads = min(counts, key=lambda t: sum(found[t].seconds(d) for d in densities))
    limit = asked.break_even if asked.break_even != -1 else found[threads].break_even
    return dataclasses.replace(wide, threads=threads, break_even=limit)


def _lines(
    recipe: Recipe, compute: ComputeSection, counts: list[int], make_engine: MakeEngine
) -> dict[int, lines.Line]:
    """Threads -> what a step of the sparse engine takes with so many."""
    seconds: dict[tuple[int, float], dict[float, float]] = {(t, limit): {} for t in counts for limit in (0.0, 1.0)}
    ways = {key: dataclasses.replace(compute, threads=key[0], break_even=key[1]) for key in seconds}
    for density in lines.DENSITIES:
        measured = _measure(recipe, list(ways.values()), make_engine, density=density)
        for key, way in ways.items():
            seconds[key][density] = recipe.train.batch_size / measured[way]
    return {t: lines.Line.of(seconds[t, 0.0], seconds[t, 1.0]) for t in counts}


def _dense(recipe: Recipe, fixed: ComputeSection, make_engine: MakeEngine, rates: dict[str, float]) -> ComputeSection:
    """The engine of ``fixed`` with the fastest of the threads, precisions and compilation that were left open."""
    asked, chosen = recipe.compute, fixed
    if fixed.device == "cpu" and not asked.threads and fixed.threads > 1:
        alone = dataclasses.replace(chosen, threads=1)
        if recipe.train.batch_size / _measure(recipe, [alone], make_engine, calls=1)[alone] < SMALL_STEP_SECONDS:
            measured = _measure(recipe, [chosen, alone], make_engine)
            rates |= {_label(c): rate for c, rate in measured.items()}
            if measured[alone] > measured[chosen] / ONE_THREAD_BONUS:
                chosen = alone
    if asked.precision == "auto":
        candidate = dataclasses.replace(chosen, precision="bf16")
        measured = _measure(recipe, [chosen, candidate], make_engine)
        rates |= {_label(c): rate for c, rate in measured.items()}
        if measured[candidate] > BF16_GAIN * measured[chosen]:
            chosen = candidate
    if asked.shifted == ("auto",) and asked.compile != "on" and fixed.engine == "dense":
        chosen = dataclasses.replace(chosen, shifted=_shifted(recipe, chosen))
    tries_kept = asked.engine == "auto" and not asked.kept and not kept.unsupported(recipe, chosen)
    tries_compiled = asked.compile == "auto" and not asked.kept
    if not tries_kept and not tries_compiled:
        return chosen
    seconds = _images_ahead(recipe) / (rates.get(_label(chosen)) or _measure(recipe, [chosen], make_engine)[chosen])
    if tries_kept and seconds > KEPT_WORTH_SECONDS:
        chosen = dataclasses.replace(chosen, kept=_kept(recipe, chosen))
    if tries_compiled and seconds > COMPILE_WORTH_SECONDS:
        compiled = dataclasses.replace(chosen, compile="on", shifted=fixed.shifted, kept={})
        middle = _middle(recipe) if chosen.kept else 1.0
        try:
            measured = _measure(recipe, [chosen, compiled], make_engine, density=middle)
        except torch._dynamo.exc.TorchDynamoException:
            if not recipe.model.own:
                raise
            return chosen  # not every net of others is one graph
        rates |= {_label(c): rate for c, rate in measured.items()}
        if measured[compiled] > COMPILE_GAIN * measured[chosen]:
            chosen = compiled
    return chosen


def _compact(recipe: Recipe, chosen: ComputeSection, make_engine: MakeEngine) -> float:
    """The share of multiplications at or below which a round is trained as the smaller net."""
    trial = dataclasses.replace(recipe, compute=dataclasses.replace(chosen, compact=1.0))
    if chosen.engine != "graph" or chosen.device == "cpu" or not recipe.prune.rounds or compact.unsupported(trial):
        return 0.0
    made = make_engine(trial)
    # an engine that found no memory is the dense one
    return round(worth.measured(made, trial), 3) if isinstance(made, GraphEngine) else 0.0


def _middle(recipe: Recipe) -> dict[str, float]:
    """The density of each prunable weight in the middle of the search, with layer-wise scope."""
    rates = layer_rates(weight_names(skeleton(recipe)), recipe.prune)
    return {name: float(1 - rate) ** (recipe.prune.rounds / 2) for name, rate in rates.items()}


def _kept(recipe: Recipe, compute: ComputeSection) -> dict[str, float]:
    """Layer -> the density at or below which its kept weights alone are faster; a few seconds."""
    with host.settings(compute.threads):
        return break_even.break_evens(
            skeleton(recipe), recipe.data.facts.shape, recipe.train, compute.precision,
            channels_last=compute.channels_last == "on", threads=compute.threads, shifted=compute.shifted,
        )  # fmt: skip


def _shifted(recipe: Recipe, compute: ComputeSection) -> tuple[str, ...]:
    """The gradients of convolutions that shifted products make faster; two seconds for VGG-19."""
    if compute.device != "cpu" or recipe.model.own:
        return ()
    with host.settings(compute.threads):
        return shifted.faster(
            skeleton(recipe), recipe.data.facts.shape, recipe.train.batch_size, compute.precision,
            channels_last=compute.channels_last == "on",
        )  # fmt: skip


def _label(compute: ComputeSection) -> str:
    engine = f"{compute.engine}, " if compute.engine != "dense" else ""
    plural = "s" if compute.threads > 1 else ""
    compiled = ", compiled" if compute.compile == "on" else ""
    kept = ", kept weights in the middle of the search" if compute.kept else ""
    return f"{engine}{compute.precision}, {compute.threads} thread{plural}{compiled}{kept}"


def _measure(
    recipe: Recipe,
    candidates: list[ComputeSection],
    make_engine: MakeEngine,
    *,
    calls: int = 3,
    density: float | Mapping[str, float] = 1.0,
) -> dict[ComputeSection, float]:
    """Training images/s per candidate, by alternated calls, because a neighbour on the machine slows down whoever
    is being timed at the moment. At least ``calls`` each; about ``MEASURE_SECONDS`` in all."""
    engines = {c: make_engine(dataclasses.replace(recipe, compute=c)) for c in candidates}
    steps = dict.fromkeys(candidates, 1)
    times: dict[ComputeSection, list[float]] = {c: [] for c in candidates}

    def call(compute: ComputeSection) -> float:
        engine = engines[compute]
        engine.interval()  # its record holds one interval's steps and no more
        time.sleep(REST_SECONDS)
        started = time.perf_counter()
        engine.run(0, steps[compute])
        return (time.perf_counter() - started) / steps[compute]

    for compute, candidate in engines.items():
        prune_at_random(candidate, density)
        call(compute)  # warm-up; compiles where asked for
        longest = min(recipe.evaluate.every, recipe.train.iterations)
        # Few steps say little of many: the first ones wait for threads to wake.
        while (taken := call(compute)) * steps[compute] < CALL_SECONDS and steps[compute] < longest:
            steps[compute] = min(longest, max(2 * steps[compute], int(CALL_SECONDS / taken)))
    began = time.perf_counter()
    while len(times[candidates[-1]]) < calls or (calls > 1 and time.perf_counter() - began < MEASURE_SECONDS):
        for compute in candidates:
            times[compute].append(call(compute))
    # the fastest fifth: what the candidate does when it is left alone
    fast = {c: statistics.quantiles(t, n=5)[0] if len(t) > 4 else min(t) for c, t in times.items()}
    return {c: recipe.train.batch_size / seconds for c, seconds in fast.items()}


def prune_at_random(engine: Engine, density: float | Mapping[str, float]) -> None:
    """Masks of one density everywhere, or of one per weight; what a step costs depends on nothing else."""
    if density != 1:
        generator = torch.Generator().manual_seed(0)
        weights = {n: t.clone() for n, t in engine.weights().items()}
        each = density if isinstance(density, Mapping) else dict.fromkeys(engine.prunable, density)
        masks = {n: torch.rand(weights[n].shape, generator=generator) < each[n] for n in engine.prunable}
        engine.set_masks({n: m.to(weights[n].device) for n, m in masks.items()})
        engine.rewind(weights)


def _images_ahead(recipe: Recipe) -> float:
    return float(recipe.train.iterations * recipe.train.batch_size * (recipe.prune.rounds + 1))


def _channels_last(recipe: Recipe) -> str:
    if recipe.model.own and specs.library(recipe.model.name) is None:
        return "off"  # it may call x.view(len(x), -1)
    return "on" if any(isinstance(m, nn.Conv2d) for m in skeleton(recipe).modules()) else "off"
