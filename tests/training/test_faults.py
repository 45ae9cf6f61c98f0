"""A GPU that is full or gone, played by errors that are raised where a GPU would raise them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fastlth
from fastlth.errors import EnvironmentFailure
from fastlth.happenings import Notice
from fastlth.search import RoundFinished
from fastlth.training import faults
from fastlth.training.engines import capture
from fastlth.training.engines.dense import DenseEngine
from fastlth.training.engines.graph import GraphEngine
from fastlth.training.engines.make import make_engine
from tests.helpers import assert_same_bits, compute, random_source, small_recipe

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 10 GiB\nmore lines"
GONE = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"


@pytest.mark.parametrize(("error", "says"), [
    (torch.OutOfMemoryError(FULL), "out of memory: Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 10 GiB"),
    (torch.AcceleratorError(GONE), "lost: CUDA error: an illegal memory access was encountered"),
    (torch.AcceleratorError("unspecified launch failure"), "lost: unspecified launch failure"),
    (torch.AcceleratorError("CUDA error: out of memory"), "out of memory: CUDA error: out of memory"),
    (torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing"), None),
    (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "lost: cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "lost: Triton Error [CUDA]: device kernel"),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    (ValueError("CUDA error: no"), None),
    (RuntimeError(), None),
])  # fmt: skip
def test_what_counts_as_the_devices_fault(error, says):
    found = faults.reason(error)
    assert found is None if says is None else found is not None and found.startswith(says)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="a bug") as seen, faults.told("cuda:0", lambda: "go on"):
        raise RuntimeError("a bug")
    assert not isinstance(seen.value, EnvironmentFailure)


class Fails:
    """``DenseEngine.run``, but call number ``at`` raises."""

    def __init__(self, at: int, error: Exception) -> None:
        self.at, self.error, self.calls, self.inner = at, error, 0, DenseEngine.run

    def __call__(self, engine, first, last):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.inner(engine, first, last)


def recipe_of():
    return small_recipe(evaluate__every=5)


def ticket_bits(search):
    ticket = fastlth.load_ticket(search.ticket).file
    return {**ticket.rewind, **ticket.pruned_at}, [{k: v for k, v in r.items() if k not in ("seconds",
                                                   "images_per_second")} for r in ticket.rounds]  # fmt: skip


@pytest.mark.parametrize("error", [torch.AcceleratorError(GONE), torch.OutOfMemoryError(FULL)])
def test_a_lost_gpu_ends_in_exit_code_6_with_what_was_saved(tmp_path, monkeypatch, error):
    whole = fastlth.run(recipe_of(), out=tmp_path / "whole")
    monkeypatch.setattr("fastlth.saving.Saver.due", lambda _: True)
    fails = Fails(13, error)
    monkeypatch.setattr(DenseEngine, "run", lambda *a: fails(*a))
    with pytest.raises(EnvironmentFailure) as seen:
        fastlth.run(recipe_of(), out=tmp_path / "cut")
    said = str(seen.value)
    assert "\n" not in said and seen.value.exit_code == 6 and "fastlth resume" in said
    assert ("lost: CUDA error" in said) == isinstance(error, torch.AcceleratorError)
    assert ("--batch-size" in said) == isinstance(error, torch.OutOfMemoryError)
    (run,) = (tmp_path / "cut").glob("*/r0")
    assert (run / "search.ticket").exists() and (run / "state.safetensors").exists()  # in round 1
    calls = fails.calls
    again = fastlth.run(recipe_of(), out=tmp_path / "cut")
    assert fails.calls - calls < 24  # it did not begin anew
    assert repr(ticket_bits(again)) == repr(ticket_bits(whole))


def test_the_command_says_one_line_and_ends_with_6(tmp_path, monkeypatch, command):
    fails = Fails(2, torch.AcceleratorError(GONE))
    monkeypatch.setattr(DenseEngine, "run", lambda *a: fails(*a))
    words = ("find-ticket", "lenet-300-100", "digits", "--rounds", 1, "-i", 20, "--device", "cpu", "--engine", "dense",
             "--precision", "fp32", "--set", "compute.threads=1", "--compile", "off", "--out", tmp_path)  # fmt: skip
    code, _, err = command(*words)
    assert code == 6 and "Traceback" not in err
    (line,) = [x for x in err.splitlines() if x.startswith("fastlth:")]
    assert "lost: CUDA error" in line and "fastlth resume" in line
    monkeypatch.undo()
    assert command(*words)[0] == 0


def test_outside_of_a_search_too(monkeypatch, command):
    def broken(*_: object) -> None:
        import fastlth.training.faults  # noqa: F401

        raise torch.AcceleratorError(GONE)

    monkeypatch.setattr("fastlth.cli.main.app", broken)
    code, _, err = command("doctor")
    assert code == 6
    assert err.strip() == "fastlth: the device is lost: CUDA error: an illegal memory access was encountered"


def small_device(monkeypatch, limit: int) -> None:
    """A model that takes at most ``limit`` images in evaluation."""
    from torch import nn

    inner = nn.Flatten.forward

    def forward(self, x):
        if not self.training and len(x) > limit:
            raise torch.OutOfMemoryError(FULL)
        return inner(self, x)

    monkeypatch.setattr(nn.Flatten, "forward", forward)


def test_a_smaller_evaluation_batch_gives_the_same_scores_and_one_line(tmp_path, monkeypatch):
    recipe = small_recipe(prune__rounds=1)
    source = random_source("digits", train=320, test=64)
    engine = make_engine(recipe, source)
    expected = engine.evaluate("train")
    small_device(monkeypatch, 40)
    scores = engine.evaluate("train")
    assert scores.accuracy == expected.accuracy and scores.loss == pytest.approx(expected.loss, rel=1e-6)
    assert engine.said == ["cpu has not memory enough to evaluate 1000 images at a time: 31 are"]
    shown = []
    search = fastlth.run(recipe, out=tmp_path, show=shown.append)
    told = [e.text for e in shown if isinstance(e, Notice)]
    assert len(told) == 1 and "images at a time" in told[0]
    assert isinstance(shown[-1], RoundFinished) and len(search.rounds) == 2
    small_device(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        make_engine(recipe, source).evaluate("test")


def test_a_graph_is_captured_at_an_evaluation_batch_that_fits():
    engine = make_engine(small_recipe(compute__engine="graph"), random_source("digits"))
    assert isinstance(engine, GraphEngine) and engine.evaluation_batch == 256
    tried = []

    def attempt():
        tried.append(engine.evaluation_batch)
        if engine.evaluation_batch > 50:
            raise torch.OutOfMemoryError(FULL)
        return lambda: None

    capture.fit_evaluation(engine, attempt)
    assert tried == [256, 128, 64, 32] and engine.evaluation_batch == 32
    assert engine.said == ["cpu has not memory enough to evaluate 256 images at a time: 32 are"]
    engine.evaluation_batch = 1
    with pytest.raises(torch.OutOfMemoryError):
        capture.fit_evaluation(engine, lambda: (_ for _ in ()).throw(torch.OutOfMemoryError(FULL)))


@pytest.mark.parametrize("engine", ["dense", "graph"])
def test_a_set_that_does_not_fit_is_streamed_with_the_same_bits(monkeypatch, engine):
    """The device refuses the resident images; a set of 256 is copied batch by batch."""
    recipe = small_recipe("conv-2", "digits", train__batch_size=48, train__drop_last=False, data__augment="flip-crop")
    source = random_source("digits")
    plain = make_engine(recipe, source)
    asked = dataclasses.replace(recipe, compute=compute(recipe, engine=engine))

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr("fastlth.training.engines.make.ResidentLoader", full)
    monkeypatch.setattr(GraphEngine, "_load_images", full)
    streamed = make_engine(asked, source)
    assert isinstance(streamed, DenseEngine)
    (said,) = streamed.said
    assert said.startswith("cpu has not memory enough for") and ("graph engine" in said) == (engine == "graph")
    for one in (plain, streamed):
        one.run(0, 10)
    assert_same_bits(plain.state(), streamed.state())
    assert plain.evaluate("validation") == streamed.evaluate("validation")
