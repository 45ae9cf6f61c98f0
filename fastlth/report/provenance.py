"""Where a run comes from: its recipe as a difference from a preset, the command that makes it again, the machine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlth import toml
from fastlth.composition import compose, presets_for
from fastlth.recipe import FACTS, Recipe
from fastlth.report.subject import Subject
from fastlth.store.run import RECIPE

FLAGS = {
    "prune.rounds": "--rounds", "prune.to_density": "--to-density", "prune.rate": "--rate", "prune.scope": "--scope",
    "prune.criterion": "--criterion", "prune.rewind_to": "--rewind-to", "train.iterations": "--iterations",
    "train.batch_size": "--batch-size", "train.lr": "--lr", "compute.device": "--device",
    "compute.precision": "--precision", "compute.compile": "--compile", "compute.loader": "--loader",
    "compute.engine": "--engine", "store.theta0": "--theta0", "store.keep_weights": "--keep-weights",
}  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """A setting that is not the preset's; ``preset`` is None where nothing gives it."""

    setting: str
    preset: Any
    here: Any


def nearest(recipe: Recipe) -> tuple[str | None, tuple[Difference, ...]]:
    """The preset that a recipe differs from least, and the settings that differ. The seed is not one of them.

    Where several differ in as few settings it is the first of paper, fast, lecode; None where none covers the pair.
    """
    model, dataset = recipe.model.name, recipe.data.name
    names: Sequence[str | None] = presets_for(model, dataset) or [None]
    candidates = [(name, _differences(recipe, name)) for name in names]
    return min(candidates, key=lambda c: len(c[1]))


def _composed(recipe: Recipe, preset: str | None, settings: dict[str, Any]) -> Recipe:
    """What ``compose`` makes of the recipe's pair. What was measured of one's own net and data is taken from the
    recipe: neither need be here."""
    if not recipe.model.own and not recipe.data.own:
        return compose(recipe.model.name, recipe.data.name, preset=preset, settings=settings).recipe
    known = recipe.to_dict()
    pair = {s: {k: v for k, v in known[s].items() if k in ("name", *FACTS)} for s in ("model", "data")}
    train = {key.removeprefix("train."): value for key, value in settings.items()}
    return Recipe.from_dict({**pair, "train": train})


def _differences(recipe: Recipe, preset: str | None) -> tuple[Difference, ...]:
    train = recipe.train
    needed = {} if preset else {"train.iterations": 1, "train.batch_size": 1, "train.lr": 1.0}
    base = _flat(_composed(recipe, preset, needed))
    # a changed number of iterations moves warm-up and milestones with it: those are no differences of their own
    asked = {**needed, "train.iterations": train.iterations}
    scaled = _flat(_composed(recipe, preset, asked))
    here = _flat(recipe)
    return tuple(
        Difference(key, None if key in needed else base.get(key), here.get(key))
        for key in here
        if key != "seeds.base" and (key in needed or here.get(key) != scaled.get(key)
                                    or (key == "train.iterations" and here[key] != base[key]))
    )  # fmt: skip


def commands(subject: Subject) -> list[str]:
    """The commands that make a subject again, to be pasted into a shell; consecutive seeds are one command."""
    recipe = subject.recipe
    preset, differences = nearest(recipe)
    start = ["fastlth", "find-ticket", recipe.model.name, recipe.data.name]
    start += ["--preset", preset] if preset else []
    for d in differences:
        if d.setting in FLAGS:
            start += [FLAGS[d.setting], str(d.here)]
        else:
            start += ["--set", f"{d.setting}={_toml(d.here)}"]
    start += _out(subject.replicates[0].path)
    runs = []
    for first, count in _consecutive(sorted({r.seed for r in subject.replicates})):
        runs.append([*start, "--seed", str(first)] + (["--replicates", str(count)] if count > 1 else []))
    return [shlex.join(run) for run in runs]


def _out(path: Path) -> list[str]:
    """--out for a run folder or a ticket in it; nothing for the default, or for a ticket that lies elsewhere."""
    folder = path.parent if path.is_file() else path
    out = folder.parent.parent
    return ["--out", str(out)] if (folder / RECIPE).exists() and out not in (Path("runs"), Path()) else []


def _consecutive(seeds: Sequence[int]) -> list[tuple[int, int]]:
    """(first, how many) of each stretch without gaps."""
    stretches: list[tuple[int, int]] = []
    for seed in seeds:
        if stretches and seed == sum(stretches[-1]):
            stretches[-1] = (stretches[-1][0], stretches[-1][1] + 1)
        else:
            stretches.append((seed, 1))
    return stretches


def environment(subject: Subject) -> dict[str, str]:
    """What the first replicate ran on, and the others where they differ; empty for an imported ticket."""
    said: dict[str, list[str]] = {}
    for replicate in subject.replicates:
        for key, value in machine(replicate.resolved).items():
            if value not in said.setdefault(key, []):
                said[key].append(value)
    return {key: "; ".join(values) for key, values in said.items()}


def machine(resolved: Mapping[str, Any]) -> dict[str, str]:
    """What a run's ``resolved`` says of where and how it was computed, as a person reads it."""
    told = {key: str(resolved[key]) for key in ("device", "precision", "compile", "channels_last", "loader", "engine",
                                                "threads") if key in resolved}  # fmt: skip
    versions = resolved.get("environment", {})
    told |= {("machine" if k == "device" else k): str(v) for k, v in versions.items()}
    if moved := resolved.get("moved"):
        told["went on elsewhere"] = "; ".join(map(str, moved))
    return told


def _flat(recipe: Recipe) -> dict[str, Any]:
    return {f"{s}.{k}": v for s, table in recipe.to_dict().items() for k, v in table.items()}


def _toml(value: Any) -> str:
    """A value as ``--set`` reads it."""
    text = toml.dumps({"x": {"value": value}})
    return text.partition(" = ")[2].strip()
