"""What a set of tasks will take: hours, by list scheduling of measured paces, and bytes.

A training's seconds are those of ``estimate.py``: its engine is made and some intervals are timed. A task's are the sum
over its trainings, divided by how many run at once. The simulated schedule is the scheduler's: in order, to the
first worker that is free.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastlth.experiments.figures.declare import Branched
from fastlth.experiments.figures.work import Training
from fastlth.models import skeleton, weight_names
from fastlth.recipe import Recipe
from fastlth.scaling.tasks import Task, Worker, chained

TASK_SECONDS = 1.0
"""what a task costs beside its training: data, engine, files, the search's ticket read"""
THETA_SHARE = 0.83
"""of float32 that a ticket's coding leaves of random weights"""
EVALUATION_BYTES, LAYER_BYTES, ROUND_BYTES, TRIAL_BYTES = 340, 600, 800, 5_000
SLOTS = {"adam": 2, "adamw": 2}


@dataclass(frozen=True)
class Bytes:
    kept: int
    """on disk in the end"""
    written: int
    """in all: a ticket is written again after every round, a state at every save"""

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.kept + other.kept, self.written + other.written)


@dataclass(frozen=True)
class Plan:
    tasks: int
    trainings: int
    done: int
    """trainings that are done"""
    work_seconds: float
    """of the others, one after the other"""
    seconds: float
    """until all are done, with ``workers``"""
    workers: int
    bytes: Bytes

    def to_json(self) -> dict[str, float]:
        return {
            "tasks": self.tasks, "trainings": self.trainings, "done": self.done, "work_seconds": self.work_seconds,
            "seconds": self.seconds, "workers": self.workers, "bytes_kept": self.bytes.kept,
            "bytes_written": self.bytes.written,
        }  # fmt: skip


def plan(
    tasks: Sequence[Task], worker: Worker, workers: int, out: Path, seconds: Callable[[Training], float]
) -> Plan:  # fmt: skip
    """``seconds`` is what one training takes alone, at a worker."""
    found: dict[str, Training] = {}
    took: dict[str, float] = {}
    for task in tasks:
        new = [t for t in task.trainings(out) if t.where not in found]
        found |= {t.where: t for t in new}
        times = [seconds(alone(t)) for t in new if not t.done]
        took[task.name] = sum(times) / beside(task, worker) + (TASK_SECONDS if times else 0.0)
    left = [t for t in found.values() if not t.done]
    written = sum((size(t, seconds(alone(t))) for t in left), Bytes(0, 0))
    return Plan(
        tasks=len(tasks), trainings=len(found), done=len(found) - len(left),
        work_seconds=sum(seconds(alone(t)) for t in left), seconds=simulate(tasks, took, workers), workers=workers,
        bytes=written,
    )  # fmt: skip


def alone(training: Training) -> Training:
    """Without others beside it."""
    return dataclasses.replace(training, beside=1)


def beside(task: Task, worker: Worker) -> int:
    """How many of the task's trainings run at once."""
    if not task.follows:
        return min(worker.replicates(task.job.recipe), task.job.replicates)
    (follow,) = task.job.follow
    if not isinstance(follow, Branched) or chained(follow):
        return 1
    return max(1, min(worker.together(task.job.recipe), len(follow.rounds)))


def simulate(tasks: Sequence[Task], seconds: Mapping[str, float], workers: int) -> float:
    """Seconds until the last task ends: each begins on the first free worker, in order, when what it needs is done."""
    known = {t.name for t in tasks}
    blocked = {t.name: set(t.after) & known for t in tasks}
    order = {t.name: i for i, t in enumerate(tasks)}
    ready = sorted(order[n] for n, waits in blocked.items() if not waits)
    running: list[tuple[float, str]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < max(1, workers):
            name = tasks[heapq.heappop(ready)].name
            heapq.heappush(running, (now + seconds[name], name))
        now, ended = heapq.heappop(running)
        for name, waits in blocked.items():
            if ended in waits:
                waits.discard(ended)
                if not waits:
                    heapq.heappush(ready, order[name])
    return now


def size(training: Training, seconds: float) -> Bytes:
    """About what a training writes that takes ``seconds``."""
    recipe = training.recipe
    model = skeleton(recipe)
    everything = sum(t.numel() for t in model.state_dict().values())
    layers = weight_names(model)
    prunable = sum(model.get_parameter(n).numel() for n in layers)
    slots = SLOTS.get(recipe.train.optimizer, 1 if recipe.train.momentum else 0)
    state = 4 * everything * (1 + slots) + 20 * recipe.evaluate.every
    states = int(seconds // recipe.store.save_every) * state
    lines = -(-training.steps // recipe.evaluate.every) * EVALUATION_BYTES + ROUND_BYTES
    if " round " not in training.where:  # a control
        mine = lines + prunable // 8 + TRIAL_BYTES
        return Bytes(mine, mine + states)
    lines += len(layers) * LAYER_BYTES
    theta = THETA_SHARE * 4 * everything if recipe.store.theta0 == "stored" else 0.0
    round = int(training.where.rpartition(" ")[2])
    ticket = int(theta + prunable * _entropy(recipe, round + 1) / 8)
    before = int(theta + prunable * _entropy(recipe, round) / 8) if round else 0
    return Bytes(lines + ticket - before, lines + ticket + states)


def _entropy(recipe: Recipe, rounds: int) -> float:
    """Bits per weight of the round in which it is removed, if ever: 1..rounds or none."""
    rate = recipe.prune.rate
    shares = [rate * (1 - rate) ** k for k in range(rounds)] + [(1 - rate) ** rounds]
    return -sum(p * math.log2(p) for p in shares if p > 0)
