"""A sweep's TOML file as jobs: settings in common, lists that multiply, branches. Needs no torch.

    model = "lenet-300-100"
    dataset = "mnist"
    preset = "fast"                   # as find-ticket takes it; may be left out
    seeds = 5                         # 0 to 4, or a list of seeds

    [settings]
    prune.rounds = 12
    prune.rate = [0.1, 0.2, 0.4]      # a list multiplies, and so do lists of models, datasets and presets
    prune.scale.fc1 = 0.5             # one entry, beside those of the preset, as with --set

    [[branch]]
    kind = "random-reinit"            # with the options of `fastlth branch`
    rounds = "all"                    # or a list of rounds
    trials = 3

A setting that is a list itself (schedule.milestones) multiplies as a list of lists.
"""

from __future__ import annotations

import dataclasses
import itertools
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from fastlth.composition import Composed, compose
from fastlth.errors import RecipeError, unknown
from fastlth.experiments.control import Control
from fastlth.experiments.figures.declare import Arm, Branched
from fastlth.experiments.figures.scale import Job
from fastlth.recipe import SECTIONS, Recipe, reading

KEYS = ("model", "dataset", "preset", "seeds", "settings", "branch")
OPTIONS = tuple(f.name for f in dataclasses.fields(Control))


@dataclass(frozen=True)
class Sweep:
    """The searches of a file, each with its branches."""

    name: str
    """the file's, without .toml"""
    jobs: tuple[Job, ...]
    """one per combination and unbroken stretch of seeds; its label names what varies"""
    notes: tuple[str, ...] = ()
    """of each combination, what ``find-ticket`` says in its header"""


def read(path: Path) -> Sweep:
    """The sweep that a file describes. Raises RecipeError for what is not allowed in it."""
    try:
        spec = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not TOML: {error}") from error
    for key in spec:
        if key not in KEYS:
            raise RecipeError(f"{path}: {unknown('key', key, KEYS)}")
    for key in ("model", "dataset"):
        if key not in spec:
            raise RecipeError(f"{path} has no {key}; write one, or a list of them")
    branches = [_branch(table) for table in _tables(spec.get("branch", []))]
    seeds = _seeds(spec.get("seeds", 1))
    composed = [(varied.label, _composed(varied)) for varied in _product(spec)]
    jobs = tuple(job for label, found in composed for job in _jobs(label, found.recipe, seeds, branches))
    _different(jobs)
    return Sweep(path.stem, jobs, tuple(f"{label}: {note}" for label, found in composed for note in found.notes))


@dataclass(frozen=True)
class _Varied:
    """One combination: all its values, and which of them vary."""

    values: Mapping[str, Any]
    label: str


def _product(spec: Mapping[str, Any]) -> Iterator[_Varied]:
    axes: dict[str, list[Any]] = {}
    for key in ("model", "dataset", "preset"):
        if key in spec:
            axes[key] = _words(key, spec[key])
    for section, fields in _section(spec.get("settings", {})):
        for name, value in _parts(fields):
            axes[f"{section}.{name}"] = _choices(section, name, value)
    varying = [key for key, choices in axes.items() if len(choices) > 1]
    for combination in itertools.product(*axes.values()):
        values = dict(zip(axes, combination, strict=True))
        label = ", ".join(f"{key.partition('.')[2] or key} {_short(values[key])}" for key in varying)
        yield _Varied(values, label or "tickets")


def _composed(varied: _Varied) -> Composed:
    values = dict(varied.values)
    model, dataset, preset = values.pop("model"), values.pop("dataset"), values.pop("preset", None)
    return compose(model, dataset, preset=preset, settings=values)


def _jobs(label: str, recipe: Recipe, seeds: Sequence[int], branches: Sequence[Branched]) -> Iterator[Job]:
    for follow in branches:
        if beyond := [k for k in follow.rounds if not 1 <= k <= recipe.prune.rounds]:
            raise RecipeError(f"branch {follow.control.kind}: round {beyond[0]} is not a pruned round of these "
                              f"searches; choose from 1 to {recipe.prune.rounds}, or \"all\"")  # fmt: skip
        if (images := follow.control.images or 0) > recipe.data.train_images:
            raise RecipeError(f"branch {follow.control.kind}: images must be at most the {recipe.data.train_images} "
                              f"training images, got {images}")  # fmt: skip
    arm = Arm(label=label, model=recipe.model.name, dataset=recipe.data.name, follow=tuple(branches))
    for first, count in _stretches(seeds):
        whole = dataclasses.replace(recipe, seeds=dataclasses.replace(recipe.seeds, base=first))
        yield Job(arm=arm, recipe=whole, replicates=count, follow=arm.follow, plan=None, ratio=Fraction(1))


def _branch(table: Mapping[str, Any]) -> Branched:
    for key in table:
        if key not in (*OPTIONS, "rounds", "trials", "label"):
            raise RecipeError(unknown("option of a branch", key, (*OPTIONS, "rounds", "trials", "label")))
    if "kind" not in table:
        raise RecipeError('a [[branch]] has no kind; write one, such as kind = "random-reinit"')
    control = reading.section("branch", Control, {key: value for key, value in table.items() if key in OPTIONS})
    if control.density is not None:
        raise RecipeError(f"branch {control.kind}: density {control.density:g} is not taken here, where branches go by "
                          "rounds; give rounds")  # fmt: skip
    rounds = table.get("rounds", "all")
    if rounds != "all" and not (isinstance(rounds, list) and rounds and all(type(k) is int for k in rounds)):
        raise RecipeError(f'branch {control.kind}: rounds must be "all" or a list such as [3, 7], got {rounds!r}')
    trials = table.get("trials")
    if trials is not None and type(trials) is not int:
        raise RecipeError(f"branch {control.kind}: trials must be a whole number, got {trials!r}")
    return Branched(
        label=str(table.get("label", control.kind)), control=control, trials=control.trials(trials),
        rounds=() if rounds == "all" else tuple(sorted(set(rounds))),
    )  # fmt: skip


def _seeds(given: Any) -> list[int]:
    if type(given) is int and given >= 1:
        return list(range(given))
    whole = isinstance(given, list) and given and all(type(s) is int and s >= 0 for s in given)
    if not whole or len(set(given)) < len(given):
        raise RecipeError(f"seeds must be how many (5: 0 to 4) or a list of different seeds, got {given!r}")
    return sorted(given)


def _stretches(seeds: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, how many) of every unbroken stretch: replicates are counted from a first seed."""
    first = 0
    for last in range(len(seeds)):
        if last + 1 == len(seeds) or seeds[last + 1] != seeds[last] + 1:
            yield seeds[first], last + 1 - first
            first = last + 1


def _words(key: str, given: Any) -> list[Any]:
    words = given if isinstance(given, list) else [given]
    if not words or not all(isinstance(word, str) for word in words):
        raise RecipeError(f"{key} must be a word or a list of words, got {given!r}")
    return words


def _tables(given: Any) -> list[Mapping[str, Any]]:
    if not isinstance(given, list) or not all(isinstance(table, dict) for table in given):
        raise RecipeError(f"branches are written under [[branch]], with double brackets, got {given!r}")
    return given


def _section(settings: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not isinstance(settings, dict):
        raise RecipeError(f"settings are written under [settings], as section.field = value, got {settings!r}")
    for section, fields in settings.items():
        if section not in SECTIONS:
            raise RecipeError(unknown("section", section, SECTIONS))
        if not isinstance(fields, dict):
            raise RecipeError(f"settings.{section} must be section.field = value, got {fields!r}")
        if section == "seeds" and "base" in fields:
            raise RecipeError("settings.seeds.base is given by seeds, at the top of the file; leave it out")
        yield section, fields


def _parts(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Entries of a table one by one, as --set names them: ("scale.fc1", 0.5), which leaves a preset's others."""
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            yield from ((f"{name}.{key}", part) for key, part in _parts(value))
        else:
            yield name, value


def _choices(section: str, name: str, value: Any) -> list[Any]:
    """The values that a setting takes in turn."""
    hint = typing.get_type_hints(SECTIONS[section]).get(name)
    listed = any(typing.get_origin(kind) is tuple for kind in (hint, *typing.get_args(hint)))  # tuple, or tuple | None
    if not isinstance(value, list) or (listed and not (value and all(isinstance(v, list) for v in value))):
        return [value]
    if not value:
        raise RecipeError(f"settings.{section}.{name} is an empty list, which leaves nothing to train; give a value")
    return value


def _different(jobs: Sequence[Job]) -> None:
    """Two combinations that have one run folder would be one search under two names."""
    seen: dict[tuple[str, str, int], Recipe] = {}
    for job in jobs:
        for r in range(job.replicates):
            key = (job.recipe.model.name, job.recipe.digest, job.recipe.seeds.base + r)
            if key in seen:
                raise RecipeError(f"'{job.arm.label}' is the same search as another one of this sweep (digest "
                                  f"{job.recipe.digest[:8]}; rounds and densities to stop at are not part of it); "
                                  "name each once")  # fmt: skip
            seen[key] = job.recipe


def _short(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
