"""LeNet-300-100 on MNIST: one search of twenty rounds by the graph engine, replicates together in one graph, and a
search of 32 of them."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.gpu import Ledger, quantiles
from benchmarks.gpu_searches import search
from benchmarks.gpu_subject import recipe, source, wait, with_compute
from fastlth.data.sources import Source
from fastlth.recipe import Recipe
from fastlth.search import RoundFinished, find_tickets
from fastlth.training.engines.fleet import Fleet, FleetMember

ITERATIONS = 5_000  # of 50,000 in the paper
REPLICATES = (1, 8, 32, 128)


def measure(ledger: Ledger) -> None:
    settings = {"train.iterations": 4, "evaluate.every": 4, "prune.rounds": 3} if ledger.dry else {
        "train.iterations": ITERATIONS, "evaluate.every": 100, "prune.rounds": 20}  # fmt: skip
    images, kind = source(ledger, "mnist")
    one = recipe(ledger, "lenet-300-100", "mnist", **settings)
    for count in (1, 2) if ledger.dry else REPLICATES:
        for precision in ("fp32", "bf16"):
            for kernels in ("torch",) if ledger.dry else ("torch", "triton"):
                _steps(ledger, with_compute(one, precision=precision, kernels=kernels), images, count)
    search(ledger, one, images, kind, iterations=one.train.iterations)
    _searches(ledger, one, images, kind, 2 if ledger.dry else 32)


def _recipes(one: Recipe, count: int) -> list[Recipe]:
    return [dataclasses.replace(one, seeds=dataclasses.replace(one.seeds, base=r)) for r in range(count)]


def _steps(ledger: Ledger, one: Recipe, images: Source, count: int) -> None:
    """Steps per second of all replicates together, in stretches of an evaluation interval."""
    what: dict[str, Any] = {"subject": "replicates", "replicates": count, "precision": one.compute.precision,
                            "kernels": one.compute.kernels}  # fmt: skip
    if ledger.has(**what):
        return
    if ledger.time_left() < 10:
        ledger.left_out.append(" ".join(map(str, what.values())))
        return
    try:
        fleet = Fleet(_recipes(one, count), images)
    except Exception as error:  # one way that cannot run must not take the others' rows with it
        ledger.left_out.append(f"{' '.join(map(str, what.values()))}: {type(error).__name__} {str(error)[:200]}")
        return
    every, seconds = one.evaluate.every, []
    for turn in range(ledger.rounds + 2):
        fleet.forget()
        wait(ledger.device)
        began = time.perf_counter()
        fleet.advance(0, every)
        wait(ledger.device)
        if turn > 1:  # the first ones draw and upload the epoch's orders
            seconds.append((time.perf_counter() - began) / every)
    low, middle, high = quantiles(seconds)
    ledger.row(**what, microseconds=1e6 * middle, low=1e6 * low, high=1e6 * high, n=len(seconds),
               images_per_second=count * one.train.batch_size / middle)  # fmt: skip


def _searches(ledger: Ledger, one: Recipe, images: Source, kind: str, count: int) -> None:
    """A whole search each, as the command runs them: in threads, each with its own engine into the fleet."""
    what: dict[str, Any] = {"subject": "searches", "replicates": count, "images": kind,
                            "iterations": one.train.iterations}  # fmt: skip
    if ledger.has(**what):
        return
    if ledger.time_left() < (5 if ledger.dry else 60):
        ledger.left_out.append(" ".join(map(str, what.values())))
        return
    recipes = _recipes(one, count)
    fleet, began = Fleet(recipes, images), time.perf_counter()
    out_of_time = False

    def run(r: int, member: FleetMember) -> list[float]:
        nonlocal out_of_time
        accuracies = []
        with member:
            for event in find_tickets(recipes[r], images, recipes[r].compute, engine=member):
                if isinstance(event, RoundFinished):
                    accuracies.append(event.result["test_accuracy"])
                out_of_time |= ledger.time_left() < -60
                if out_of_time:
                    break
        return accuracies

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(run, range(count), fleet.members))
    rounds = min(map(len, found))
    if out_of_time:
        ledger.left_out.append(f"searches: out of time after round {rounds - 1}")
    took = time.perf_counter() - began
    steps = rounds * one.train.iterations
    ledger.row(**({**what, "subject": "searches cut short"} if out_of_time else what), seconds=took, rounds=rounds,
               steps_per_second=count * steps / took,
               test_accuracy=[sum(f[k] for f in found) / count for k in range(rounds)])  # fmt: skip
