"""What every ``auto`` becomes in an experiment: decided once, kept in the experiment's recipe.toml."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastlth import toml
from fastlth.errors import DeviceError, RecipeError
from fastlth.recipe import ComputeSection, Recipe
from fastlth.store import atomic
from fastlth.store.run import RECIPE, read_recipe
from fastlth.training import kept
from fastlth.training.available import device, engine, loader
from fastlth.training.engines.base import Engine
from fastlth.training.resolve import resolve


def settled(
    recipe: Recipe, folder: Path, make: Callable[[Recipe], Engine], known: Mapping[str, Any] | None = None
) -> Recipe:
    """``recipe`` without ``auto``: as FOLDER/recipe.toml says, else as ``known`` does (the ``resolved`` of a ticket),
    else resolved now with the engines that ``make`` builds, and written down. A device that is gone is chosen anew.

    Raises TicketError for a damaged recipe.toml, OutputError, DeviceError, RecipeError.
    """
    file = folder / RECIPE
    before = read_recipe(file)[1] if file.exists() else dict(known or {})
    resolved = as_known(recipe, make, before)
    if not file.exists() or resolved is not before:
        atomic.make_folders(folder)
        atomic.write(file, toml.dumps({**recipe.to_dict(), "resolved": resolved}).encode())
    return dataclasses.replace(recipe, compute=compute_of(resolved))


def as_known(recipe: Recipe, make: Callable[[Recipe], Engine], known: Mapping[str, Any]) -> Mapping[str, Any]:
    """``known``, the ``resolved`` of a run or ticket, where it is whole, its device is there and it can train
    ``recipe``, whose data or dropout may not be those of the run; else resolved now.

    Raises DeviceError, RecipeError.
    """
    if all(name in known for name in _NAMES) and _usable(dataclasses.replace(recipe, compute=compute_of(known))):
        return known
    return resolve(recipe, make).to_dict()


def compute_of(resolved: Mapping[str, Any]) -> ComputeSection:
    """The compute section without ``auto`` in what a run or ticket says of itself."""
    return ComputeSection(**{name: resolved[name] for name in _NAMES})


_NAMES = [f.name for f in dataclasses.fields(ComputeSection)]


def _usable(recipe: Recipe) -> bool:
    """Whether everything that ``recipe.compute`` names is there and can train it."""
    try:
        device(recipe.compute.device)
        engine(recipe)
        loader(recipe.compute.loader, recipe)
        kept.check(recipe)
    except (DeviceError, RecipeError):
        return False
    return True
