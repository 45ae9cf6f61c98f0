"""The training loop of one round: chunks of steps, evaluations between them, the early-stop iteration.

A chunk's end is the safe point for stopping and saving. Early stopping is found in retrospect: a round always
trains to the end, and its early-stop iteration is the first one with the lowest validation loss
(Frankle & Carbin 2019, section 2), with the test accuracy at that very iteration. Only with ``prune.early_bird``
may a round end at an epoch's end, when its mask stands still.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastlth.errors import DivergedError
from fastlth.recipe import Recipe
from fastlth.training.early_bird import EarlyBird, MaskDrawn
from fastlth.training.engines.base import Engine
from fastlth.training.evaluate import Scores
from fastlth.training.schedule import lr_at, next_evaluation

CHUNK_SECONDS = 0.5  # half of the second within which a stop should be answered; costs one host read


@dataclass
class Progress:
    """How far a round has come: what a resume needs beside the engine's tensors. Plain JSON values."""

    iteration: int
    images: int = 0
    training_seconds: float = 0.0
    seconds: float = 0.0
    early_stop_iteration: int | None = None
    early_stop_validation_loss: float | None = None
    early_stop_validation_accuracy: float | None = None
    early_stop_test_accuracy: float | None = None
    test_accuracy: float | None = None
    """at the last evaluation that read the test set"""
    mask_stands: bool = False
    """an early bird has ended the round at ``iteration``"""

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the saved state."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Progress:
        """The inverse."""
        return Progress(**values)


@dataclass(frozen=True)
class Evaluated:
    """An evaluation. ``train`` is over the interval's steps as they were made, augmented and in training mode."""

    iteration: int
    learning_rate: float
    train: Scores
    validation: Scores
    test: Scores | None
    images_per_second: float


@dataclass(frozen=True)
class ChunkDone:
    """A safe point: everything up to ``iteration`` is done, and its evaluation too if one falls there."""

    iteration: int


def train(
    engine: Engine, recipe: Recipe, progress: Progress, *, pause_at: int = 0, bird: EarlyBird | None = None
) -> Iterator[Evaluated | MaskDrawn | ChunkDone]:
    """Train from ``progress.iteration`` to the recipe's last iteration; ``progress`` is kept up to date.

    A chunk ends at ``pause_at``; ``bird`` looks at every epoch's end, and may end the round. Raises DivergedError at
    the first loss that is not finite.
    """
    every, last = recipe.evaluate.every, recipe.train.iterations
    seconds_per_step = CHUNK_SECONDS
    while progress.iteration < last and not progress.mask_stands:
        begin, started = progress.iteration, time.perf_counter()
        evaluation = next_evaluation(begin, every, last)
        end = min(evaluation, begin + max(1, int(CHUNK_SECONDS / seconds_per_step)))
        if begin < pause_at < end:
            end = pause_at
        if bird is not None:
            end = min(end, next_evaluation(begin, bird.every, last))
        chunk = engine.run(begin, end)
        taken = time.perf_counter() - started if chunk.seconds is None else chunk.seconds
        seconds_per_step = taken / (end - begin)
        progress.iteration = end
        progress.images += chunk.images
        progress.training_seconds += taken
        if chunk.first_bad is not None:
            raise DivergedError(f"the loss became NaN or infinite at iteration {chunk.first_bad}; "
                                f"try a lower --lr than {recipe.train.lr:g}, or a longer schedule.warmup")  # fmt: skip
        events: list[Evaluated | MaskDrawn] = []
        if bird is not None and end % bird.every == 0:
            events.append(drawn := bird.look(end, engine.weights()))
            progress.mask_stands = drawn.found
        if end == evaluation or progress.mask_stands:
            events.append(_evaluate(engine, recipe, progress, chunk.images / taken))
        progress.seconds += time.perf_counter() - started
        yield from events
        yield ChunkDone(end)


def _evaluate(engine: Engine, recipe: Recipe, progress: Progress, images_per_second: float) -> Evaluated:
    iteration = progress.iteration
    validation = engine.evaluate("validation")
    lowest = progress.early_stop_validation_loss
    minimum = lowest is None or validation.loss < lowest
    test = None
    ends = iteration == recipe.train.iterations or progress.mask_stands
    if minimum or recipe.evaluate.test == "always" or ends:
        test = engine.evaluate("test")
        progress.test_accuracy = test.accuracy
    if minimum and test is not None:
        progress.early_stop_iteration = iteration
        progress.early_stop_validation_loss = validation.loss
        progress.early_stop_validation_accuracy = validation.accuracy
        progress.early_stop_test_accuracy = test.accuracy
    return Evaluated(
        iteration, lr_at(iteration - 1, recipe.train.lr, recipe.schedule), engine.interval(), validation, test,
        images_per_second,
    )  # fmt: skip
