"""What ``auto`` is in a run: settled once, written into its recipe.toml, and kept wherever it goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastlth.data.sources import Source
from fastlth.errors import DeviceError, RecipeError
from fastlth.recipe import ComputeSection, Recipe
from fastlth.store.run import Run
from fastlth.training.engines.make import make_engine
from fastlth.training.parallel import team as parallel
from fastlth.training.parallel.team import Team
from fastlth.training.resolve import device, engine, environment, resolve

Settled = tuple[ComputeSection, str | None, Mapping[str, float]]
"""the compute section, what is not as it was when the run began, and the images/s that were measured now"""


def settle(
    directory: Run, recipe: Recipe, source: Source, resolved: Mapping[str, Any] | None, team: Team | None = None
) -> Settled:
    """The compute section of this run: as it was resolved at its first start, else as ``resolved`` says, else resolved
    now; written down. With what is not as it was then, and the images/s that were measured."""
    kept: Mapping[str, Any] | None = None
    moved: str | None = None
    for before in (directory.resolved, resolved):
        if before is None or kept is not None:
            continue
        names = [f.name for f in dataclasses.fields(ComputeSection) if f.name in before]
        compute = ComputeSection(**{name: before[name] for name in names})
        try:
            device(compute.device)
            engine(dataclasses.replace(recipe, compute=compute))
            kept = before
        except DeviceError:
            moved = moved or f"{compute.device} is not there any more"
        except RecipeError as error:
            moved = moved or str(error)
    shared = kept is None or (compute.engine, compute.compile, compute.kept) == ("dense", "off", {})
    if team is not None and not shared:
        kept, moved = None, f"{team.size} processes train it, by the dense engine"
    measured: Mapping[str, float] = {}
    if kept is None:
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
