"""From what a person asks for to a Recipe: preset < config file < ``--set`` < flag.

Durations may be written ``500it`` or ``2ep``; epochs become iterations here, before the recipe gets
its digest. A changed ``train.iterations`` scales a preset's warm-up, milestones and rewind point in proportion.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any

from fastlth.catalogue import (
    DATASET_ALIASES,
    DATASETS,
    MODEL_ALIASES,
    SIGN_TESTS,
    dataset_name,
    has_batch_norm,
    lenet_widths,
    model_name,
)
from fastlth.errors import RecipeError, unknown
from fastlth.recipe import FACTS, SECTIONS, DataSection, PruneSection, Recipe, ScheduleSection, TrainSection
from fastlth.specs import is_own, spec_of

Layer = dict[str, dict[str, Any]]

PRESETS = ("paper", "paper-dropout", "lecode", "fast")

# What a preset-less pair must be given, and the flags that give it.
_NEEDED = {
    "iterations": "--iterations (or --epochs)",
    "batch_size": "--batch-size",
    "lr": "--lr",
}


@dataclass(frozen=True)
class Composed:
    """A recipe and what the header should say about it."""

    recipe: Recipe
    preset: str | None
    verified: bool
    """whether docs/results shows a winning ticket found with this preset as it is"""
    notes: tuple[str, ...]


def preset_table(preset: str) -> dict[str, Layer]:
    """All pairs one preset covers: "model dataset" -> settings."""
    if preset not in PRESETS:
        raise RecipeError(unknown("preset", preset, PRESETS))
    text = (resources.files("fastlth") / "presets" / f"{preset}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def presets_for(model: str, dataset: str) -> list[str]:
    """Names of the presets that cover a pair, the default one first."""
    return [p for p in ("paper", "fast", "lecode", "paper-dropout") if _row(model, dataset) in preset_table(p)]


def _row(model: str, dataset: str) -> str:
    """The pair whose settings hold: LeNets of other widths are trained as LeNet-300-100 is (Frankle & Carbin, G.6)."""
    return f"{model if lenet_widths(model) is None else 'lenet-300-100'} {dataset}"


def compose(
    model: str | Callable[..., Any],
    dataset: str | Callable[..., Any],
    *,
    preset: str | None = None,
    config: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Composed:
    """The recipe for a model and a data set, each given by its name or, if it is one's own (docs/own-nets.md), as
    ``package.module:function`` or the function itself.

    ``settings`` maps ``section.field`` to a value (flags and ``--set``). Without ``preset`` it is
    ``paper`` where that covers the pair, else ``fast``, else none, and then iterations, batch size
    and learning rate must be given. Raises RecipeError for anything that is not allowed, DataError for one's own data
    that cannot be used.
    """
    net = model_name(_name(model))
    asked = _overlay(_read_config(config), _layer(settings or {}))
    named = measured(net, dataset_name(_name(dataset)), asked)
    data: str = named["data"]["name"]
    _same_pair(asked, net, data)
    preset = _default_preset(net, data, preset)
    base = _preset_layer(net, data, preset)
    verified = bool(base.pop("verified", False)) and _row(net, data) == f"{net} {data}"
    missing = [flag for key, flag in _NEEDED.items() if key not in {**base.get("train", {}), **asked.get("train", {})}]
    if missing:
        raise RecipeError(f"no preset covers {net} on {data}; give {', '.join(missing)}")
    before = _in_iterations(_overlay(named, base)) if base else {}
    merged = _in_iterations(_overlay(_overlay(named, base), asked))
    notes = _scale_schedule(merged, before, asked)
    recipe = Recipe.from_dict(merged)
    if "model.batch_norm" in (settings or {}) and has_batch_norm(recipe.model.name):
        raise RecipeError(f"model.batch_norm must be left out for {recipe.model.name}, which always has it, "
                          f"got {recipe.model.batch_norm!r}")  # fmt: skip
    return Composed(recipe, preset, verified and not asked, (*notes, *without_effect(_names(asked), recipe)))


def without_effect(asked: Container[str], recipe: Recipe) -> Iterator[str]:
    """A note for each setting, ``section.field``, that was asked for and does nothing in this recipe: a milestone that
    its iterations do not reach, the rate of a criterion that has none."""
    last, schedule, prune = recipe.train.iterations, recipe.schedule, recipe.prune
    if "prune.rate" in asked and prune.criterion in SIGN_TESTS and prune.rate != PruneSection().rate:
        yield f"prune.rate {prune.rate:g} does nothing with criterion {prune.criterion}, which prunes by signs alone"
    if "schedule.milestones" in asked and (late := [m for m in schedule.milestones if m >= last]):
        yield f"schedule.milestones {late} are not reached in {last} iterations"
    if "schedule.warmup" in asked and schedule.warmup > last:
        yield f"schedule.warmup {schedule.warmup} does not end in {last} iterations"
    if "schedule.gamma" in asked and not schedule.milestones and schedule.gamma != ScheduleSection().gamma:
        yield f"schedule.gamma {schedule.gamma:g} does nothing without schedule.milestones"


def _names(layer: Layer) -> set[str]:
    return {f"{section}.{name}" for section, values in layer.items() for name in values}


def adjust(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """``recipe`` with some settings changed. Raises RecipeError for anything that is not allowed."""
    base = recipe.to_dict()
    asked = _layer(settings)
    if any(setting in settings for setting in ("model.name", "data.name", "data.image_size")):
        named = _overlay(base, asked)
        model, data = model_name(str(named["model"]["name"])), dataset_name(str(named["data"]["name"]))
        old = FACTS if data == recipe.data.name else (*FACTS, "image_size")  # what was measured of the pair before
        for section in ("model", "data"):
            base[section] = {k: v for k, v in base[section].items() if k not in old}
        asked = _overlay(asked, measured(model, data, _overlay(base, asked)))
    merged = _in_iterations(_overlay(base, asked))
    # a ticket's rewind values are those of its iteration, however long it is trained now
    _scale_schedule(merged, {s: values for s, values in base.items() if s != "prune"}, asked)
    return Recipe.from_dict(merged)


def iterations(name: str, value: int | str, recipe: Recipe) -> int:
    """``value``, a number or a text such as 500it or 2ep, as iterations of ``recipe``. Raises RecipeError, which calls
    it ``name``."""
    per_epoch = recipe.train.iterations_per_epoch(recipe.data.train_images)
    return _iterations(name, value, per_epoch) if isinstance(value, str) else value


def with_own(recipe: Recipe, model: str | Callable[..., Any] | None, data: str | Callable[..., Any] | None) -> Recipe:
    """``recipe`` with another model and other data, where given; other data bring their default hold-out."""
    changes: dict[str, Any] = {"model.name": _name(model)} if model is not None else {}
    if data is not None:
        changes |= {"data.name": _name(data), "data.validation": -1}
    return adjust(recipe, changes) if changes else recipe


def measured(model: str, dataset: str, asked: Layer) -> Layer:
    """Canonical names as settings, and what a recipe must know beside them of a model and a data set of one's own.

    Raises RecipeError or DataError where these cannot be used, RecipeError where ``asked`` says something else.
    """
    layer: Layer = {"model": {"name": model}, "data": {"name": dataset}}
    if is_own(dataset):
        from fastlth.data import own as own_data  # torch and numpy, which most commands do without

        layer["data"] = own_data.facts(dataset, asked.get("data", {}).get("image_size"))
    if is_own(model):
        from fastlth.models import own as own_nets

        facts = DATASETS[dataset] if dataset in DATASETS else DataSection(**layer["data"]).facts
        layer["model"]["content"] = own_nets.describe(model, facts)
    for section, values in layer.items():
        for name, value in values.items():
            said = asked.get(section, {}).get(name, value)
            if name != "name" and said != value:
                raise RecipeError(f"{section}.{name} is {said!r} in the settings but {value!r} now; leave it out, "
                                  "since it is measured")  # fmt: skip
    return layer


def _name(given: str | Callable[..., Any]) -> str:
    return given if isinstance(given, str) else spec_of(given)


def parse_setting(text: str) -> tuple[str, Any]:
    """``section.field=value`` from a ``--set``; the value is TOML, or a bare word."""
    key, found, value = text.partition("=")
    if not found or "." not in key:
        raise RecipeError(f"--set takes section.field=value (for example prune.rate=0.3), got '{text}'")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _default_preset(model: str, dataset: str, preset: str | None) -> str | None:
    covering = presets_for(model, dataset)
    if preset is None:
        return next((p for p in covering if p in ("paper", "fast")), None)
    if _row(model, dataset) not in preset_table(preset):
        others = f"use --preset {' or '.join(covering)}" if covering else "give the settings without --preset"
        raise RecipeError(f"preset '{preset}' does not cover {model} on {dataset}; {others}")
    return preset


def _preset_layer(model: str, dataset: str, preset: str | None) -> dict[str, Any]:
    return deepcopy(preset_table(preset)[_row(model, dataset)]) if preset else {}


def _read_config(path: Path | None) -> Layer:
    if path is None:
        return {}
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read --config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"--config {path} is not TOML: {error}") from error
    tables.pop("resolved", None)  # a run's own recipe.toml works as a config
    loose = [k for k, v in tables.items() if not isinstance(v, dict)]
    if loose:
        raise RecipeError(f"--config {path}: '{loose[0]}' stands outside a section; put it under [section]")
    return tables


def _layer(settings: Mapping[str, Any]) -> Layer:
    layer: Layer = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        name, _, pattern = name.partition(".")
        if section not in SECTIONS:
            raise RecipeError(unknown("section", section, SECTIONS))
        values = layer.setdefault(section, {})
        if pattern:  # prune.scale.output=0.5
            table = values.setdefault(name, _Patterns())
            if not isinstance(table, dict):
                raise RecipeError(f"{section}.{name} is given whole and as {key}; give one of them")
            table[pattern] = value
        elif name in values:
            raise RecipeError(f"{section}.{name} is given whole and in parts; give one of them")
        else:
            values[name] = deepcopy(value)
    return layer


class _Patterns(dict[str, Any]):
    """Single entries of a table setting: they go before what stands below, since the first match wins."""


def _overlay(below: Mapping[str, Mapping[str, Any]], above: Mapping[str, Mapping[str, Any]]) -> Layer:
    merged: Layer = {s: {**below.get(s, {}), **above.get(s, {})} for s in {**below, **above}}
    for section, values in above.items():
        for name, value in values.items():
            under = below.get(section, {}).get(name)
            if isinstance(value, _Patterns) and isinstance(under, dict):
                rest = {pattern: v for pattern, v in under.items() if pattern not in value}
                merged[section][name] = type(under)({**value, **rest})
    return merged


def _same_pair(asked: Layer, model: str, dataset: str) -> None:
    for section, name, aliases in (("model", model, MODEL_ALIASES), ("data", dataset, DATASET_ALIASES)):
        given = asked.get(section, {}).get("name", name)
        if not isinstance(given, str) or aliases.get(given, given) != name:
            raise RecipeError(f"{section}.name is {given!r} in the settings but '{name}' is asked for; make them agree")


def _in_iterations(layer: Layer) -> Layer:
    """Replace durations like "2ep" and "500it" by whole iterations."""
    train = {"iterations": 1, **layer.get("train", {})}
    data = Recipe.from_dict({"model": layer["model"], "data": layer["data"],
                             "train": {**train, "iterations": 1}}).data  # fmt: skip
    known = {k: v for k, v in train.items() if k in TrainSection.__dataclass_fields__}
    per_epoch = TrainSection(**{**known, "iterations": 1}).iterations_per_epoch(data.train_images)

    def convert(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [convert(name, v) for v in value]
        return _iterations(name, value, per_epoch) if isinstance(value, str) else value

    out = deepcopy(layer)
    for section, key in (("train", "iterations"), ("schedule", "warmup"),
                         ("schedule", "milestones"), ("prune", "rewind_to")):  # fmt: skip
        if key in out.get(section, {}):
            out[section][key] = convert(f"{section}.{key}", out[section][key])
    return out


def _iterations(name: str, text: str, per_epoch: int) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(it|ep)?", text.strip())
    if match is None or (match[2] != "ep" and "." in match[1]):
        raise RecipeError(f"{name} must be iterations (500, 500it) or epochs (2ep), got {text!r}")
    return round(Fraction(match[1]) * (per_epoch if match[2] == "ep" else 1))


def _scale_schedule(merged: Layer, before: Layer, asked: Layer) -> Iterable[str]:
    """Scale the preset's warm-up, milestones and rewind point to the iterations asked for; a note for each."""
    old = before.get("train", {}).get("iterations")
    new = merged["train"]["iterations"]
    unscaled = merged.setdefault("schedule", {}).get("scale") is False
    if not isinstance(old, int) or not isinstance(new, int) or old == new or unscaled:
        return []
    notes = []
    for section, key in (("schedule", "warmup"), ("schedule", "milestones"), ("prune", "rewind_to")):
        preset = before.get(section, {}).get(key)
        if preset and key not in asked.get(section, {}):
            scaled = round(Fraction(preset * new, old)) if isinstance(preset, int) else _spread(preset, new, old)
            merged[section][key] = scaled
            notes.append(f"{section}.{key} {preset} -> {scaled}, scaled with train.iterations {old} -> {new}")
    return notes


def _spread(milestones: list[int], new: int, old: int) -> list[int]:
    return sorted({max(1, round(Fraction(m * new, old))) for m in milestones})
