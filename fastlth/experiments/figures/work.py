"""The trainings of a job: which there are, which are done under OUT, and making those that are not.

A training is known by the folder and round its files lie in, which follow from the recipe's digest: so figures that
need the same training share it, and it is counted once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlth import running
from fastlth.experiments.branch import branch, planned
from fastlth.experiments.connectivity import Plan as Pair
from fastlth.experiments.connectivity import connectivity, copy_name, theta_name
from fastlth.experiments.control import Control
from fastlth.experiments.figures.declare import Branched, Carried, Copied, Follow
from fastlth.experiments.figures.scale import Job
from fastlth.experiments.supermasks.plan import Plan
from fastlth.experiments.supermasks.run import place, supermask
from fastlth.experiments.transfer import target, transfer, transfer_digest
from fastlth.experiments.workbench import branch_name, plain
from fastlth.recipe import Recipe
from fastlth.results import Replicate
from fastlth.store import weights
from fastlth.store.inspect import summary
from fastlth.store.run import METRICS, TICKET, parent_folder, run_folders
from fastlth.tickets import load_ticket

Show = Callable[[Any], None]
Stop = Callable[[], int | None]
ONE_SHOT_LINES = {"one-shot, initial weights": "init", "one-shot, signed constants": "signed_constant"}
NEEDS_DENSE = ("one-shot", "finetune", "lr-rewind", "continued")


@dataclass(frozen=True)
class Training:
    """One training of a net. Two with the same ``where`` are the same."""

    where: str
    """its folder under OUT, and the round"""
    recipe: Recipe = field(compare=False)
    steps: int = field(compare=False)
    density: float = field(compare=False)
    """about; what a step costs may depend on it"""
    done: bool = field(compare=False)
    beside: int = field(default=1, compare=False)
    """how many replicates may be trained at the same time"""
    plan: Plan | None = field(default=None, compare=False)
    """of a supermask"""


@dataclass(frozen=True)
class Measured:
    """What one training, or one pair of copies, came to."""

    result: dict[str, Any]
    seed: int
    metrics: Path | None = None
    """the metrics.jsonl with its evaluations"""


@dataclass(frozen=True)
class Line:
    """What the trainings of one label in one panel came to."""

    job: Job
    label: str
    found: tuple[Measured, ...]
    follow: Follow | None = None

    @property
    def panel(self) -> str:
        return self.job.arm.panel


def trainings(jobs: Iterable[Job], out: Path) -> list[Training]:
    """All trainings of the jobs, each once."""
    return list(dict.fromkeys(t for job in jobs for t in _of_job(job, out)))


def make(job: Job, out: Path, *, data_dir: Path | None, show: Show, stopped: Stop) -> list[Line]:
    """Train what is not done yet; the job's lines. Raises as what it calls does, Stopped first of all."""
    if job.plan is not None:
        return _supermask(job, job.plan, out, data_dir, show, stopped)
    search = running.run(job.recipe, out=out, data_dir=data_dir, replicates=job.replicates, show=show, stopped=stopped)
    whole = tuple(Measured(dict(result), r.seed, r.path / METRICS) for r in search.replicates for result in r.rounds)
    lines = [Line(job, job.arm.label, whole)] if job.arm.drawn else []
    for follow in job.follow:
        found = [m for r in search.replicates for m in _follow(follow, r, data_dir, show, stopped)]
        lines.append(Line(job, follow.label, tuple(found), follow))
    return lines


def make_follow(job: Job, out: Path, *, data_dir: Path | None, show: Show, stopped: Stop) -> None:
    """Train what follows the job's searches, which are there. Raises as ``make`` does."""
    for recipe in _replicates(job):
        search = Replicate(recipe.seeds.base, run_of(out, recipe), ())
        for follow in job.follow:
            for _ in _follow(follow, search, data_dir, show, stopped):
                pass


def run_of(out: Path, recipe: Recipe) -> Path:
    """The run folder of a recipe and its seed, the newest where there are several; it need not be there."""
    parent, seed = parent_folder(out, recipe), recipe.seeds.base
    folders = run_folders(parent)
    number = max((n for s, n in folders if s == seed), default=1)
    return folders.get((seed, number), parent / f"r{seed}")


def _follow(follow: Follow, search: Replicate, data_dir: Path | None, show: Show, stopped: Stop) -> Iterator[Measured]:
    match follow:
        case Branched():
            done = branch(search.path, follow.control, rounds=follow.rounds or "all", trials=follow.trials,
                          data_dir=data_dir, show=show, stopped=stopped)  # fmt: skip
            for result in done.trials:
                place = done.folder / f"round-{result['round']}" / f"trial-{result['trial']}"
                yield Measured(dict(result), search.seed, place / METRICS)
        case Copied():
            for seeds in follow.pairs:
                for k in follow.at:
                    plan = Pair(
                        rounds=follow.rounds, at_iteration=k, seeds=seeds, points=follow.points, whole=follow.whole
                    )
                    document = connectivity(search.path, plan, data_dir=data_dir, show=show, stopped=stopped)
                    for result in document["rounds"]:
                        yield Measured({**result, "iteration": k}, search.seed)
        case Carried():
            ticket = load_ticket(search.ticket)
            for k in follow.rounds:
                document = transfer(
                    ticket, follow.dataset, round=k, random_ticket=follow.random_ticket, settings=follow.settings,
                    data_dir=data_dir, show=show, stopped=stopped,
                )  # fmt: skip
                folder = Path(document["branch"]) / f"round-{k}" / "trial-0"
                yield Measured(dict(document["rounds"][0]), search.seed, folder / METRICS)


def _supermask(job: Job, plan: Plan, out: Path, data_dir: Path | None, show: Show, stopped: Stop) -> list[Line]:
    """One line, or, one-shot, those of ``ONE_SHOT_LINES``: best over all powers, as the paper reports it."""
    documents = [
        (supermask(recipe, plan, out=out, data_dir=data_dir, show=show, stopped=stopped), recipe.seeds.base)
        for recipe in _replicates(job)
    ]
    if plan.method != "one-shot":
        found = ({k: d[k] for k in ("density", "test_accuracy", "seconds")} for d, _ in documents)
        return [Line(job, job.arm.label, tuple(Measured(f, s) for f, (_, s) in zip(found, documents, strict=True)))]
    lines = []
    for label, weights_are in ONE_SHOT_LINES.items():
        best = (
            {"density": b["density"], "test_accuracy": b["highest_test_accuracy"]}
            for b in (d["best"][weights_are] for d, _ in documents)
        )
        lines.append(Line(job, label, tuple(Measured(f, s) for f, (_, s) in zip(best, documents, strict=True))))
    trained = (
        {"density": 1.0, "test_accuracy": d["trained_test_accuracy"], "seconds": d["seconds"]} for d, _ in documents
    )
    whole = tuple(Measured(f, s) for f, (_, s) in zip(trained, documents, strict=True))
    return [*lines, Line(job, "trained", whole)]


def _replicates(job: Job) -> Iterator[Recipe]:
    return (job.recipe.replicate(r) for r in range(job.replicates))


def _of_job(job: Job, out: Path) -> Iterator[Training]:
    for recipe in _replicates(job):
        if job.plan is not None:
            yield _of_supermask(recipe, job.plan, out)
            continue
        run = run_of(out, recipe)
        ticket = run / TICKET
        finished = len(summary(ticket).rounds) if ticket.exists() else 0
        whole, first = recipe.train.iterations, recipe.prune.rewind_to
        for k in range(recipe.prune.rounds + 1):
            steps = whole - first if k else whole
            yield Training(_name(out, run, k), recipe, steps, _density(recipe, k), k < finished, job.replicates)
        yield from follow_trainings(dataclasses.replace(job, recipe=recipe, replicates=1), out)


def follow_trainings(job: Job, out: Path) -> Iterator[Training]:
    """Those that follow the job's searches; one that two need comes twice."""
    for recipe in _replicates(job):
        run = run_of(out, recipe)
        for follow in job.follow:
            match follow:
                case Branched():
                    yield from _of_branch(out, run, recipe, follow.control, follow.rounds, follow.trials)
                case Copied():
                    yield from _of_copies(out, run, recipe, follow)
                case Carried():
                    yield from _of_transfer(out, run, recipe, follow)


def _of_supermask(recipe: Recipe, plan: Plan, out: Path) -> Training:
    one_shot = plan.method == "one-shot"
    folder = place(out, recipe) / ("dense" if one_shot else plan.label)
    return _trial(out, folder, 0, 0, recipe, recipe.train.iterations, None if one_shot else plan)


def _of_branch(
    out: Path, run: Path, recipe: Recipe, control: Control, rounds: tuple[int, ...], trials: int
) -> Iterator[Training]:
    """Also those that the control needs first: the dense net again, earlier rounds of its chain."""
    which = rounds or tuple(range(1, recipe.prune.rounds + 1))
    if control.kind in NEEDS_DENSE and which:
        bare = dataclasses.replace(recipe, prune=plain(recipe.prune))
        folder = run / "branches" / branch_name("dense", bare.digest)
        again = _trial(out, folder, 0, 0, recipe, recipe.train.iterations)
        yield dataclasses.replace(again, done=True) if weights.path(run, 0).exists() else again
    if control.kind == "continued" and max(which) > 1:
        chain = Control(kind="lr-rewind")
        yield from _of_branch(out, run, recipe, chain, tuple(range(1, max(which))), 1)
    trained, name = planned(recipe, control)
    for k in range(1, max(which, default=0) + 1) if control.chains else which:
        for t in range(trials):
            yield _trial(out, run / "branches" / name, k, t, trained, _steps(trained, control, recipe))


def _steps(trained: Recipe, control: Control, search: Recipe) -> int:
    """Iterations of one training of a control."""
    if control.kind == "finetune":
        return trained.train.iterations - search.train.iterations
    if control.kind == "lr-rewind":
        return control.iterations or trained.train.iterations
    early = control.kind in ("random-prune", "one-shot", "continued", "noise") and not control.reinit
    return trained.train.iterations - (search.prune.rewind_to if early else 0)


def _of_copies(out: Path, run: Path, recipe: Recipe, follow: Copied) -> Iterator[Training]:
    folder, length = run / "connectivity", recipe.train.iterations
    for k in follow.at:
        if k not in (0, recipe.prune.rewind_to):
            yield _trial(out, folder / theta_name(k), 0, 0, recipe, k)
        for round in follow.rounds:
            for seed in dict.fromkeys(s for pair in follow.pairs for s in pair):
                name = copy_name(k, seed, whole=follow.whole)
                yield _trial(out, folder / name, round, 0, recipe, length if follow.whole else length - k)


def _of_transfer(out: Path, run: Path, recipe: Recipe, follow: Carried) -> Iterator[Training]:
    changed = target(recipe, follow.dataset, follow.settings)
    digest = transfer_digest(recipe, changed, follow.random_ticket)
    folder = run / "branches" / branch_name("transfer", digest)
    for k in follow.rounds:
        yield _trial(out, folder, k, 0, changed, changed.train.iterations)


def _trial(
    out: Path, folder: Path, round: int, number: int, recipe: Recipe, steps: int, plan: Plan | None = None
) -> Training:
    place = folder / f"round-{round}" / f"trial-{number}"
    done = (place / "result.json").exists()
    return Training(str(place.relative_to(out)), recipe, steps, _density(recipe, round), done, plan=plan)


def _name(out: Path, run: Path, round: int) -> str:
    return f"{run.relative_to(out)} round {round}"


def _density(recipe: Recipe, round: int) -> float:
    return (1 - recipe.prune.rate) ** round
