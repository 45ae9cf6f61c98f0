"""Control runs beside a search, as the files in its branches/ tell them."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastlth.errors import FastlthError
from fastlth.experiments.control import Control
from fastlth.recipe import Recipe
from fastlth.store.run import RECIPE, entries, read_recipe

MOST_TOLD = 3  # settings in a label
ASKED = "density_asked"

Result = Mapping[str, Any]
"""of a round, in the form of ``find-ticket --json``; what an imported ticket does not know is None"""


def read(folder: Path, recipe: Recipe) -> dict[str, tuple[Result, ...]]:
    """Name -> a control's results. branches/<kind>-<digest8>/round-<k>/: every JSON file there is asked for results of
    that round, to which ``ASKED`` is added: the density that they were pruned to, None where a round's.

    Left out is what is not to be compared with the tickets: nets trained on other data, and the dense net, which some
    controls train again to begin with.
    """
    found: dict[str, list[Result]] = {}
    folders = [f for f in entries(folder / "branches") if f.is_dir() and _kind(f.name) != "dense"]
    recipes = {f: _recipe_of(f) or recipe for f in folders}
    folders = [f for f in folders if recipes[f].data.name == recipe.data.name]
    controls = {f: _control(f) for f in folders}
    names = [", ".join([_name(controls[f], _kind(f.name)), *_changed(recipes[f], recipe)]) for f in folders]
    asked = [control.density if control else None for control in controls.values()]
    points = list(zip(names, asked, strict=True))
    for branch, point in zip(folders, points, strict=True):
        name, density = point
        if points.count(point) > 1:  # they differ in something that no label tells, so they are no draws of one
            name = branch.name
        for place in entries(branch):
            if match := re.fullmatch(r"round-(\d+)", place.name):
                for file in sorted(place.rglob("*.json")):
                    results = _results(file, int(match[1]))
                    found.setdefault(name, []).extend({**r, ASKED: density} for r in results)
    return {name: tuple(results) for name, results in found.items() if results}


def _control(branch: Path) -> Control | None:
    try:
        return Control(**tomllib.loads((branch / "branch.toml").read_text(encoding="utf-8"))["branch"])
    except (OSError, ValueError, KeyError, TypeError, FastlthError):
        return None


def _name(control: Control | None, kind: str) -> str:
    """Such as "random-prune, strategy erk, reinit". Controls that differ in the density alone are one, at several
    densities, but for those that reach it in one step where others go round by round."""
    if control is None:
        return kind
    options = {k: v for k, v in control.options().items() if k not in ("kind", "density")}
    told = [k if v is True else v if k == "method" else f"{k} {v}" for k, v in options.items()]
    once = control.density is not None and Control(**{**control.options(), "density": None}).chains
    return ", ".join([kind, *told, *(["in one step"] if once else [])])


def _recipe_of(branch: Path) -> Recipe | None:
    try:
        return read_recipe(branch / RECIPE)[0]
    except FastlthError:
        return None


def _changed(recipe: Recipe, before: Recipe) -> list[str]:
    """Settings of the training in which two recipes differ, such as "lr 0.01"."""
    new, old = recipe.to_dict(), before.to_dict()
    told = [f"{key.replace('_', ' ')} {value}" for section in ("model", "train", "schedule")
            for key, value in new[section].items() if old[section].get(key) != value]  # fmt: skip
    return told[:MOST_TOLD]


def _kind(folder: str) -> str:
    return re.sub(r"-[0-9a-f]{8}$", "", folder)


def _results(file: Path, round: int) -> Iterator[Result]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # half-written by a branch still running
    candidates = [document]
    while candidates:
        one = candidates.pop(0)
        if isinstance(one, dict) and {"density", "early_stop_test_accuracy"} <= one.keys():
            if one.get("round", round) == round:
                yield {**one, "round": round}
        elif isinstance(one, dict):
            candidates.extend(v for k, v in one.items() if k in ("result", "rounds", "results", "replicates"))
        elif isinstance(one, list):
            candidates.extend(one)
