"""Replicates side by side: each is the search of its seed alone; stopped together, they go on together."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest

from fastlth import running, together
from fastlth.errors import Stopped
from fastlth.happenings import Beside
from fastlth.metrics import TIMING_FIELDS
from fastlth.store import ticket as tickets
from fastlth.training import resolve
from tests.helpers import small_recipe


def recipe(**settings):
    given = {"compute__engine": "sparse", "compute__break_even": 0.5, "compute__threads": 1, **settings}
    return small_recipe("lenet-300-100", "digits", **given)


def lines(path):
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMING_FIELDS} for record in records]


def test_each_replicate_equals_its_single_run(tmp_path, monkeypatch):
    monkeypatch.setattr(together, "cores", lambda: 2)
    shown = []
    search = running.run(recipe(), out=tmp_path / "all", replicates=3, show=shown.append)
    assert all(isinstance(event, Beside) for event in shown)
    assert {event.seed for event in shown} == {0, 1, 2}
    for seed, replicate in enumerate(search.replicates):
        alone = running.run(recipe(seeds__base=seed), out=tmp_path / "one").replicates[0]
        assert replicate.seed == seed
        assert lines(replicate.path) == lines(alone.path)
        ours, theirs = tickets.load(replicate.ticket), tickets.load(alone.ticket)
        for name, at in theirs.pruned_at.items():
            assert np.array_equal(ours.pruned_at[name], at)
        for name, value in theirs.rewind.items():
            assert np.array_equal(ours.rewind[name], value)


def test_stopped_together_they_go_on_to_the_same_end(tmp_path, monkeypatch):
    monkeypatch.setattr(together, "cores", lambda: 2)
    whole = running.run(recipe(), out=tmp_path / "whole", replicates=3)
    asked = 0

    def stopped():
        nonlocal asked
        asked += 1
        return signal.SIGTERM if asked > 9 else None

    for _ in range(30):
        asked = 0
        try:
            search = running.run(recipe(), out=tmp_path / "parts", replicates=3, stopped=stopped)
            break
        except Stopped as error:
            assert error.exit_code == 143
    else:
        pytest.fail("never came to the end")
    for ours, theirs in zip(search.replicates, whole.replicates, strict=True):
        assert lines(ours.path) == lines(theirs.path)


def test_what_auto_becomes_is_settled_once_with_one_thread_each(tmp_path, monkeypatch):
    monkeypatch.setattr(together, "cores", lambda: 2)
    asked = []
    real = resolve.resolve

    def settle(recipe, make):
        asked.append(recipe.compute.threads)
        return real(recipe, make)

    monkeypatch.setattr(together, "resolve", settle)
    search = running.run(recipe(compute__threads=0), out=tmp_path, replicates=2)
    assert asked == [1]
    for replicate in search.replicates:
        assert "threads = 1" in (replicate.path / "recipe.toml").read_text().split("[resolved]")[1]


def test_the_dense_engine_runs_them_one_after_the_other(tmp_path):
    shown = []
    running.run(recipe(compute__engine="dense"), out=tmp_path, replicates=2, show=shown.append)
    assert not any(isinstance(event, Beside) for event in shown)
