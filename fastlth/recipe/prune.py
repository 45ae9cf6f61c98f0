"""Settings of what happens between rounds: which weights go, and what the others start with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from fastlth.catalogue import CRITERIA, MASK_0, MASK_1, UNTRAINED
from fastlth.recipe.checks import check, choice, exact

WINDOW = 5  # an early bird compares an epoch's mask with those of so many before
LAST_ROUND = 254  # pruned_at is one byte: 0 = alive, k = removed in round k, 255 reserved


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneSection:
    rounds: int = 20
    to_density: float | None = None
    """stop at the first round whose density is at or below this"""
    rate: float = 0.2
    """share of the kept weights removed per round"""
    scale: dict[str, float] = field(default_factory=dict)
    """layer pattern -> factor on rate, first match wins (output = 0.5: half the rate; 0: never)"""
    only: tuple[str, ...] | None = None
    """patterns of the layers that may be pruned, such as features.*; all Linear and Conv layers where not given"""
    never: tuple[str, ...] | None = None
    """patterns of layers that are never pruned, whatever ``only`` says"""
    scope: str = "layer"
    """layer (each layer loses its share) or global (one ranking over all)"""
    criterion: str = "large_final"
    """the score by which weights stay, by its name in docs/criteria.md; magnitude is large_final"""
    alpha: float = 1.0
    """weighs w_f against w_i in large_init_large_final and small_init_small_final"""
    formulas: str = "paper"
    """paper or code: which of them a criterion follows where Zhou et al.'s paper and program differ"""
    mask_1: str = "none"
    """what kept weights start a round with (docs/criteria.md); none: their rewind values"""
    mask_0: str = "mask"
    """what pruned weights are kept at (docs/criteria.md); mask: zero"""
    actions: str = "paper"
    """paper: the mask-1 action acts on the rewind values, and pruned weights are frozen at these; code: as in Zhou et
    al.'s program it acts on what the round before started with, and they are frozen at what it made of them"""
    reinit: str = "permute"
    """what the actions named reinit do: permute the layer's own values, or draw others from their distribution"""
    constant: float | None = None
    """size of the weights of the *_constant actions; standard deviation of the layer's rewind values if not given"""
    rewind_to: int = 0
    """the iteration whose weights the survivors return to"""
    early_bird: float = 0.0
    """end a round when the mask it is heading for changes less than this over five epochs (the paper: 0.1); 0: never"""

    def __post_init__(self) -> None:
        if self.criterion == "magnitude":
            object.__setattr__(self, "criterion", "large_final")
        check("prune.rounds", 0 <= self.rounds <= LAST_ROUND, f"be in 0 to {LAST_ROUND}", self.rounds)
        check("prune.to_density", self.to_density is None or 0 < self.to_density < 1,
               "be in (0, 1)", self.to_density)  # fmt: skip
        check("prune.rate", 0 < self.rate < 1, "be in (0, 1), the share removed per round", self.rate)
        for name in ("only", "never"):
            patterns = getattr(self, name)
            object.__setattr__(self, name, tuple(patterns) if patterns else None)
        for pattern, factor in self.scale.items():
            check(f"prune.scale.{pattern}", 0 <= factor < inf and exact(factor) * exact(self.rate) < 1,
                   f"be at least 0 and, times prune.rate {self.rate}, below 1", factor)  # fmt: skip
        choice("prune.scope", self.scope, ("layer", "global"))
        choice("prune.criterion", self.criterion, CRITERIA)
        choice("prune.formulas", self.formulas, ("paper", "code"))
        choice("prune.mask_1", self.mask_1, MASK_1)
        choice("prune.mask_0", self.mask_0, MASK_0)
        choice("prune.actions", self.actions, ("paper", "code"))
        choice("prune.reinit", self.reinit, ("permute", "draw"))
        self._check_zhou()
        check("prune.rewind_to", self.rewind_to >= 0, "be at least 0", self.rewind_to)
        check("prune.early_bird", 0 <= self.early_bird < 1, "be in [0, 1), a share of the kept weights",
               self.early_bird)  # fmt: skip
        check("prune.early_bird", not self.early_bird or self.criterion not in UNTRAINED,
               f"be 0 with criterion {self.criterion}, whose mask stands still from the start since it does not look "
               "at trained weights", self.early_bird)  # fmt: skip

    def _check_zhou(self) -> None:
        both = self.criterion in ("large_init_large_final", "small_init_small_final")
        differs = both or self.criterion in ("magnitude_increase_same_sign", "magnitude_increase_diff_sign")
        check("prune.formulas", self.formulas == "paper" or differs,
               f"be paper with criterion {self.criterion}, of which paper and program say the same",
               self.formulas)  # fmt: skip
        check("prune.scope", self.scope == "layer" or not (both and self.formulas == "code"),
               f"be layer with criterion {self.criterion} and formulas code, which rank each layer alone",
               self.scope)  # fmt: skip
        check("prune.alpha", 0 < self.alpha < inf, "be greater than 0", self.alpha)
        check("prune.alpha", self.alpha == 1.0 or (both and self.formulas == "paper"),
               f"be 1 with criterion {self.criterion}, whose formula has no alpha"
               if not both else "be 1 with formulas code, which compares rankings", self.alpha)  # fmt: skip
        check("prune.actions", self.actions == "paper" or self.mask_1 not in ("none", "mask_init"),
               f"be paper with mask_1 {self.mask_1}, which gives the same a second time", self.actions)  # fmt: skip
        check("prune.reinit", self.reinit == "permute" or "reinit" in self.mask_1 + self.mask_0,
               f"be permute with mask_1 {self.mask_1} and mask_0 {self.mask_0}; only the actions named reinit use it",
               self.reinit)  # fmt: skip
        check("prune.constant", self.constant is None or 0 < self.constant < inf,
               "be greater than 0", self.constant)  # fmt: skip
        check("prune.constant", self.constant is None or "constant" in self.mask_1,
               f"be left out with mask_1 {self.mask_1}; only the actions named constant use it",
               self.constant)  # fmt: skip
        check("prune.mask_0", self.mask_1 != "mask_init" or self.mask_0 == "original",
               "be original with mask_1 mask_init, which trains the pruned weights from zero; "
               "every other action would freeze them", self.mask_0)  # fmt: skip

    def asked(self, densities: Sequence[float]) -> int:
        """How many rounds a search makes, the dense one included, as far as the densities of its first ones tell: up to
        the first at or below ``to_density``, or to the last."""
        target = self.to_density
        reached = (k for k, density in enumerate(densities) if target is not None and density <= target)
        return min(next(reached, self.rounds), self.rounds) + 1

    @property
    def needs_gradients(self) -> bool:
        """Whether the criterion looks at dL/dw."""
        return self.criterion in ("snip", "grad")

    @property
    def rewinds(self) -> bool:
        """Whether every round starts with its rewind values times its mask: no mask-1 and no mask-0 action."""
        return (self.mask_1, self.mask_0) == ("none", "mask")

    @property
    def trains_pruned(self) -> bool:
        """Whether pruned weights are trained like all others."""
        return self.mask_0 == "original"

    @property
    def fills(self) -> bool:
        """Whether pruned weights may be frozen at another value than zero."""
        return self.mask_0 not in ("mask", "original")

    @property
    def zeroes(self) -> bool:
        """Whether the training decides which weights' initial values become zero."""
        return self.mask_0.startswith("freeze_init_zero_")
