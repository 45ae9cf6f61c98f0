"""Settings of one training: steps, learning rate, evaluations, seeds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import inf

from fastlth.recipe.checks import check, choice

# Philox key word 1; never renumber
STREAMS = {"init": 1, "split": 2, "order": 3, "augment": 4, "prune": 5, "dropout": 6, "branch": 7}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSection:
    iterations: int
    batch_size: int
    lr: float
    optimizer: str = "adam"
    """adam, adamw or sgd"""
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    """added to the gradient (adam, sgd) or decoupled (adamw)"""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    drop_last: bool = True
    """leave out the last, smaller batch of an epoch"""

    def __post_init__(self) -> None:
        check("train.iterations", self.iterations >= 1, "be at least 1", self.iterations)
        check("train.batch_size", self.batch_size >= 1, "be at least 1", self.batch_size)
        check("train.lr", 0 < self.lr < inf, "be a finite number greater than 0", self.lr)
        choice("train.optimizer", self.optimizer, ("adam", "adamw", "sgd"))
        check("train.momentum", 0 <= self.momentum < 1, "be in [0, 1)", self.momentum)
        check("train.momentum", self.momentum == 0 or self.optimizer == "sgd",
               f"be 0 with optimizer {self.optimizer}, which has betas (--momentum 0, or --set train.momentum=0)",
               self.momentum)  # fmt: skip
        check("train.nesterov", not self.nesterov or self.momentum > 0,
               "be false without train.momentum", self.nesterov)  # fmt: skip
        check("train.weight_decay", 0 <= self.weight_decay < inf,
               "be at least 0", self.weight_decay)  # fmt: skip
        check("train.betas", all(0 <= b < 1 for b in self.betas), "be in [0, 1)", self.betas)
        check("train.eps", 0 < self.eps < 1, "be in (0, 1)", self.eps)
        for name, value, default in (("betas", tuple(self.betas), (0.9, 0.999)), ("eps", self.eps, 1e-8)):
            check(f"train.{name}", value == default or self.optimizer != "sgd",
                   f"be left at {default} with optimizer sgd, which has momentum", value)  # fmt: skip

    def iterations_per_epoch(self, images: int) -> int:
        """Batches in one pass over ``images`` training images."""
        full, rest = divmod(images, self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleSection:
    warmup: int = 0
    """iterations over which the learning rate rises linearly from 0: lr(i) = lr * i / warmup"""
    milestones: tuple[int, ...] = ()
    """iterations at which the learning rate is multiplied by gamma"""
    gamma: float = 0.1
    scale: bool = True
    """scale warm-up and milestones of a preset with --iterations"""

    def __post_init__(self) -> None:
        check("schedule.warmup", self.warmup >= 0, "be at least 0", self.warmup)
        check("schedule.milestones",
               list(self.milestones) == sorted(set(self.milestones)) and min((1, *self.milestones)) > 0,
               "be increasing and positive", list(self.milestones))  # fmt: skip
        check("schedule.gamma", 0 < self.gamma <= 1, "be in (0, 1]", self.gamma)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateSection:
    every: int = 100
    """iterations between evaluations (and always one at the last iteration)"""
    test: str = "minimum"
    """when the test set is read: at a new minimum of the validation loss, or always"""

    def __post_init__(self) -> None:
        check("evaluate.every", self.every >= 1, "be at least 1", self.every)
        choice("evaluate.test", self.test, ("minimum", "always"))


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedsSection:
    base: int = 0
    """--seed: every stream below derives from it unless set singly"""
    init: int | None = None
    split: int | None = None
    order: int | None = None
    augment: int | None = None
    prune: int | None = None
    dropout: int | None = None
    branch: int | None = None
    """fresh initial values and random masks of control runs"""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            check(f"seeds.{f.name}", value is None or 0 <= value < 2**32, "be in 0 to 2**32 - 1", value)

    def key(self, stream: str) -> tuple[int, int]:
        """The Philox key of one stream of ``STREAMS``: (its seed, its number)."""
        own = getattr(self, stream)
        return (self.base if own is None else int(own), STREAMS[stream])
