"""What branches leave on disk: going on after a stop, folders, one writer."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from fastlth.errors import RecipeError, RunLockedError, Stopped, TicketError
from fastlth.experiments.branch import branch
from fastlth.experiments.control import Control
from fastlth.experiments.trial import Trial
from fastlth.store.lock import Lock
from tests.experiments.branches.by_hand import lines, untimed


@pytest.mark.parametrize("after", [1, 7, 18])
def test_a_stopped_branch_goes_on_to_the_same_bits(run, tmp_path, monkeypatch, after):
    monkeypatch.setattr("fastlth.training.trainer.CHUNK_SECONDS", 1e-9)  # one step a chunk
    other = tmp_path / "other" / "r0"
    shutil.copytree(run, other)
    control = Control(kind="lr-rewind", density=0.3)
    whole = branch(other, control)
    left = [after]

    def stopped():
        left[0] -= 1
        return 15 if left[0] == 0 else None

    branch(run, Control(kind="one-shot", density=0.3))  # the dense net is there
    with pytest.raises(Stopped) as caught:
        branch(run, control, stopped=stopped)
    assert caught.value.exit_code == 143
    [folder] = (run / "branches").glob("lr-rewind-*/round-1/trial-0")
    assert (folder / "state.safetensors").exists() and not (folder / "result.json").exists()
    torch.manual_seed(5)
    again = branch(run, control)
    assert untimed(again.trials[0]) == untimed(whole.trials[0])
    [expected] = (other / "branches").glob("lr-rewind-*/round-1/trial-0")
    assert lines(folder) == lines(expected) and not (folder / "state.safetensors").exists()


def test_a_finished_branch_is_read_and_trains_nothing(run, monkeypatch):
    first = branch(run, Control(kind="random-reinit"), rounds="all", trials=2)
    assert [(t["round"], t["trial"]) for t in first.trials] == [(k, t) for k in (1, 2, 3) for t in (0, 1)]
    monkeypatch.setattr(Trial, "run", None)
    second = branch(run, Control(kind="random-reinit"), rounds=[3, 1], trials=2)
    assert [t for t in first.trials if t["round"] != 2] == list(second.trials)
    means = second.rounds
    assert [m["round"] for m in means] == [1, 3] and means[0]["trials"] == 2
    assert means[1]["test_accuracy"] == pytest.approx(sum(t["test_accuracy"] for t in second.trials[2:]) / 2)
    document = json.loads(json.dumps(second.to_json()))
    assert document["kind"] == "random-reinit" and document["trials"] == list(second.trials)


def test_settings_change_the_folder_but_not_the_search(run):
    a = branch(run, Control(kind="random-reinit"), rounds=[1], trials=1)
    b = branch(run, Control(kind="random-reinit"), rounds=[1], trials=1, settings={"train.lr": 0.01})
    assert a.folder != b.folder and b.recipe.train.lr == 0.01
    for name in ("model.batch_norm", "data.augment", "prune.rate", "seeds.init", "seeds.split"):
        with pytest.raises(RecipeError, match="controls share it"):
            branch(run, Control(kind="random-reinit"), rounds=[1], settings={name: 1})
    other = branch(run, Control(kind="random-reinit"), rounds=[1], trials=1, settings={"seeds.branch": 9})
    assert other.folder != a.folder and untimed(other.trials[0]) != untimed(a.trials[0])


def test_the_default_round_is_the_winning_ticket_or_the_last(run, starts, monkeypatch):
    monkeypatch.setattr("fastlth.search.winning_round", lambda _: 2)
    assert starts(run, Control(kind="random-reinit"), trials=1)[0][0] == 2
    monkeypatch.setattr("fastlth.search.winning_round", lambda _: None)
    assert starts(run, Control(kind="random-reinit"), trials=1)[0][0] == 3


def test_one_writer_per_training(run):
    result = branch(run, Control(kind="random-reinit"), rounds=[1], trials=1)
    folder = result.folder / "round-1" / "trial-0"
    (folder / "result.json").unlink()
    lock = Lock(folder / "lock")
    try:
        with pytest.raises(RunLockedError):
            branch(run, Control(kind="random-reinit"), rounds=[1], trials=1)
    finally:
        lock.release()
    (folder / "result.json").write_text("{")
    with pytest.raises(TicketError, match="cannot be read"):
        branch(run, Control(kind="random-reinit"), rounds=[1], trials=1)


def test_a_chain_whose_trained_net_was_removed_says_so(run):
    found = branch(run, Control(kind="finetune", iterations=10), rounds=[1])
    shutil.rmtree(found.folder / "round-1" / "trial-0" / "weights")
    with pytest.raises(TicketError, match="no trained net any more"):
        branch(run, Control(kind="finetune", iterations=10), rounds=[2])
