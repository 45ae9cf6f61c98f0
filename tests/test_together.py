"""How replicates are trained at once: what is chosen, that it is kept, and that each is the run of its seed."""

from __future__ import annotations

import dataclasses
import threading
import tomllib
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastlth
from fastlth import search, side_by_side, together
from fastlth.errors import EnvironmentFailure, RecipeError
from fastlth.happenings import Notice
from fastlth.saving import Saver
from fastlth.store.run import Run
from fastlth.training.engines import room
from fastlth.training.engines.fleet import Fleet
from fastlth.training.engines.graph import GraphEngine
from fastlth.training.engines.streams import Streams
from tests.helpers import assert_same_bits, compute, random_source, small_recipe

SHORT = {"compute__engine": "graph", "train__batch_size": 48, "train__iterations": 8, "evaluate__every": 4,
         "prune__rounds": 1}  # fmt: skip
TIMING = ("seconds", "images_per_second")


@pytest.fixture
def made(monkeypatch) -> list[tuple[str, int]]:
    """What is made of several replicates, and of how many."""
    found: list[tuple[str, int]] = []
    for kind in (Fleet, Streams):
        inner = kind.__init__

        def noted(self, some, *rest, inner=inner, **named):
            found.append((type(self).__name__, len(some)))
            inner(self, some, *rest, **named)

        monkeypatch.setattr(kind, "__init__", noted)
    return found


def results(search):
    return [{k: v for k, v in r.items() if k not in TIMING} for r in search.rounds]


def resolved(search):
    return [tomllib.loads((r.path / "recipe.toml").read_text())["resolved"]["together"] for r in search.replicates]


def test_streams_find_the_tickets_of_single_runs_bit_for_bit(tmp_path, made):
    recipe = small_recipe("conv-2", "digits", **SHORT, model__batch_norm=True, data__augment="flip-crop",
                          compute__together="streams")  # fmt: skip
    search = fastlth.run(recipe, out=tmp_path / "together", replicates=3)
    assert made == [("Streams", 3)] and resolved(search) == ["streams"] * 3
    for r, replicate in enumerate(search.replicates):
        one = dataclasses.replace(recipe, seeds=dataclasses.replace(recipe.seeds, base=r))
        single = fastlth.run(one, out=tmp_path / "alone")
        ours, theirs = (fastlth.load_ticket(s.ticket).file for s in (replicate, single))
        for part in ("rewind", "pruned_at"):
            assert_same_bits(*({n: torch.from_numpy(a) for n, a in getattr(t, part).items()} for t in (ours, theirs)))
        assert results(single) == [{k: v for k, v in row.items() if k not in TIMING} for row in replicate.rounds]
    assert len(made) == 1


@pytest.mark.parametrize(("way", "kind"), [("streams", "Streams"), ("batched", "Fleet")])
def test_a_stopped_search_goes_on_together_as_if_never_stopped(tmp_path, made, way, kind):
    """All stop at the same step, so that all go on at once."""
    recipe = small_recipe(**SHORT, compute__together=way)
    whole, asked = fastlth.run(recipe, out=tmp_path / "whole", replicates=2), []

    def stop():
        asked.append(1)
        return 15 if len(asked) > 2 else None

    with pytest.raises(fastlth.errors.Stopped):
        fastlth.run(recipe, out=tmp_path / "cut", replicates=2, stopped=stop)
    assert results(fastlth.run(recipe, out=tmp_path / "cut", replicates=2)) == results(whole)
    assert made == [(kind, 2)] * 3


@pytest.mark.parametrize(("model", "settings", "expected"), [
    ("lenet-300-100", {}, [("Fleet", 2)]), ("conv-2", {}, [("Fleet", 2)]),
    ("conv-2", {"model__batch_norm": True}, []),  # on a CPU streams gain nothing
    ("lenet-300-100", {"compute__together": "alone"}, []),
    ("lenet-300-100", {"compute__together": "streams"}, [("Streams", 2)]),
])  # fmt: skip
def test_what_a_cpu_does(tmp_path, made, model, settings, expected):
    search = fastlth.run(small_recipe(model, "digits", **SHORT, **settings), out=tmp_path, replicates=2)
    assert made == expected and len(search.replicates) == 2


def test_what_a_gpu_measures_is_chosen_and_kept(tmp_path, made, monkeypatch):
    """The clock says what each way takes; a GPU is where one is believed to be."""
    rates = {"alone": 100.0, "batched": 150.0, "streams": 160.0}
    tried = []

    def measured(recipes, source, ways, clock=None):
        tried.append((len(recipes), list(ways)))
        return {way: rates[way] for way in ("alone", *ways)}

    monkeypatch.setattr(together, "measured", measured)
    monkeypatch.setattr(together, "_on_cuda", lambda where: True)
    recipe = small_recipe("conv-2", "digits", **SHORT)
    search = fastlth.run(recipe, out=tmp_path / "a", replicates=5)
    assert tried == [(together.PROBE, ["batched", "streams"])]
    assert made == [("Streams", 5)] and resolved(search) == ["streams"] * 5
    rates["streams"] = 0.0
    more = dataclasses.replace(recipe, prune=dataclasses.replace(recipe.prune, rounds=2))
    assert resolved(fastlth.run(more, out=tmp_path / "a", replicates=5)) == ["streams"] * 5  # kept
    assert len(tried) == 1 and made == [("Streams", 5)] * 2
    rates["batched"] = 100.0 * together.GAIN  # not above it
    assert resolved(fastlth.run(recipe, out=tmp_path / "b", replicates=2)) == ["alone"] * 2
    assert len(tried) == 2 and len(made) == 2


def test_measuring_by_a_clock(monkeypatch):
    """A step of two nets at once takes as long as said, and who finds no memory is left out."""
    now, seconds = [0.0], {GraphEngine: 1.0, Fleet: 1.5, Streams: 4.0}
    for kind, each in seconds.items():
        monkeypatch.setattr(kind, "advance", lambda self, first, last, each=each: now.__setitem__(
            0, now[0] + each * (last - first)))  # fmt: skip
    some = [small_recipe(**SHORT), small_recipe(**SHORT, seeds__base=1)]
    found = together.measured(some, random_source("digits"), ["batched", "streams"], lambda: now[0])
    assert found == pytest.approx({"alone": 48.0, "batched": 64.0, "streams": 24.0})

    def full(self, *_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Fleet, "__init__", full)
    found = together.measured(some, random_source("digits"), ["batched", "streams"], lambda: now[0])
    assert found == pytest.approx({"alone": 48.0, "streams": 24.0})


def test_how_many_streams_memory_holds(tmp_path, made, monkeypatch):
    """One takes 300 of 1,000 bytes, of which 800 may be used: two at a time; of plenty no more than STREAMS."""
    recipe = small_recipe("conv-2", "digits", **SHORT, compute__together="streams")
    frees = iter([1000, 700])
    monkeypatch.setattr(room, "free", lambda device: next(frees))
    fastlth.run(recipe, out=tmp_path / "two", replicates=4)
    assert made == [("Streams", 2)] * 2
    monkeypatch.setattr(room, "free", lambda device: 10**9)
    monkeypatch.setattr(together, "STREAMS", 3)
    made.clear()
    fastlth.run(recipe, out=tmp_path / "three", replicates=4)
    assert made == [("Streams", 2)] * 2
    monkeypatch.undo()


def test_all_of_them_save_at_the_same_steps(tmp_path, monkeypatch):
    """Also where the clocks of their savers differ: here one is due every time, one never."""
    places, inner = [], Saver.state

    def noted(self, event):
        places.append((event.round, event.event.iteration))
        inner(self, event)

    monkeypatch.setattr(Saver, "state", noted)
    monkeypatch.setattr(Saver, "due", lambda self: self._directory.recipe.seeds.base == 0)
    fastlth.run(small_recipe(**SHORT), out=tmp_path, replicates=2)
    assert len(places) % 2 == 0 and all(places.count(p) == 2 for p in places)


def test_no_memory_for_all_of_them_halves_the_group(tmp_path, monkeypatch):
    inner, told, sizes = Streams.__init__, [], []

    def small_device(self, some, *rest, **named):
        if len(some) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sizes.append(len(some))
        inner(self, some, *rest, **named)

    monkeypatch.setattr(Streams, "__init__", small_device)
    recipe = small_recipe("conv-2", "digits", **SHORT, compute__together="streams")
    fastlth.run(recipe, out=tmp_path, replicates=4,
                show=lambda e: told.append(e.text) if isinstance(e, Notice) else None)  # fmt: skip
    assert sizes == [2, 2]
    assert told == ["cpu has not memory enough for 4 replicates at once: 2 are trained at a time"]


@pytest.mark.parametrize(("model", "settings", "reason"), [
    ("conv-2", {"compute__together": "batched", "model__batch_norm": True}, "compute.together batched cannot train "
     "this: conv-2 is not a stack of convolutions, max pooling, ReLU and fully connected layers; use auto or alone"),
    ("lenet-300-100", {"compute__together": "streams", "prune__early_bird": 0.1, "train__batch_size": 1000},
     "compute.together streams cannot train this: prune.early_bird ends the rounds of replicates at different times; "
     "use auto or alone"),
    ("lenet-300-100", {"compute__together": "batched", "compute__engine": "dense"}, "compute.together batched is the "
     "graph engine's, got --engine dense on cpu; use --engine graph or compute.together auto"),
    ("lenet-300-100", {"compute__together": "streams", "compute__engine": "auto"}, "got --engine auto on cpu"),
])  # fmt: skip
def test_what_cannot_be_is_refused_with_the_reason(tmp_path, model, settings, reason):
    with pytest.raises(RecipeError, match=reason.replace(".", r"\.").replace("(", r"\(")):
        fastlth.run(small_recipe(model, "digits", **{**SHORT, **settings}), out=tmp_path, replicates=2)
    assert not list(tmp_path.iterdir())


def test_a_word_that_is_none_of_them():
    with pytest.raises(
        RecipeError, match=r"unknown compute\.together 'both'; choose one of: auto, alone, batched, streams"
    ):
        compute(small_recipe(), together="both")


def _edit_resolved(search, **changes):
    for replicate in search.replicates:
        with Run.reopen(replicate.path) as run:
            run.write_recipe(run.recipe, {**run.resolved, **changes})


def _all_resolved(search):
    found = [tomllib.loads((r.path / "recipe.toml").read_text())["resolved"] for r in search.replicates]
    return [{k: v for k, v in one.items() if k not in ("images_per_second", "moved")} for one in found]


def test_a_seed_that_was_run_before_settles_the_others(tmp_path, made):
    recipe = small_recipe(**SHORT, compute__threads=0)
    _edit_resolved(fastlth.run(recipe, out=tmp_path), threads=7)
    search = fastlth.run(recipe, out=tmp_path, replicates=3)
    assert made == [("Fleet", 2)]
    first, *others = _all_resolved(search)
    assert first == {**others[0], "together": "auto"} and others[0] == others[1]
    assert others[0]["threads"] == 7 and others[0]["together"] == "batched"


def test_those_that_were_resolved_otherwise_are_not_trained_with_the_others(tmp_path, made):
    recipe = small_recipe(**SHORT, compute__precision="auto")
    short = dataclasses.replace(recipe, prune=dataclasses.replace(recipe.prune, rounds=0))
    _edit_resolved(fastlth.run(short, out=tmp_path, replicates=3), precision="fp32")
    second = fastlth.run(short, out=tmp_path, replicates=3).replicates[1]
    with Run.reopen(second.path) as run:
        run.write_recipe(run.recipe, {**run.resolved, "precision": "bf16"})
    made.clear()
    search = fastlth.run(recipe, out=tmp_path, replicates=3)
    assert made == [("Fleet", 2)]
    assert [one["precision"] for one in _all_resolved(search)] == ["fp32", "bf16", "fp32"]


def test_of_the_last_group_nothing_is_left_when_one_is_trained_alone(tmp_path, monkeypatch):
    """Five replicates of which two fit: 0 and 1, 3 and 4, then 2."""
    living, alone = weakref.WeakSet(), []
    inner, single = Streams.__init__, search.make_engine

    def small_device(self, some, *rest, **named):
        if len(some) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        living.add(self)
        inner(self, some, *rest, **named)

    def noted(*arguments):
        alone.append(len(living))
        return single(*arguments)

    monkeypatch.setattr(Streams, "__init__", small_device)
    monkeypatch.setattr(search, "make_engine", noted)
    fastlth.run(small_recipe("conv-2", "digits", **SHORT, compute__together="streams"), out=tmp_path, replicates=5)
    assert alone == [0]


def test_a_gpu_that_is_lost_while_replicates_are_grouped_is_one_line(tmp_path, monkeypatch):
    def lost(*_, **__):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(Fleet, "__init__", lost)
    with pytest.raises(EnvironmentFailure, match=r"cpu is lost: CUDA error.*; start the same command again"):
        fastlth.run(small_recipe(**SHORT), out=tmp_path, replicates=2)


def test_a_way_is_timed_alone_on_the_device(monkeypatch):
    living = weakref.WeakSet()
    for kind in (Fleet, Streams):
        inner = kind.__init__

        def noted(self, *rest, inner=inner, **named):
            assert not living, "the way before still holds its memory"
            living.add(self)
            inner(self, *rest, **named)

        monkeypatch.setattr(kind, "__init__", noted)
    some = [small_recipe(**SHORT), small_recipe(**SHORT, seeds__base=1)]
    assert set(together.measured(some, random_source("digits"), ["batched", "streams"])) == {
        "alone", "batched", "streams"}  # fmt: skip


def test_who_asks_for_a_way_and_gets_another_engine_is_told(tmp_path, made, monkeypatch):
    """On CUDA ``auto`` may find the dense engine faster."""
    recipe = small_recipe(**SHORT, compute__together="streams")
    _edit_resolved(fastlth.run(dataclasses.replace(recipe, prune=dataclasses.replace(recipe.prune, rounds=0)),
                               out=tmp_path, replicates=2), engine="dense")  # fmt: skip
    made.clear()
    told = []
    fastlth.run(recipe, out=tmp_path, replicates=2, show=lambda e: told.append(e.text) if isinstance(e, Notice) else 0)
    assert not made
    assert told == ["compute.together streams is the graph engine's, and the dense engine is faster here: replicates "
                    "train one after the other; --engine graph insists"]  # fmt: skip


def test_who_never_begins_is_not_waited_for():
    """A task that fails before all others have begun: those that have would wait for the rest."""
    gone = [threading.Event() for _ in range(3)]

    def fails(hand_on, failed):
        raise RuntimeError("no such file")

    def waits(hand_on, failed):
        assert gone[2].wait(20), "nobody said that the last one never begins"
        return "done"

    tasks = [fails, waits, waits]
    slow = threading.Event()

    class Pool(ThreadPoolExecutor):
        def submit(self, call, *arguments):
            future = super().submit(call, *arguments)
            slow.wait(0.2)  # the first has failed by the time the third would begin
            return future

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_by_side, "ThreadPoolExecutor", Pool)
        with pytest.raises(RuntimeError, match="no such file"):
            side_by_side.side_by_side(tasks, workers=3, show=lambda *_: None, left_out=lambda i: gone[i].set())
    assert gone[2].is_set() and not gone[0].is_set()
