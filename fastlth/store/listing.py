"""The runs under an output folder, read without locking any: for ``fastlth runs``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastlth.errors import FastlthError
from fastlth.store.inspect import summary
from fastlth.store.run import RECIPE, SUPERMASKS, TICKET, entries, read_recipe, run_folders


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """One line of the list."""

    path: Path
    model: str
    dataset: str
    seed: int
    rounds_done: int
    """finished rounds, the dense one included"""
    rounds_asked: int
    """how many it makes, the dense one included: fewer than prune.rounds + 1 where it has come to prune.to_density"""
    bytes: int
    """of every file in the folder"""
    branches: tuple[str, ...] = ()
    """folders of its control runs with a finished training; a run that only prune-at-init made has nothing else"""
    unfinished: tuple[str, ...] = ()
    """folders of those with none yet"""
    supermasks: tuple[str, ...] = ()
    """labels of its finished supermasks; a folder that only supermask made has no search, and asks for no round"""
    problem: str = ""
    """why the run cannot be read; then model and dataset are empty and the counts 0"""


def list_runs(out: Path) -> list[RunInfo]:
    """Every run under ``out``, by path; none if there is no such folder. A damaged run is listed too."""
    found = [run for parent in entries(out) for run in sorted(run_folders(parent).items())]
    return [_info(path, seed) for (seed, _), path in found if _recipe_file(path).exists()]


def _recipe_file(path: Path) -> Path:
    """The search's; that of its supermasks where there is no search."""
    file = path / RECIPE
    return file if file.exists() else path / SUPERMASKS / RECIPE


def _info(path: Path, seed: int) -> RunInfo:
    model = dataset = problem = ""
    done = asked = 0
    try:
        recipe, _ = read_recipe(_recipe_file(path))
        model, dataset = recipe.model.name, recipe.data.name
        if (path / RECIPE).exists():
            asked = recipe.prune.asked([])
            rounds = summary(path / TICKET).rounds if (path / TICKET).exists() else ()
            done, asked = len(rounds), recipe.prune.asked([r["density"] for r in rounds])
    except FastlthError as error:
        problem = str(error)
    begun = {f.parent.name for f in path.glob("branches/*/branch.toml")}
    finished = begun & {f.parents[2].name for f in path.glob("branches/*/round-*/trial-*/result.json")}
    return RunInfo(
        path=path, model=model, dataset=dataset, seed=seed, rounds_done=done, rounds_asked=asked,
        bytes=_size(path), branches=tuple(sorted(finished)), unfinished=tuple(sorted(begun - finished)),
        supermasks=tuple(sorted(f.stem for f in (path / SUPERMASKS).glob("*.json"))), problem=problem,
    )  # fmt: skip


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.lstat().st_size if file.is_file() else 0
        except FileNotFoundError:  # a writer's temporary file, gone meanwhile
            continue
    return total
