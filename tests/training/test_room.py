"""How many replicates are trained at a time: the estimate by hand, and what becomes of those that do not fit."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import fastlth
from fastlth.happenings import Beside, Notice
from fastlth.training.engines import fleet as fleets
from fastlth.training.engines import room
from tests.helpers import random_source, small_recipe

SETTINGS = {"compute__engine": "graph", "train__batch_size": 48, "train__iterations": 8, "evaluate__every": 4,
            "prune__rounds": 1}  # fmt: skip


def test_the_estimate_by_hand(monkeypatch):
    recipe, source = small_recipe(train__optimizer="adam"), random_source("digits", train=320, test=64)
    parameters = 64 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10
    each = parameters * (4 + 8 + 4 + 1 / 8) + 8 * (64 + 300 + 300 + 100 + 100 + 10) * 384 + 8 * 384
    shared = 384 * (64 + 8) + 256 * 2**20
    for count in (1, 2, 7, 32):
        enough = (count * each + shared) / room.SHARE
        assert room.fits(recipe, source, int(enough) + 2) == count
        assert room.fits(recipe, source, int(enough) - 2) == max(count - 1, 1)
    assert room.fits(recipe, source, 0) == 1
    narrow = small_recipe(train__optimizer="sgd", compute__precision="bf16")
    assert room.fits(narrow, source, 10**9) > room.fits(recipe, source, 10**9)
    assert room.free("cpu") is None
    conv, maps = small_recipe("conv-2", "digits"), 4 * 64 * 64 + 64 * 16  # two convolutions, two ReLUs, a pool
    each = (64 * 9 + 64 + 64 * 64 * 9 + 64 + 1024 * 256 + 256 + 256 * 256 + 256 + 2570) * (4 + 8 + 4 + 1 / 8)
    each += 8 * (64 + maps + 4 * 256 + 10) * 384 + 8 * 384
    assert room.fits(conv, source, int((3 * each + shared) / room.SHARE) + 2) == 3
    assert room.fits(conv, source, int((3 * each + shared) / room.SHARE) - 2) == 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 10) if device.index == 1 else pytest.fail())
    assert room.free("cuda:1") == 5


@pytest.mark.parametrize(("count", "most", "expected"), [
    (5, 5, [5]), (5, 9, [5]), (5, 4, [2, 3]), (7, 3, [2, 2, 3]), (32, 31, [16, 16]), (3, 1, [1, 1, 1]),
])  # fmt: skip
def test_groups_are_few_and_nearly_equal(count, most, expected):
    found = room.groups([r + 3 for r in range(count)], most)
    assert [len(g) for g in found] == expected and [r for g in found for r in g] == [r + 3 for r in range(count)]


def test_replicates_that_do_not_fit_are_trained_in_groups(tmp_path, monkeypatch):
    """Five of which two fit: 5 is halved to 2 and 3, 3 to 1 and 2. Every one is the search of its seed."""
    recipe, made, living = small_recipe(**SETTINGS), [], weakref.WeakSet()
    inner = fleets.Fleet.__init__

    def small_device(self, some, *rest, **named):
        gc.collect()
        assert not living, "the fleet before still holds its memory"
        if len(some) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        made.append([r.seeds.base for r in some])
        living.add(self)
        inner(self, some, *rest, **named)

    monkeypatch.setattr(fleets.Fleet, "__init__", small_device)
    told, beside = [], set()

    def show(event):  # an event that is kept keeps its engine
        if isinstance(event, Notice):
            told.append(event.text)
        elif isinstance(event, Beside):
            beside.add((event.replicate, event.seed))

    search = fastlth.run(recipe, out=tmp_path / "five", replicates=5, show=show)
    assert made == [[0, 1], [3, 4]]
    assert told == ["cpu has not memory enough for 5 replicates at once: 3 are trained at a time",
                    "cpu has not memory enough for 3 replicates at once: 2 are trained at a time"]  # fmt: skip
    assert beside == {(r, r) for r in (0, 1, 3, 4)}
    assert [r.seed for r in search.replicates] == [0, 1, 2, 3, 4]
    monkeypatch.undo()
    whole = fastlth.run(recipe, out=tmp_path / "whole", replicates=5)
    for ours, theirs in zip(search.replicates, whole.replicates, strict=True):
        for a, b in zip(ours.rounds, theirs.rounds, strict=True):
            assert (a["kept"], a["early_stop_iteration"]) == (b["kept"], b["early_stop_iteration"])
            assert a["early_stop_validation_loss"] == pytest.approx(b["early_stop_validation_loss"], rel=1e-3)


def test_memory_that_is_free_decides_before_anything_is_tried(tmp_path, monkeypatch):
    made = []
    inner = fleets.Fleet.__init__

    def noted(self, some, *rest, **named):
        made.append(len(some))
        inner(self, some, *rest, **named)

    monkeypatch.setattr(fleets.Fleet, "__init__", noted)
    monkeypatch.setattr(room, "free", lambda device: 10**9)
    monkeypatch.setattr(room, "fits", lambda recipe, source, free: 2 if free == 10**9 else pytest.fail())
    fastlth.run(small_recipe(**SETTINGS), out=tmp_path, replicates=4)
    assert made == [2, 2]
