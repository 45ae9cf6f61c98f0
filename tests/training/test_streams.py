"""Replicates on streams of one graph: each is the run of its seed, bit for bit; and what a capture of them does."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch

from fastlth.training.engines import capture, streams
from fastlth.training.engines.fleet import Fleet
from fastlth.training.engines.graph import GraphEngine
from fastlth.training.engines.make import make_engine
from fastlth.training.engines.streams import Streams
from tests.helpers import assert_masked, assert_same_bits, half_masks, random_source, small_recipe
from tests.training.test_fleet import copies, recipes, together

NETS = {
    "conv-2 with batch norm": {"model": "conv-2", "model__batch_norm": True, "data__augment": "flip-crop"},
    "resnet-8": {"model": "resnet-8", "data__augment": "flip-crop"},
    "lenet with dropout": {"model__dropout": 0.5},
}


@pytest.mark.parametrize("name", NETS)
def test_a_replicate_is_the_run_of_its_seed_bit_for_bit(name):
    source = random_source("digits")
    some = recipes(3, evaluate__every=12, compute__compact=0.5, **NETS[name])
    engines = [make_engine(r, source) for r in some]
    members = Streams(some, source).members
    for r, (member, engine) in enumerate(zip(members, engines, strict=True)):
        start = {n: t.clone() for n, t in engine.weights().items()}
        masks = half_masks({n: start[n] for n in engine.prunable}, 0.4, seed=r)
        for one in (member, engine):
            one.set_masks(masks)
            one.rewind(start)
    for first, last in ((0, 3), (3, 9)):  # over an epoch's end with its smaller batch
        chunks = together(members, lambda m, first=first, last=last: m.run(first, last))
        assert chunks == [e.run(first, last) for e in engines]
    for r, (member, engine) in enumerate(zip(members, engines, strict=True)):
        assert_same_bits(copies(member), copies(engine))
        assert_masked(member.weights(), half_masks({n: engine.weights()[n] for n in engine.prunable}, 0.4, seed=r))
        for split, images in (("validation", None), ("test", None), ("train", 100)):
            assert member.evaluate(split, images) == engine.evaluate(split, images)
        assert member.interval() == engine.interval()
        assert (member.layers, member.prunable) == (engine.layers, engine.prunable)


def test_states_go_on_and_one_that_leaves_is_not_waited_for():
    source = random_source("digits")
    some = recipes(3, "conv-2", data__augment="flip-crop")
    whole, later = Streams(some, source), Streams(some, source)
    together(whole.members, lambda m: m.run(0, 3))
    for old, new in zip(whole.members, later.members, strict=True):
        new.load_state(copies(old))
    with later.members[1]:
        pass
    left = [whole.members[0], later.members[0], later.members[2]]
    with whole.members[1], whole.members[2]:
        pass
    together(left, lambda m: m.run(3, 5))
    assert_same_bits(copies(left[0]), copies(left[1]))


def test_the_others_go_on_for_whole_rounds_without_one_that_left():
    """It trains along, and nobody empties its record of steps."""
    some = recipes(2, "conv-2", evaluate__every=4)
    source = random_source("digits")
    member, gone = Streams(some, source).members
    alone = make_engine(some[0], source)
    with gone:
        pass
    for engine in (member, alone):
        for first in range(0, 20, 4):
            engine.run(first, first + 4)
            engine.interval()
    assert_same_bits(copies(member), copies(alone))


@pytest.mark.parametrize("kind", [Streams, Fleet])
def test_after_a_step_that_failed_no_other_is_made(monkeypatch, kind):
    """It may have changed some weights: the replicates that come next must not make it again."""
    made, failed = kind(recipes(2), random_source("digits")), []
    inner = GraphEngine.train_step

    def fails_once(engine, size, where=None):
        if len(failed) < 1 and int(engine._at[0]) == 2:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return inner(engine, size, where)

    monkeypatch.setattr(GraphEngine, "train_step", fails_once)

    def run(member):
        with pytest.raises(torch.OutOfMemoryError), member:
            member.run(0, 5)
        return "told"

    assert together(made.members, run) == ["told", "told"]


def test_a_loss_that_is_not_finite_is_its_replicates_alone():
    made = Streams(recipes(2, "conv-2"), random_source("digits"))
    broken = {n: t.clone() for n, t in made.members[1].weights().items()}
    broken["fc1.bias"][0] = float("nan")
    made.members[1].rewind(broken)
    assert [c.first_bad for c in together(made.members, lambda m: m.run(0, 3))] == [None, 0]


def test_who_is_trained_side_by_side():
    assert streams.unsupported(small_recipe("vgg11", "cifar-10")) is None
    assert "early_bird" in str(streams.unsupported(small_recipe(prune__early_bird=0.1, train__batch_size=256)))
    compiled = small_recipe(model__dropout=0.5, compute__compile="on")
    assert "dropout" in str(streams.unsupported(compiled))
    assert "ffcv" in str(streams.unsupported(small_recipe(compute__loader="ffcv")))


class FakeCuda:
    """Streams and graphs that only write down what was asked of them; steps are made at once."""

    def __init__(self, monkeypatch) -> None:
        self.log, self.current, names = [], ["default"], iter("MABCDEFGH")
        cuda = self

        class Stream:
            def __init__(self, device=None, name=None) -> None:
                self.name = name or next(names)

            def wait_stream(self, other) -> None:
                cuda.log.append(f"{self.name} waits for {other.name}")

        class Graph:
            def replay(self) -> None:
                cuda.log.append("replay")

        @contextlib.contextmanager
        def on(stream):
            cuda.current.append(stream.name)
            try:
                yield
            finally:
                cuda.current.pop()

        @contextlib.contextmanager
        def recording(graph, pool, stream):
            cuda.log.append("capture")
            try:
                with on(stream):
                    yield
            finally:
                cuda.log.append("end")

        for name, stand_in in {"Stream": Stream, "CUDAGraph": Graph, "graph": recording, "stream": on,
                               "graph_pool_handle": lambda: "pool", "synchronize": lambda device: None,
                               "current_stream": lambda device: Stream(name="default")}.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)
        inner = GraphEngine.train_step

        def noted(engine, size, where=None):
            cuda.log.append(f"step of {size} on {cuda.current[-1]}")
            return inner(engine, size, where)

        monkeypatch.setattr(GraphEngine, "train_step", noted)


def test_a_capture_forks_into_all_streams_and_joins_and_leaves_no_trace(monkeypatch):
    some = recipes(2, "conv-2", data__augment="flip-crop")
    engines = Streams(some, random_source("digits")).engines
    before = [copies(e) for e in engines]
    cuda = FakeCuda(monkeypatch)
    found = capture.capture(engines)
    assert list(found.steps) == [48, 16] and len(found.evaluations) == 2
    begin = cuda.log.index("capture")
    assert cuda.log[begin : cuda.log.index("end")] == [
        "capture", "A waits for M", "B waits for M", "step of 48 on A", "step of 48 on B", "M waits for A",
        "M waits for B"]  # fmt: skip
    assert cuda.log[:begin] == [
        word for lane in "AB"
        for word in (f"{lane} waits for default", *[f"step of 48 on {lane}"] * capture.WARM_UP,
                     f"default waits for {lane}")]  # fmt: skip
    for engine, state in zip(engines, before, strict=True):
        assert_same_bits(copies(engine), state)
        assert engine.net.training
    cuda.log.clear()
    found.steps[16]()
    assert cuda.log == ["replay"]


def test_nothing_is_collected_during_a_capture_and_its_streams_are_the_nets_own(monkeypatch):
    """A graph that goes during a capture ruins it; one that goes later takes its stream's workspaces along."""
    (engine,) = Streams(recipes(1), random_source("digits")).engines
    FakeCuda(monkeypatch)
    collecting, inner = [], GraphEngine.train_step
    monkeypatch.setattr(GraphEngine, "train_step", lambda *a, **k: collecting.append(gc.isenabled()) or inner(*a, **k))
    capture.capture([engine])
    streams = engine.lane("train"), engine.lane("evaluate")
    capture.capture([engine])
    assert collecting and not any(collecting) and gc.isenabled()
    assert (engine.lane("train"), engine.lane("evaluate")) == streams and streams[0] is not streams[1]
    engine.small = object()
    assert engine.lane("train") not in streams and engine.lane("evaluate") not in streams


def test_where_memory_is_short_in_a_capture_the_streams_come_back_first(monkeypatch):
    """Or the end of the capture would raise something else than what is handled."""
    engines = Streams(recipes(2, "conv-2"), random_source("digits")).engines
    before = [copies(e) for e in engines]
    cuda = FakeCuda(monkeypatch)
    inner = GraphEngine.train_step

    def full(engine, size, where=None):
        if where is not None and cuda.current[-1] == "B":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return inner(engine, size, where)

    monkeypatch.setattr(GraphEngine, "train_step", full)
    with pytest.raises(torch.OutOfMemoryError):
        capture.capture(engines)
    assert cuda.log[-3:] == ["M waits for A", "M waits for B", "end"]
    for engine, state in zip(engines, before, strict=True):
        assert_same_bits(copies(engine), state)


def test_a_capture_of_one_engine_needs_no_second_stream(monkeypatch):
    engine = make_engine(recipes(1, "conv-2")[0], random_source("digits"))
    cuda = FakeCuda(monkeypatch)
    capture.capture([engine])
    begin = cuda.log.index("capture")
    assert cuda.log[begin : cuda.log.index("end")] == ["capture", "step of 48 on M"]
