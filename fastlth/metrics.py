"""What a run records: one flat JSON object per evaluation and per round, the same names everywhere."""

from __future__ import annotations

from typing import Any

from fastlth.search import Event, InRound, RoundFinished
from fastlth.training.early_bird import MaskDrawn
from fastlth.training.trainer import Evaluated

TIMING_FIELDS = ("seconds", "images_per_second")
"""The fields in which two runs of the same resolved recipe may differ; all others are equal bit for bit."""


def record(event: Event) -> dict[str, Any] | None:
    """The line of metrics.jsonl for an event, or None if it leaves none."""
    match event:
        case RoundFinished():
            return {"event": "round", **event.result}
        case InRound(event=Evaluated() as e):
            return {
                "event": "evaluation",
                "round": event.round,
                "iteration": e.iteration,
                "learning_rate": e.learning_rate,
                "train_loss": e.train.loss,
                "train_accuracy": e.train.accuracy,
                "validation_loss": e.validation.loss,
                "validation_accuracy": e.validation.accuracy,
                **({"test_loss": e.test.loss, "test_accuracy": e.test.accuracy} if e.test else {}),
                "images_per_second": e.images_per_second,
            }
        case InRound(event=MaskDrawn() as m):
            return {"event": "early_bird", "round": event.round, "iteration": m.iteration, "epoch": m.epoch,
                    "mask_distance": m.distance, "round_ends": m.found}  # fmt: skip
        case _:
            return None
