"""What a control run is: its kind and options, refused where they contradict each other. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from math import inf
from typing import Any

from fastlth.errors import RecipeError, unknown

KINDS = {
    "random-reinit": "the round's mask, values drawn afresh from the initial distribution",
    "random-prune": "as many weights as the round keeps, chosen at random",
    "one-shot": "the dense trained net pruned to the round's density in one step, then reset",
    "finetune": "prune and go on from the trained weights at the last learning rate",
    "lr-rewind": "prune and go on from the trained weights with the whole schedule again",
    "noise": "the round's mask, Gaussian noise on its values: --sigma",
    "continued": "masks found without ever resetting, reset once at the end",
    "prune-at-init": "masks chosen before training: --method",
}

METHODS = ("snip", "grasp", "synflow", "magnitude", "random", "even", "erk")
"""of pruning at initialisation; the last three are random masks and need no scores"""

# option -> the kinds that take it
_TAKES = {
    "density": ("random-prune", "one-shot", "finetune", "lr-rewind", "prune-at-init"),
    "strategy": ("random-prune",),
    "reinit": ("random-prune", "one-shot"),
    "iterations": ("finetune", "lr-rewind"),
    "method": ("prune-at-init",),
    "scope": ("prune-at-init",),
    "images": ("prune-at-init",),
    "sigma": ("noise",),
}

DRAWN = ("random-reinit", "random-prune", "noise")
PAPER_TRIALS = 3  # fresh draws per mask (Frankle & Carbin 2019, section 2)


@dataclass(frozen=True, kw_only=True)
class Control:
    """The kind and options of a branch. Raises RecipeError where they do not go together."""

    kind: str
    density: float | None = None
    """prune to this share of all weights in one step, in place of a round's"""
    strategy: str | None = None
    """random-prune: layer (each layer keeps what it keeps in the round), global, even or erk; layer if not given"""
    reinit: bool = False
    """values drawn afresh, in place of the rewind values"""
    iterations: int | None = None
    """finetune: steps at the last learning rate; lr-rewind: the last steps of the schedule. All of them if not given"""
    method: str | None = None
    """prune-at-init: one of ``METHODS``"""
    scope: str | None = None
    """prune-at-init by scores: global (if not given) or layer"""
    images: int | None = None
    """snip and grasp: training images the scores are taken over; ten per class if not given"""
    sigma: float | None = None
    """noise: its standard deviation, in standard deviations of the layer's initial distribution"""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RecipeError(unknown("kind of branch", self.kind, KINDS))
        for option, kinds in _TAKES.items():
            if _given(getattr(self, option)) and self.kind not in kinds:
                raise RecipeError(f"--{option} goes with {', '.join(kinds)}, not with {self.kind}; leave it out")
        if self.strategy not in (None, "layer", "global", "even", "erk"):
            raise RecipeError(unknown("strategy", self.strategy, ("layer", "global", "even", "erk")))
        if self.density is not None and not 0 < self.density < 1:
            raise RecipeError(f"--density must be in (0, 1), a share of all weights, got {self.density:g}")
        if self.iterations is not None and self.iterations < 1:
            raise RecipeError(f"--iterations must be at least 1, got {self.iterations}")
        if self.kind == "noise" and (self.sigma is None or not 0 < self.sigma < inf):
            given = "" if self.sigma is None else f", got {self.sigma}"
            raise RecipeError(f"noise needs --sigma, a number greater than 0 such as 0.5{given}")
        if self.kind == "prune-at-init":
            self._check_at_init()

    def _check_at_init(self) -> None:
        if self.method is None:
            raise RecipeError(f"prune-at-init needs --method: {', '.join(METHODS)}")
        if self.method not in METHODS:
            raise RecipeError(unknown("--method of prune-at-init", self.method, METHODS))
        if self.scope not in (None, "global", "layer"):
            raise RecipeError(unknown("scope", self.scope, ("global", "layer")))
        if self.scope and self.method in ("random", "even", "erk"):
            raise RecipeError(f"--scope ranks scores and method {self.method} has none; leave it out")
        if self.images is not None and self.method not in ("snip", "grasp"):
            raise RecipeError(f"--images goes with snip and grasp; method {self.method} looks at no image")
        if self.images is not None and self.images < 1:
            raise RecipeError(f"--images must be at least 1, got {self.images}")

    @property
    def draws(self) -> bool:
        """Whether anything is drawn at random, so that several trials differ."""
        return self.kind in DRAWN or self.reinit or self.method in ("random", "even", "erk")

    @property
    def from_start(self) -> bool:
        """Whether every training begins with iteration 0, wherever the search rewinds to."""
        return self.kind in ("random-reinit", "prune-at-init") or self.reinit

    @property
    def chains(self) -> bool:
        """Whether round k begins where the branch's own round k - 1 ended."""
        return self.kind in ("finetune", "lr-rewind") and self.density is None

    def trials(self, asked: int | None) -> int:
        """How many trainings per round. Raises RecipeError if more are asked for of what draws nothing."""
        if asked is None:
            return PAPER_TRIALS if self.draws else 1
        if asked < 1 or (asked > 1 and not self.draws):
            why = "must be at least 1" if asked < 1 else f"must be 1: {self.kind} draws nothing, so all would be equal"
            raise RecipeError(f"--trials {why}, got {asked}")
        return asked

    def options(self) -> dict[str, Any]:
        """What was asked for, without what was left out."""
        return {k: v for k, v in asdict(self).items() if _given(v)}

    def digest(self, recipe_digest: str) -> str:
        """sha256 (hex) over kind, options and the recipe's digest: a new option moves no old digest."""
        defaults = {f.name: f.default for f in fields(self) if f.name != "kind"}
        asked = {k: v for k, v in self.options().items() if v != defaults.get(k)}
        text = json.dumps({**asked, "recipe": recipe_digest}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _given(value: object) -> bool:
    return value is not None and value is not False  # 0 is given, and equal to False
