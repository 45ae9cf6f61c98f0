"""Recipe: every setting of a search, frozen and validated; its digest names the run.

One section per dataclass, one field per setting, `section.field` is its name everywhere: in TOML
files, in ``--set`` and in error messages. ``fastlth/composition.py`` builds recipes from presets,
files and flags; nothing else in the project reads settings from anywhere but here.
"""

from __future__ import annotations

import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, replace
from typing import Any

from fastlth import specs
from fastlth.errors import RecipeError, unknown
from fastlth.recipe.checks import check, exact
from fastlth.recipe.machine import ComputeSection, StoreSection
from fastlth.recipe.net import FACTS, DataSection, ModelSection
from fastlth.recipe.prune import LAST_ROUND, WINDOW, PruneSection
from fastlth.recipe.reading import defaults, section
from fastlth.recipe.training import STREAMS, EvaluateSection, ScheduleSection, SeedsSection, TrainSection

__all__ = [
    "FACTS", "LAST_ROUND", "SECTIONS", "STREAMS", "WINDOW", "ComputeSection", "DataSection", "EvaluateSection",
    "ModelSection", "PruneSection", "Recipe", "ScheduleSection", "SeedsSection", "StoreSection", "TrainSection",
    "exact",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Every setting of a search. Raises RecipeError where settings contradict each other."""

    model: ModelSection
    data: DataSection
    train: TrainSection
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    prune: PruneSection = field(default_factory=PruneSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    seeds: SeedsSection = field(default_factory=SeedsSection)
    compute: ComputeSection = field(default_factory=ComputeSection)
    store: StoreSection = field(default_factory=StoreSection)

    def __post_init__(self) -> None:
        last, rewind = self.train.iterations, self.prune.rewind_to
        check("prune.rewind_to", rewind < last, f"be below train.iterations ({last})", rewind)
        check("store.theta0", self.store.theta0 == "stored" or not rewind,
               f"be stored with prune.rewind_to {rewind}, since a seed is theta0 only", self.store.theta0)  # fmt: skip
        check("store.theta0", self.store.theta0 == "stored" or not self.model.own,
               "be stored for an own net, whose constructor need not draw the same bits everywhere",
               self.store.theta0)  # fmt: skip
        check("compute.engine", self.compute.engine in ("auto", "dense") or not self.prune.fills,
               f"be auto or dense with prune.mask_0 {self.prune.mask_0}, since other engines keep pruned weights at 0",
               self.compute.engine)  # fmt: skip
        images = self.data.train_images
        check("train.batch_size", self.train.batch_size <= images,
               f"be at most the {images} training images", self.train.batch_size)  # fmt: skip
        least = (WINDOW + 1) * self.train.iterations_per_epoch(images)
        check("prune.early_bird", not self.prune.early_bird or last >= least,
               f"be 0 with {last} iterations, since it needs {WINDOW + 1} epochs to compare masks: {least} iterations "
               f"of batch size {self.train.batch_size} on {images} training images", self.prune.early_bird)  # fmt: skip

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Section -> field -> plain value, as TOML and JSON hold them (tuples become lists)."""
        plain = json.loads(json.dumps(asdict(self)))
        return {s: {k: v for k, v in values.items() if v is not None} for s, values in plain.items()}

    def to_unordered(self) -> dict[str, dict[str, Any]]:
        """``to_dict`` for a file that sorts keys: where another order has a meaning, a list of pairs is in place of
        the table. ``from_dict`` reads both."""
        sections, scale = self.to_dict(), self.prune.scale
        if list(scale) != sorted(scale):
            sections["prune"]["scale"] = [[pattern, factor] for pattern, factor in scale.items()]
        return sections

    @staticmethod
    def from_dict(sections: Mapping[str, Mapping[str, Any]]) -> Recipe:
        """The inverse of ``to_dict``. Raises RecipeError for unknown, missing or mistyped settings."""
        for name in sections:
            if name not in SECTIONS:
                raise RecipeError(unknown("section", name, SECTIONS))
        return Recipe(**{name: section(name, cls, sections.get(name, {})) for name, cls in SECTIONS.items()})

    def replicate(self, number: int) -> Recipe:
        """The recipe of a search's replicate: its base seed is so many further."""
        return replace(self, seeds=replace(self.seeds, base=self.seeds.base + number))

    @property
    def digest(self) -> str:
        """sha256 (hex) over the settings that differ from their defaults.

        Leaves out what is only a prefix or changes no result: number of rounds, target density,
        base seed and the store section. A new setting with a default moves no old digest.
        """
        asked = Recipe.from_dict(self.to_dict()).to_dict()  # 1 given from Python for 1.0 is the same recipe
        asked["prune"] = {k: v for k, v in asked["prune"].items() if k not in ("rounds", "to_density")}
        asked["seeds"].pop("base")
        asked["schedule"].pop("scale")
        del asked["store"]
        if asked["data"]["validation"] == self.data.facts.validation:
            del asked["data"]["validation"]
        if specs.folder(self.data.name) is not None:
            asked["data"]["name"] = specs.FOLDER  # content says which; a folder may move
        for name, values in asked.items():
            for key, default in defaults(SECTIONS[name]).items():
                if values.get(key, MISSING) == default:
                    del values[key]
        # sections and fields sorted by name, but not the patterns of prune.scale: their order has a meaning
        named = {name: dict(sorted(values.items())) for name, values in sorted(asked.items()) if values}
        canonical = json.dumps(named, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


SECTIONS: dict[str, type[Any]] = typing.get_type_hints(Recipe)
