"""Jobs as tasks: what one worker does without a break, and what has to be there before it begins.

A task is a job with fewer replicates, and either no follow-up (a search) or a single one on finished searches. The
rounds of one search stay in one task, in order. What two tasks both need first (the dense net trained again, a chain)
is made by one of them, which the others wait for; whatever else two tasks want at once is guarded by the locks of the
run directories, and the later one is put off. So a task may be started as often as one likes, anywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fastlth.experiments.figures.declare import Branched, Carried, Copied, Follow
from fastlth.experiments.figures.scale import Job
from fastlth.experiments.figures.work import NEEDS_DENSE, Training, follow_trainings, trainings
from fastlth.models import skeleton
from fastlth.recipe import Recipe
from fastlth.store.run import parent_folder
from fastlth.training import available
from fastlth.training.engines import fleet

FLEET = 32
"""replicates that one task trains as one on a GPU, at most"""


@dataclass(frozen=True)
class Task:
    name: str
    """unique, readable, and the name of its log"""
    job: Job
    after: tuple[str, ...] = ()
    """tasks that must be done before it begins"""

    @property
    def follows(self) -> bool:
        """Whether it works on searches that are there, instead of searching."""
        return bool(self.job.follow)

    def trainings(self, out: Path) -> list[Training]:
        """Those it makes, each with whether it is done under ``out``."""
        if not self.follows:
            return trainings([self.job], out)
        return list(dict.fromkeys(follow_trainings(self.job, out)))


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What one task gets."""

    cores: int = 1
    gpus: float = 0.0

    def together(self, recipe: Recipe) -> int:
        """Trainings of ``recipe`` that run side by side in one worker: small nets on a CPU, one per core.

        They share one process, its data and what ``auto`` became. A GPU trains one after the other.
        """
        if self._on_gpu(recipe):
            return 1
        on_cpu = dataclasses.replace(recipe, compute=dataclasses.replace(recipe.compute, device="cpu"))
        return self.cores if available.engine(on_cpu) in ("auto", "sparse") else 1

    def replicates(self, recipe: Recipe) -> int:
        """Replicates of one search that a task takes: those that run side by side, or that a GPU trains as one. Of
        nets with convolutions one, which has work enough for a GPU."""
        if self._on_gpu(recipe) and recipe.compute.engine in ("auto", "graph") and not fleet.unsupported(recipe):
            return 1 if any(isinstance(m, nn.Conv2d) for m in skeleton(recipe).modules()) else FLEET
        return self.together(recipe)

    def _on_gpu(self, recipe: Recipe) -> bool:
        return self.gpus > 0 and recipe.compute.device != "cpu"


def tasks(jobs: Iterable[Job], worker: Worker) -> list[Task]:
    """The tasks of all jobs, each once: searches first, then what follows them."""
    made: dict[str, Task] = {}
    searches: dict[tuple[str, int], list[str]] = {}
    ordered = sorted(jobs, key=lambda job: job.recipe.prune.rounds)
    for part in (part for job in ordered for part in _searches(job, worker)):
        # A longer search in a shorter one's folder goes on where that has ended.
        before = dict.fromkeys(n for run in _runs(part) for n in searches.get(run, []) if n != _name(part))
        task = made.setdefault(_name(part), Task(_name(part), part, tuple(before)))
        for run in _runs(part):
            searches.setdefault(run, []).append(task.name)
    for one in (one for job in ordered if job.follow for one in _each_seed(job)):
        search = tuple(dict.fromkeys(searches[_runs(one)[0]]))
        for task in _followers(one, worker, search):
            made.setdefault(task.name, task)
    return list(made.values())


def _searches(job: Job, worker: Worker) -> Iterator[Job]:
    """The job without what follows, as few parts as possible with replicates that run side by side."""
    bare = dataclasses.replace(job, follow=())
    size = 1 if job.plan is not None else max(1, min(job.replicates, worker.replicates(job.recipe)))
    for first in range(0, job.replicates, size):
        yield _replicates(bare, first, min(size, job.replicates - first))


def _each_seed(job: Job) -> Iterator[Job]:
    return (_replicates(job, r, 1) for r in range(job.replicates))


def _followers(job: Job, worker: Worker, search: tuple[str, ...]) -> Iterator[Task]:
    """What follows one search. Of those that need the dense net again the first makes it, the others wait; chains,
    which share files, follow each other."""
    dense: tuple[str, ...] = ()
    chain: tuple[str, ...] = ()
    for follow in job.follow:
        for part in _parts(follow, job.recipe, worker.together(job.recipe)):
            one = dataclasses.replace(job, follow=(part,))
            waits = (*search, *(dense if needs_dense(one) else ()), *(chain if chained(part) else ()))
            task = Task(_name(one), one, tuple(dict.fromkeys(waits)))
            dense = dense or ((task.name,) if needs_dense(one) else ())
            chain = (task.name,) if chained(part) else chain
            yield task


def needs_dense(job: Job) -> bool:
    """Whether what follows begins with the search's dense net, trained again where it was not kept."""
    return any(isinstance(f, Branched) and f.control.kind in NEEDS_DENSE for f in job.follow)


def chained(follow: Follow) -> bool:
    """Whether one round of it needs the round before."""
    return isinstance(follow, Branched) and (follow.control.chains or follow.control.kind == "continued")


def _parts(follow: Follow, recipe: Recipe, together: int) -> Iterator[Follow]:
    """A follow-up in parts that do not need each other."""
    match follow:
        case Branched():
            if chained(follow) or recipe.prune.to_density is not None:  # which rounds there will be is not known yet
                yield follow
                return
            rounds = follow.rounds or tuple(range(1, recipe.prune.rounds + 1))
            for first in range(0, len(rounds), together):
                yield dataclasses.replace(follow, rounds=rounds[first : first + together])
        case Copied():
            for k in follow.at:
                yield dataclasses.replace(follow, at=(k,))
        case Carried():
            for k in follow.rounds:
                yield dataclasses.replace(follow, rounds=(k,))


def _replicates(job: Job, first: int, count: int) -> Job:
    return dataclasses.replace(job, recipe=job.recipe.replicate(first), replicates=count)


def _runs(job: Job) -> list[tuple[str, int]]:
    folder = parent_folder(Path(), job.recipe).name
    return [(folder, job.recipe.seeds.base + r) for r in range(job.replicates)]


def _name(job: Job) -> str:
    """After the run folders: of a search with its rounds, since a longer one is another task."""
    folder, first = _runs(job)[0]
    last = first + job.replicates - 1
    name = f"{folder}/r{first}" + (f"-r{last}" if last > first else "")
    if job.plan is not None:
        return f"{name} supermask {job.plan.label}"
    if not job.follow:
        target = job.recipe.prune.to_density
        return f"{name} to round {job.recipe.prune.rounds}" + (f" or density {target:g}" if target else "")
    (follow,) = job.follow
    where = f" round {_listed(follow.rounds)}" if follow.rounds else ""
    match follow:
        case Branched():
            what = " ".join(str(v).replace("True", "reinit") for v in follow.control.options().values())
            return f"{name} {what}{where} x{follow.trials}"
        case Copied():
            how = "whole copies" if follow.whole else "copies"
            return f"{name} {how} from {_listed(follow.at)}{where} seeds {follow.pairs}"
        case Carried():
            changed = "".join(f" {k}={v}" for k, v in follow.settings.items())
            return f"{name} to {follow.dataset}{' random' if follow.random_ticket else ''}{changed}{where}"


def _listed(numbers: Sequence[int]) -> str:
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))
