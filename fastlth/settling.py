"""What ``auto`` is in a run: settled once, written into its recipe.toml, and kept wherever it goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fastlth.data.sources import Source
from fastlth.errors import DeviceError, RecipeError
from fastlth.recipe import ComputeSection, Recipe
from fastlth.store.run import Run
from fastlth.training.available import device, engine, environment
from fastlth.training.engines.make import make_engine
from fastlth.training.parallel import team as parallel
from fastlth.training.parallel.team import Team
from fastlth.training.resolve import resolve

Settled = tuple[ComputeSection, str | None, Mapping[str, float]]
"""the compute section, what is not as it was when the run began, and the images/s that were measured now"""


def settle(
    directory: Run, recipe: Recipe, source: Source, resolved: Mapping[str, Any] | None, team: Team | None = None
) -> Settled:
    """The compute section of this run: as it was resolved at its first start, else as ``resolved`` says, else resolved
    now; written down. With what is not as it was then, and the images/s that were measured."""
    compute, kept, moved = _usable(recipe, [r for r in (directory.resolved, resolved) if r is not None])
    alike = compute is not None and (compute.engine, compute.compile, compute.kept) == ("dense", "off", {})
    if team is not None and compute is not None and not alike:
        compute, moved = None, f"{team.size} processes train it, by the dense engine"
    measured: Mapping[str, float] = {}
    if compute is None:
        asked = recipe if team is None else parallel.narrowed(recipe)
        choice = resolve(asked, lambda candidate: make_engine(candidate, source))
        compute, measured = choice.compute, choice.images_per_second
        kept = choice.to_dict()
    here = environment(compute) | ({} if team is None else {"processes": str(team.size)})
    there = kept.get("environment", here)
    if there != here and moved is None:
        now, then = ({"processes": "1", **e} for e in (here, there))
        moved = ", ".join(f"{k} {then.get(k)} -> {now.get(k)}" for k in now | then if then.get(k) != now.get(k))
    if directory.resolved is None or moved:
        log = [*(directory.resolved or kept).get("moved", []), *([moved] if moved else [])]
        directory.write_recipe(recipe, {**kept, "environment": here, **({"moved": log} if log else {})})
    return compute, moved, measured


def _usable(
    recipe: Recipe, known: Sequence[Mapping[str, Any]]
) -> tuple[ComputeSection | None, Mapping[str, Any], str | None]:
    """The first of ``known`` with which the recipe can be trained here: its compute section (None if there is none),
    all of it, and why one before it could not be."""
    moved: str | None = None
    for one in known:
        names = [f.name for f in dataclasses.fields(ComputeSection) if f.name in one]
        compute = ComputeSection(**{name: one[name] for name in names})
        try:
            device(compute.device)
            engine(dataclasses.replace(recipe, compute=compute))
        except DeviceError:
            moved = moved or f"{compute.device} is not there any more"
        except RecipeError as error:
            moved = moved or str(error)
        else:
            return compute, one, moved
    return None, {}, moved
