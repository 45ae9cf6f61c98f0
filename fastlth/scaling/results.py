"""What a sweep found, read from the run directories: a line per search, branch, round and draw."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlth.experiments.branch import planned
from fastlth.experiments.figures.declare import Branched
from fastlth.experiments.figures.scale import Job
from fastlth.experiments.figures.work import run_of
from fastlth.experiments.trial import Trial
from fastlth.recipe import Recipe
from fastlth.search import asked, over, winning_round
from fastlth.store import atomic
from fastlth.store.inspect import summary
from fastlth.store.run import TICKET

COLUMNS = (
    "search", "seed", "branch", "round", "trial", "density", "kept", "early_stop_iteration",
    "early_stop_validation_accuracy", "early_stop_test_accuracy", "test_accuracy", "seconds", "run",
)  # fmt: skip


def searches(jobs: Sequence[Job], out: Path) -> list[dict[str, Any]]:
    """One entry per label, with what its replicates came to so far: plain JSON."""
    found: dict[str, list[tuple[int, Path, Recipe, Sequence[Mapping[str, Any]]]]] = {}
    for job in jobs:
        for recipe, run in _runs(job, out):
            rounds = asked(recipe, summary(run / TICKET).rounds) if (run / TICKET).exists() else ()
            found.setdefault(job.arm.label, []).append((recipe.seeds.base, run, recipe, rounds))
    return [
        {
            "search": label,
            "recipe_digest": runs[0][2].digest,
            "replicates": [
                {"seed": seed, "run": str(run), "rounds_finished": len(rounds), "finished": over(recipe, rounds)}
                for seed, run, recipe, rounds in runs
            ],
            "winning_round": winning_round([rounds for *_, rounds in runs]) if all(r[3] for r in runs) else None,
        }
        for label, runs in found.items()
    ]


def table(jobs: Sequence[Job], out: Path) -> str:
    """CSV text of all that is finished."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_lines(jobs, out))
    return text.getvalue()


def write(jobs: Sequence[Job], out: Path, folder: Path) -> Path:
    """``table`` as FOLDER/results.csv."""
    atomic.make_folders(folder)
    atomic.write(folder / "results.csv", table(jobs, out).encode())
    return folder / "results.csv"


def _lines(jobs: Sequence[Job], out: Path) -> Iterator[dict[str, Any]]:
    for job in jobs:
        for recipe, run in _runs(job, out):
            about = {"search": job.arm.label, "seed": recipe.seeds.base, "run": run}
            if (run / TICKET).exists():
                for result in asked(recipe, summary(run / TICKET).rounds):
                    yield {**about, "branch": "", **result}
            for follow in job.follow:
                if isinstance(follow, Branched):
                    trained, name = planned(recipe, follow.control)
                    digest = follow.control.digest(trained.digest)
                    for k in follow.rounds or range(1, recipe.prune.rounds + 1):
                        for t in range(follow.trials):
                            if done := Trial(run / "branches" / name, digest, k, t).result():
                                yield {**about, "branch": follow.label, **done}


def _runs(job: Job, out: Path) -> Iterator[tuple[Recipe, Path]]:
    for r in range(job.replicates):
        recipe = job.recipe.replicate(r)
        yield recipe, run_of(out, recipe)
