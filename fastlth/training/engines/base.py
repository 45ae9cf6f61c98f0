"""What every engine offers. The training loop does not know which one runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, Self

from torch import Tensor

from fastlth.training.engines.in_step import InStep
from fastlth.training.evaluate import Scores

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Chunk:
    """What one chunk of steps did."""

    images: int
    first_bad: int | None
    """the first iteration whose loss was not finite"""
    seconds: float | None = field(default=None, compare=False)
    """what the steps took, where replicates share them: the same number for all of them"""


class Engine(Protocol):
    """Trains one net. Iterations are counted from 0; ``run(0, 1)`` makes the first step."""

    name: str
    weight_names: list[str]
    """the weights of all Linear and Conv layers, in model order"""

    prunable: list[str]
    """those of them that the recipe prunes"""

    said: list[str]
    """what a person should know, a line each; whoever tells them empties it"""

    @property
    def layers(self) -> dict[str, str]:
        """How each layer with weights runs: "dense", or "kept" where only its kept weights are touched."""

    def rewind(self, start: Tensors) -> None:
        """Copy a round's start in place (parameters and buffers) and forget the optimizer's state.

        Pruned weights become +0.0 whatever ``start`` says, and stay there. Only where ``recipe.prune.fills`` do they
        get, and stay bit for bit at, what ``start`` holds for them; an engine that cannot do this is not made for
        such a recipe.
        """

    def set_masks(self, masks: Tensors) -> None:
        """Copy masks in place and put pruned weights to zero (where ``recipe.prune.fills``: at the next rewind)."""

    def run(self, first: int, last: int) -> Chunk:
        """Make the steps first <= i < last. Where a chunk ends changes no bit."""

    def interval(self) -> Scores:
        """Training loss and accuracy over the steps since the last call (or rewind), and begin anew."""

    def evaluate(self, split: str, images: int | None = None) -> Scores:
        """Scores on "train", "validation" or "test", or their first ``images``, unaugmented, in evaluation mode."""

    def weights(self) -> dict[str, Tensor]:
        """The parameters and buffers as they are now; not to be changed, and not to be used after the next step."""

    def state(self) -> dict[str, Tensor]:
        """Everything a resume needs, likewise. Parts that two engines share have the same names in both."""

    def load_state(self, state: Tensors) -> None:
        """The inverse of ``state``, copied in place."""


class Member(Engine, Protocol):
    """The engine of one of several replicates that are trained at once: each by a thread of its own, with the engine
    as its context, whose end tells the others that they need not wait for it."""

    @property
    def in_step(self) -> InStep:
        """What keeps the replicates together."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...
