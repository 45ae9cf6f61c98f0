"""Sinks get what metrics.jsonl gets, and cannot hurt a run."""

from __future__ import annotations

import json
import signal
import sys
import types
from pathlib import Path

import pytest

import fastlth
from fastlth import sinks
from fastlth.errors import RecipeError, Stopped
from fastlth.happenings import Notice
from fastlth.metrics import TIMING_FIELDS
from tests.helpers import small_recipe


class Fake:
    """Keeps what it gets; fails at the n-th write, when it is opened or when it is closed."""

    made: list[Fake]

    def __init__(self, run, recipe, *, fail_at=None, fail_open=False, fail_close=False):
        self.records, self.closed = [], 0
        self.fail_at, self.fail_close = fail_at, fail_close
        type(self).made.append(self)
        if fail_open:
            raise OSError("no route\nto host")

    def write(self, record):
        if len(self.records) == self.fail_at:
            raise RuntimeError("the service is gone")
        self.records.append(dict(record))

    def close(self):
        self.closed += 1
        if self.fail_close:
            raise ValueError


@pytest.fixture
def fake(monkeypatch):
    """fake("wandb", fail_at=2) puts a fake in the place of a sink."""
    Fake.made = []
    monkeypatch.setattr(sinks, "find_spec", lambda name: object())

    def put(name, **how):
        monkeypatch.setitem(sinks.SINKS, name, lambda run, recipe: Fake(run, recipe, **how))

    return put


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluations_and_rounds(run):
    return [r for r in lines(run / "metrics.jsonl") if r["event"] in ("evaluation", "round")]


def untimed(records):
    return [{k: v for k, v in r.items() if k not in TIMING_FIELDS} for r in records]


def test_a_sink_gets_every_evaluation_and_round(fake, tmp_path):
    fake("tensorboard")
    search = fastlth.run(small_recipe(prune__rounds=1), out=tmp_path, log=["tensorboard"])
    [one] = Fake.made
    assert one.records == evaluations_and_rounds(search.replicates[0].path) and one.closed == 1


@pytest.mark.parametrize("how, got", [({"fail_at": 3}, 3), ({"fail_at": 0}, 0), ({"fail_open": True}, 0),
                                      ({"fail_close": True}, 10)])  # fmt: skip
def test_a_failing_sink_is_dropped_with_one_warning(fake, tmp_path, how, got):
    fake("tensorboard", **how)
    fake("wandb")
    recipe = small_recipe(prune__rounds=1)
    alone = fastlth.run(recipe, out=tmp_path / "alone")
    shown = []
    search = fastlth.run(recipe, out=tmp_path / "both", log=["tensorboard", "wandb"], show=shown.append)
    assert untimed(search.rounds) == untimed(alone.rounds)
    bad, good = Fake.made
    assert len(bad.records) == got and len(good.records) == 10 and good.closed == 1
    notices = [e.text for e in shown if isinstance(e, Notice)]
    assert len(notices) == 1 and "\n" not in notices[0]
    assert notices[0].startswith("--log tensorboard failed and is dropped, the search goes on (")
    metrics = [lines(s.replicates[0].path / "metrics.jsonl") for s in (alone, search)]
    assert untimed(metrics[0]) == untimed(metrics[1])


def test_names(monkeypatch):
    monkeypatch.setattr(sinks, "find_spec", lambda name: object() if name == "wandb" else None)
    assert sinks.check([]) == () and sinks.check(["wandb,wandb", "wandb"]) == ("wandb",)
    with pytest.raises(RecipeError, match=r"unknown sink 'wandbb' \(did you mean 'wandb'\?\)"):
        sinks.check(["wandbb"])
    with pytest.raises(RecipeError, match=r"install fastlth\[tensorboard\]"):
        sinks.check(["tensorboard"])


def test_an_unknown_sink_touches_no_file(tmp_path):
    with pytest.raises(RecipeError):
        fastlth.run(small_recipe(), out=tmp_path / "runs", log=["mlflow"])
    assert not list(tmp_path.iterdir())


def test_the_resume_command_names_the_sinks_and_they_change_no_digest(fake, tmp_path):
    fake("wandb")
    recipe = small_recipe(prune__rounds=1)
    with pytest.raises(Stopped, match=r"--log wandb$") as stop:
        fastlth.run(recipe, out=tmp_path, log=["wandb"], stopped=lambda: signal.SIGINT)
    assert Fake.made[0].closed == 1
    path = Path(stop.value.args[0].split()[-3])
    fastlth.resume(path, log=["wandb"])
    assert [r for one in Fake.made for r in one.records] == evaluations_and_rounds(path)
    assert recipe.digest[:8] in str(path)


def test_from_the_command_line(fake, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fake("wandb", fail_at=1)
    code, _, err = command("find-ticket", "lenet-300-100", "digits", "-i", 20, "--rounds", 1, "--set",
                           "compute.threads=1", "--compile", "off", "--precision", "fp32",
                           "--log", "wandb")  # fmt: skip
    assert code == 0 and err.count("--log wandb failed and is dropped") == 1
    assert "the service is gone" in err and "Traceback" not in err


class Writer:
    """torch.utils.tensorboard.SummaryWriter as far as it is used."""

    def __init__(self, folder, purge_step=None):
        self.calls = [(folder, purge_step)]
        Writer.last = self

    def add_scalar(self, name, value, step):
        self.calls.append((name, value, step))

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


EVALUATION = {"event": "evaluation", "round": 2, "iteration": 30, "validation_loss": 0.5, "test_loss": None}
ROUND = {"event": "round", "round": 2, "test_accuracy": 0.9, "engine": "dense"}


def test_tensorboard_counts_steps_over_all_rounds(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    sink = sinks.TensorBoard(tmp_path, small_recipe())  # 40 iterations a round
    for record in (EVALUATION, ROUND):
        sink.write(record)
    sink.close()
    assert Writer.last.calls == [
        (str(tmp_path / "tensorboard"), 110), ("evaluation/validation_loss", 0.5, 110),
        ("round/test_accuracy", 0.9, 2), "flush", "close",
    ]  # fmt: skip


def test_tensorboard_forgets_what_comes_again_also_when_it_begins_with_a_mask_that_was_drawn(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    sink = sinks.TensorBoard(tmp_path, small_recipe())
    sink.write({"event": "early_bird", "round": 1, "iteration": 20, "epoch": 2, "distance": 0.25})
    sink.write(EVALUATION)
    assert Writer.last.calls[0] == (str(tmp_path / "tensorboard"), 60)


def test_tensorboard_forgets_nothing_when_it_begins_with_the_end_of_a_round(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    sinks.TensorBoard(tmp_path, small_recipe()).close()
    sink = sinks.TensorBoard(tmp_path, small_recipe())
    sink.write(ROUND)
    assert Writer.last.calls[0] == (str(tmp_path / "tensorboard"), None)


def test_wandb_goes_on_in_its_run(monkeypatch, tmp_path):
    calls = []

    def init(**how):
        calls.append(how)
        return types.SimpleNamespace(
            define_metric=lambda *a, **k: None, log=calls.append, finish=lambda: calls.append("finish")
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    recipe, run = small_recipe(), tmp_path / "lenet-digits-01234567" / "r0"
    run.mkdir(parents=True)
    for _ in range(2):
        sink = sinks.WandB(run, recipe)
        sink.write(EVALUATION)
        sink.write(ROUND)
        sink.close()
    first, *logged, second = calls[0], *calls[1:4], calls[4]
    assert first == second and first["resume"] == "allow" and first["config"] == recipe.to_dict()
    assert first["name"] == "lenet-digits-01234567-r0"
    evaluation, end, finish = logged
    assert evaluation == {"step": 110, "evaluation/validation_loss": 0.5} and finish == "finish"
    assert end == {"round": 2, "round/test_accuracy": 0.9}
    other = tmp_path / "elsewhere" / "r0"
    other.mkdir(parents=True)
    sinks.WandB(other, recipe)
    assert calls[-1]["id"] != first["id"]
