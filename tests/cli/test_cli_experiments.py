"""``fastlth connectivity | supermask | transfer`` as a person and as a script meet them."""

from __future__ import annotations

import json

import pytest

from fastlth import running
from tests.helpers import small_recipe

SHORT = ["--device", "cpu", "--set", "compute.threads=1", "--set", "evaluate.every=10", "-i", "20", "-b", "32"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return running.run(small_recipe(prune__rounds=1), out=tmp_path_factory.mktemp("runs")).replicates[0].path


@pytest.fixture
def run(command, monkeypatch, tmp_path):
    """Run the command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return command


def test_connectivity(run, found):
    code, out, err = run("connectivity", found, "--rounds", "1", "--points", "3", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert set(document) == {
        "run",
        "recipe_digest",
        "iteration",
        "from_init",
        "seeds",
        "batch_norm",
        "train_images",
        "whole_schedule",
        "rounds",
    }
    assert set(document["rounds"][0]) == {
        "round", "density", "copies", "seconds", "alphas", "test_error", "train_error", "test_instability",
        "train_instability", "stable"}  # fmt: skip
    assert "round 1, copy 2 of 2: test accuracy" in err and "instability" in err
    code, out, err = run("connectivity", found, "--rounds", "1", "--points", "3")
    assert code == 0 and out == "" and "from iteration" not in err  # nothing is trained again
    options = ("--rounds", "1", "--points", "3", "--at-iteration", "20", "--whole-schedule", "--json")
    code, out, err = run("connectivity", found, *options)
    assert code == 0 and json.loads(out)["whole_schedule"] is True, err
    for text in ("0.5ep", "21it"):  # half of the 42 steps that 1,373 images make at batch 32
        code, out, err = run("connectivity", found, "--rounds", "0", "--points", "3", "--at-iteration", text, "--json")
        assert code == 0 and json.loads(out)["iteration"] == 21, err
    code, out, err = run("connectivity", found, "--at-iteration", "soon")
    assert (code, out) == (2, "") and "--at-iteration must be iterations (500, 500it) or epochs" in err


def test_noise(run, found):
    code, out, err = run("branch", found, "noise", "--sigma", "0.5", "--round", "1", "--trials", "1", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert (document["kind"], document["sigma"], document["rounds"][0]["round"]) == ("noise", 0.5, 1)
    code, out, err = run("branch", found, "noise")
    assert (code, out) == (2, "") and "noise needs --sigma" in err


def test_a_residual_net_of_another_spelling_and_a_narrow_lenet(run):
    """From names alone to tickets; --dropout goes with both."""
    options = ["--rounds", "1", "-i", "4", "-b", "16", "-l", "0.01", "--set", "evaluate.every=4",
               "--set", "compute.threads=1", "--device", "cpu", "--compile", "off", "--engine", "dense"]  # fmt: skip
    for name, folder in (("resnet8", "resnet-8"), ("lenet-7-3", "lenet-7-3")):
        code, out, err = run("find-ticket", name, "digits", "--dropout", "0.2", *options, "--json")
        assert code == 0, err
        document = json.loads(out)
        assert document["run"].startswith(f"runs/{folder}-digits-") and len(document["rounds"]) == 2
    code, out, err = run("bench", "kernels", "--model", "resnet20", "--dataset", "cifar-10", "--json")
    assert code == 0, err
    assert {r["model"] for r in json.loads(out)["rows"]} == {"resnet-20"}


def test_transfer(run, found):
    code, out, err = run("transfer", found / "search.ticket", "digits", "--optimizer", "sgd", "-i", "10", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert set(document) == {
        "run",
        "branch",
        "dataset",
        "random_ticket",
        "fresh_layers",
        "recipe_digest",
        "rounds",
        "winning_round",
    }
    assert document["rounds"][0]["round"] in (0, 1) and document["branch"].startswith(str(found))


def test_supermask(run):
    code, out, err = run("supermask", "lenet-300-100", "digits", "--powers", "2", *SHORT, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert set(document) >= {"folder", "method", "recipe_digest", "seed", "criterion", "trained_test_accuracy", "best",
                             "rows"}  # fmt: skip
    assert "initial weights: test accuracy" in err and "signed constants: test accuracy" in err
    code, out, err = run("supermask", "lenet-300-100", "digits", "--method", "learned", "--rescale", *SHORT, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["rescale"] is True and len(document["test_accuracies"]) == 10
    assert "the mean of 10 masks" in err
    code, out, err = run("supermask", "lenet-300-100", "digits", "--method", "edge-popup", "--keep", "0.3", *SHORT)
    assert code == 0 and out == "" and "density 30.00%" in err


BAD = {
    "no run": (4, ["connectivity", "nowhere"], "nowhere is not one run"),
    "rounds nonsense": (2, ["connectivity", "r0", "--rounds", "some"], "0,7, or all, got 'some'"),
    "one seed": (2, ["connectivity", "r0", "--seeds", "1"], "two numbers such as 1,2, got '1'"),
    "equal seeds": (2, ["connectivity", "r0", "--seeds", "4,4"], "two that differ"),
    "unknown init": (2, ["connectivity", "r0", "--from-init", "other"], "same or different, got 'other'"),
    "no ticket": (4, ["transfer", "none.ticket", "digits"], "none.ticket"),
    "unknown method": (2, ["supermask", "lenet-300-100", "digits", "--method", "popup"], "edge-popup"),
    "another method's option": (
        2, ["supermask", "lenet-300-100", "digits", "--method", "learned", "--keep", "0.1"], "option of edge-popup"),
    "a rounded mask's samples": (
        2, ["supermask", "lenet-300-100", "digits", "--method", "learned", "--rounded", "--samples", "3"], "one mask"),
    "unknown model": (2, ["supermask", "lenet-300", "digits"], "did you mean 'lenet-300-100'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_line_and_touches_no_file(run, tmp_path, name):
    expected, arguments, says = BAD[name]
    code, out, err = run(*arguments)
    assert (code, out) == (expected, ""), err
    assert err.startswith("fastlth: ") and err.count("\n") == 1 and says in err
    assert list(tmp_path.iterdir()) == []
