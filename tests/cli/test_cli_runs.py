"""``fastlth runs clean``: says first, asks, removes what is not needed and nothing else."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

import fastlth
from fastlth import toml
from fastlth.experiments.supermasks.run import place
from tests.helpers import small_recipe


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folder(tmp_path):
    recipe = small_recipe(train__iterations=10, store__keep_weights="all", prune__rounds=1)
    run = fastlth.run(recipe, out=tmp_path).replicates[0].path
    (run / "state.safetensors").write_bytes(b"left by a kill")
    unfinished = small_recipe(train__iterations=20, prune__rounds=1)
    other = fastlth.run(unfinished, out=tmp_path).replicates[0].path
    text = (other / "recipe.toml").read_text()
    (other / "recipe.toml").write_text(text.replace("rounds = 1", "rounds = 2"))
    (other / "state.safetensors").write_bytes(b"of a round in progress")
    return tmp_path, run, other


@pytest.fixture
def clean(command, monkeypatch):
    """Run ``fastlth runs clean`` and answer its question: (stdout, stderr)."""

    def call(*arguments, answer="n\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        code, out, err = command("runs", "clean", *arguments)
        assert code == 0, err
        return out, err

    return call


def test_nothing_goes_without_a_yes(folder, clean):
    out, _, _ = folder
    before = files(out)
    _, err = clean("--out", out, "--trained")
    assert all(s in err for s in ("state.safetensors", "round-1.safetensors", "remove these 3 files?"))
    assert files(out) == before


def test_a_yes_removes_what_was_said_and_leaves_unfinished_runs_alone(folder, clean):
    out, run, other = folder
    before = files(out)
    out_text, _ = clean("--out", out, "--trained", "--yes", "--json")
    removed = {p.removeprefix(f"{out}/") for p in json.loads(out_text)["removed"]}
    relative = run.relative_to(out)
    assert removed == {f"{relative}/{n}" for n in
                       ("state.safetensors", "weights/round-0.safetensors", "weights/round-1.safetensors")}  # fmt: skip
    assert files(out) == before - removed
    assert (other / "state.safetensors").exists()


def test_trained_weights_stay_unless_asked_for(folder, clean):
    out, run, _ = folder
    clean("--out", out, answer="y\n")
    assert not (run / "state.safetensors").exists()
    assert len(list((run / "weights").iterdir())) == 2


def test_a_run_with_nothing_but_controls_says_so(command, tmp_path):
    asked = ("prune-at-init", "lenet-300-100", "digits", "--method", "erk", "--density", "0.1", "--trials", "1",
             "-i", "20", "-b", "32", "--set", "compute.threads=1", "--out", tmp_path, "--json")  # fmt: skip
    code, out, err = command(*asked)
    assert code == 0, err
    folder = json.loads(out)["branch"]
    code, out, err = command("runs", "--out", tmp_path, "--json")
    [listed] = json.loads(out)["runs"]
    assert listed["rounds_done"] == 0 and listed["branches"] == [folder.rsplit("/", 1)[1]]
    _, _, err = command("runs", "--out", tmp_path)
    assert "controls only" in " ".join(err.split()) and "0/21" not in err
    for result in Path(folder).glob("round-*/trial-*/result.json"):  # as a stop leaves it
        result.unlink()
    [listed] = json.loads(command("runs", "--out", tmp_path, "--json")[1])["runs"]
    assert listed["branches"] == [] and listed["unfinished_branches"] == [Path(folder).name]
    words = " ".join(command("runs", "--out", tmp_path)[2].split())
    assert "not finished" in words and "controls only" not in words


def test_supermasks_without_a_search_are_listed(command, tmp_path):
    recipe = small_recipe(seeds__base=3)
    folder = place(tmp_path, recipe)
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(toml.dumps({**recipe.to_dict(), "resolved": {}}))
    assert "not finished" in " ".join(command("runs", "--out", tmp_path)[2].split())
    (folder / "learned.json").write_text("{}")
    [listed] = json.loads(command("runs", "--out", tmp_path, "--json")[1])["runs"]
    assert (listed["run"], listed["model"], listed["seed"]) == (str(folder.parent), "lenet-300-100", 3)
    assert listed["supermasks"] == ["learned"] and listed["rounds_asked"] == 0
    assert " 3 supermasks - " in " ".join(command("runs", "--out", tmp_path)[2].split())
    assert command("runs", "clean", "--trained", "--yes", "--out", tmp_path)[0] == 0 and len(files(folder)) == 2
