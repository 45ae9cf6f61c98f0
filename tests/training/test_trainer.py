"""The loop of a round, driven with a scripted engine: where it evaluates, what it remembers, when it gives up."""

from __future__ import annotations

import pytest

from fastlth.errors import DivergedError
from fastlth.training.engines.base import Chunk
from fastlth.training.evaluate import Scores
from fastlth.training.trainer import ChunkDone, Evaluated, Progress, train
from tests.helpers import small_recipe


class Script:
    """An engine without a net: its validation losses are given, one per evaluation."""

    def __init__(self, losses=(), bad=None):
        self.losses, self.bad = list(losses), bad
        self.runs, self.evaluations = [], []

    def run(self, first, last):
        self.runs.append((first, last))
        bad = self.bad if self.bad is not None and first <= self.bad < last else None
        return Chunk((last - first) * 32, bad)

    def interval(self):
        return Scores(1.0, 0.5)

    def evaluate(self, split, images=None):
        at = self.runs[-1][1]
        self.evaluations.append((split, at))
        return Scores(self.losses.pop(0), at / 1000) if split == "validation" else Scores(9.0, at / 100)


def play(engine, progress=None, pause_at=0, **settings):
    recipe = small_recipe(**settings)
    progress = progress or Progress(0)
    return progress, list(train(engine, recipe, progress, pause_at=pause_at))


def test_early_stop_is_the_first_minimum_and_its_test_accuracy():
    engine = Script([0.9, 0.5, 0.7, 0.5])
    progress, _ = play(engine)
    assert progress.early_stop_iteration == 20  # the tie at 40 comes later
    assert progress.early_stop_validation_loss == 0.5
    assert progress.early_stop_validation_accuracy == 0.02
    assert progress.early_stop_test_accuracy == 0.2
    assert progress.test_accuracy == 0.4


def test_the_test_set_is_read_only_at_new_minima_and_at_the_end():
    engine = Script([0.9, 0.5, 0.7, 0.6])
    play(engine)
    assert [at for split, at in engine.evaluations if split == "test"] == [10, 20, 40]
    assert [at for split, at in engine.evaluations if split == "validation"] == [10, 20, 30, 40]


def test_the_test_set_can_be_read_always():
    engine = Script([0.9, 0.5, 0.7, 0.6])
    _, events = play(engine, evaluate__test="always")
    assert [e.iteration for e in events if isinstance(e, Evaluated) and e.test] == [10, 20, 30, 40]


def test_the_last_iteration_is_evaluated_off_the_beat():
    engine = Script([0.9, 0.8, 0.7])
    _, events = play(engine, train__iterations=25)
    assert [e.iteration for e in events if isinstance(e, Evaluated)] == [10, 20, 25]


def test_every_step_is_made_once_and_every_chunk_ends_in_a_safe_point():
    engine = Script([1.0] * 4)
    _, events = play(engine)
    assert [first for first, _ in engine.runs] == [0, *[last for _, last in engine.runs][:-1]]
    assert engine.runs[-1][1] == 40
    assert [e.iteration for e in events if isinstance(e, ChunkDone)] == [last for _, last in engine.runs]
    kinds = [type(e) for e in events if e.iteration == 20]
    assert kinds == [Evaluated, ChunkDone]  # the evaluation is inside the safe point, not after it


def test_a_chunk_ends_at_the_rewind_point():
    engine = Script([1.0] * 4)
    play(engine, pause_at=13)
    assert 13 in [last for _, last in engine.runs]


def test_a_rewound_round_goes_from_its_iteration_to_the_end():
    engine = Script([1.0] * 3)
    progress, events = play(engine, Progress(13))
    assert engine.runs[0][0] == 13
    assert [e.iteration for e in events if isinstance(e, Evaluated)] == [20, 30, 40]
    assert progress.images == 27 * 32


def test_a_loss_that_is_not_finite_names_its_iteration():
    with pytest.raises(DivergedError, match=r"iteration 17; try a lower --lr than 0\.001"):
        play(Script([1.0] * 4, bad=17))


def test_progress_survives_json():
    progress, _ = play(Script([0.9, 0.5, 0.7, 0.5]))
    assert Progress.from_json(progress.to_json()) == progress
