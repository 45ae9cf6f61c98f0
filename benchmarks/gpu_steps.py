"""Images/s of training steps, the ways alternated: what everyday PyTorch does, and our engines.

eager: data resident, bf16 autocast, channels-last, fused optimizer, masked gradients; compiled: the same with the net
under torch.compile. dense and graph are our engines, "graph compiled" the graph of a compiled forward and backward
pass, "graph deterministic" the graph of algorithms that give the same bits twice, "graph half" that of the smaller net
where half of the units are needed. What has to be compiled comes last, since it takes most of the time. For each model
there is a row of what smaller nets are worth: the share of the work at which a paper's round gains by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import Ledger, quantiles
from benchmarks.gpu_subject import recipe, wait, with_compute
from fastlth.bench import peak
from fastlth.bench.rivals import Eager
from fastlth.bench.subject import ROWS, masks_of_round, random_source
from fastlth.recipe import Recipe
from fastlth.training import worth
from fastlth.training.engines import compact
from fastlth.training.engines.graph import GraphEngine
from fastlth.training.engines.make import make_engine

MODELS = (("vgg19", "cifar-10"), ("conv-6", "cifar-10"), ("conv-4", "cifar-10"), ("conv-2", "cifar-10"),
          ("lenet-300-100", "mnist"))  # fmt: skip
BATCHES = {"vgg19": (128, 64, 512), "lenet-300-100": (60, 512), "conv-6": (60, 512), "conv-4": (60, 512),
           "conv-2": (60, 512)}  # fmt: skip
BLOCK_SECONDS = 0.15
COMPILE_SECONDS = 90.0  # nothing is begun to be compiled with less time left

Steps = Callable[[int], None]


def measure(ledger: Ledger) -> None:
    peaks = peak.measure(str(ledger.device), 0.05 if ledger.dry else 0.4)
    if not ledger.has(subject="peak"):
        ledger.row(subject="peak", **peaks)
    for compiled in (False, True):
        for model, dataset in MODELS[-2:] if ledger.dry else MODELS:
            for batch in (8,) if ledger.dry else BATCHES[model]:
                _compare(ledger, model, dataset, batch, peaks, compiled)
            if not compiled:
                _worth(ledger, model, dataset)


def _compare(ledger: Ledger, model: str, dataset: str, batch: int, peaks: dict[str, float], compiled: bool) -> None:
    plain = ("eager", "dense", "graph", "graph deterministic", "graph half")
    ways = ("compiled", "graph compiled") if compiled else plain
    ways = tuple(w for w in ways if not ledger.has(subject="step", model=model, batch=batch, way=w))
    if not ways:
        return
    if ledger.time_left() < (COMPILE_SECONDS if compiled else 5):
        ledger.left_out += [f"{model} batch {batch} {way}" for way in ways]
        return
    settings: dict[str, Any] = {"train.batch_size": batch, "train.iterations": ROWS * 100, "evaluate.every": ROWS,
                                "schedule.milestones": [], "schedule.warmup": 0}  # fmt: skip
    one = recipe(ledger, model, dataset, **settings)
    timers: dict[str, Steps] = {}
    torch._dynamo.reset()  # once: a reset compiles again what was compiled before it
    for way in ways:
        try:
            timers[way] = _way(one, way, ledger)
            timers[way](3)
        except Exception as error:  # one way that cannot run must not take the others' rows with it
            first = (str(error).splitlines() or [""])[0]
            ledger.left_out.append(f"{model} batch {batch} {way}: {type(error).__name__} {first}")
            timers.pop(way, None)
    times = _alternate(timers, ledger)
    flops = peak.flops_per_image(one)
    for way, seconds in times.items():
        low, middle, high = quantiles(seconds)
        rate = batch / middle
        ledger.row(subject="step", model=model, batch=batch, way=way, precision=one.compute.precision,
                   images_per_second=rate, low=batch / high, high=batch / low, microseconds=1e6 * middle,
                   share_of_peak=rate * flops / peaks[one.compute.precision], n=len(seconds))  # fmt: skip


def _worth(ledger: Ledger, model: str, dataset: str) -> None:
    short: dict[str, Any] = {"train.iterations": 2, "evaluate.every": 2} if ledger.dry else {}
    one = with_compute(recipe(ledger, model, dataset, **short), compact=1.0)
    if ledger.has(subject="smaller nets", model=model) or compact.unsupported(one):
        return
    if ledger.time_left() < 5:
        ledger.left_out.append(f"{model} smaller nets")
        return
    engine = make_engine(one, random_source(dataset, images=160 if ledger.dry else 20_000))
    assert isinstance(engine, GraphEngine)
    ledger.row(subject="smaller nets", model=model, iterations=one.train.iterations,
               work_left=worth.measured(engine, one))  # fmt: skip


def _way(one: Recipe, way: str, ledger: Ledger) -> Steps:
    source = random_source(one.data.name, images=160 if ledger.dry else 20_000)
    masks = masks_of_round(one, 5)[0]
    if way in ("eager", "compiled"):
        last = one.compute.channels_last == "on"
        rival = Eager(one, source.train, masks, precision=one.compute.precision, channels_last=last,
                      compiled=way == "compiled", device=str(ledger.device))  # fmt: skip
        return rival.steps
    changes = {"engine": way.split()[0], "compile": "on" if "compiled" in way else "off",
               "deterministic": "deterministic" in way, "compact": 1.0 if "half" in way else 0.0}  # fmt: skip
    engine = make_engine(with_compute(one, **changes), source)
    if way == "graph half":
        assert isinstance(engine, GraphEngine)
        masks = worth.half_of_the_units(engine)
    engine.set_masks({n: m.to(ledger.device) for n, m in masks.items()})
    engine.rewind({n: t.clone() for n, t in engine.weights().items()})
    at = 0

    def steps(count: int) -> None:
        nonlocal at
        if at % ROWS + count > ROWS:
            engine.interval()
            at = 0
        engine.run(at, at + count)
        at += count

    return steps


def _alternate(timers: dict[str, Steps], ledger: Ledger) -> dict[str, list[float]]:
    """Seconds per step and block, the ways in turns."""
    steps = {}
    for way, timer in timers.items():
        began = time.perf_counter()
        timer(2 if ledger.dry else 20)
        wait(ledger.device)
        each = (time.perf_counter() - began) / (2 if ledger.dry else 20)
        steps[way] = 2 if ledger.dry else max(5, min(ROWS, int(BLOCK_SECONDS / each)))
    times: dict[str, list[float]] = {way: [] for way in timers}
    for turn in range(ledger.rounds):
        for way in sorted(timers, reverse=turn % 2 == 1):
            wait(ledger.device)
            began = time.perf_counter()
            timers[way](steps[way])
            wait(ledger.device)
            times[way].append((time.perf_counter() - began) / steps[way])
    return times
