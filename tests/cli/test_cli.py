"""The command line as a person and as a script meet it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlth
from fastlth.cli.main import app

SHORT = ["--iterations", "20", "--set", "evaluate.every=10", "--rounds", "2", "--device", "cpu",
         "--precision", "fp32", "--compile", "off", "--set", "compute.threads=1"]  # fmt: skip


@pytest.fixture
def run(command, monkeypatch, tmp_path):
    """Run the command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return command


def test_help_imports_no_torch():
    script = (
        "import sys; sys.argv = ['fastlth', '--help']\n"
        "from fastlth.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numba', 'triton', 'ffcv', 'sklearn', 'torchvision', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "find-ticket" in done.stdout


def commands():
    import typer

    def walk(command, path):
        for name, sub in getattr(command, "commands", {}).items():
            yield from walk(sub, [*path, name])
        if path and not getattr(command, "commands", None):
            yield path

    return list(walk(typer.main.get_command(app), []))


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_has_help_with_an_example(run, path):
    code, out, _ = run(*path, "--help")
    assert code == 0
    assert f"Example: fastlth {' '.join(path)}" in " ".join(out.split())


def test_find_ticket_end_to_end(run, tmp_path):
    command = ["find-ticket", "lenet-300-100", "digits", *SHORT, "--json"]
    code, out, err = run(*command)
    assert code == 0, err
    document = json.loads(out)
    assert [r["round"] for r in document["rounds"]] == [0, 1, 2]
    assert [r["kept"] for r in document["rounds"]] == [50_200, 40_260, 32_298]
    assert document["recipe_digest"].startswith(document["run"].rsplit("-", 1)[1].split("/")[0])
    fields = {"round", "density", "kept", "early_stop_iteration", "early_stop_test_accuracy", "test_accuracy",
              "seconds", "images_per_second", "engine", "early_stop_validation_loss",
              "early_stop_validation_accuracy", "train_accuracy", "layers"}  # fmt: skip
    assert all(set(r) == fields for r in document["rounds"])
    assert "round  density" in err and document["ticket"] in err.replace("\n", "")
    folder = tmp_path / document["run"]
    assert {p.name for p in folder.iterdir()} == {"recipe.toml", "search.ticket", "metrics.jsonl", "lock"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(x["event"], x["round"], x.get("iteration")) for x in lines] == [
        (e, k, i)
        for k in range(3)
        for e, i in (("evaluation", 10), ("evaluation", 20), ("round", None), *[("layer", None)] * 3, ("work", None))
    ]

    again, out2, _ = run(*command)  # a finished run prints its result and trains nothing
    assert again == 0 and json.loads(out2) == document

    code, out3, _ = run("ticket", "inspect", document["ticket"], "--json")
    inspected = json.loads(out3)
    assert code == 0 and inspected["rounds"] == 3
    assert inspected["densities"] == [r["density"] for r in document["rounds"]]
    assert [sum(layer["kept"][k] for layer in inspected["layers"]) for k in range(3)] == [50_200, 40_260, 32_298]
    assert set(inspected["bytes"]) == {"masks", "theta0", "fill", "file"}
    layers = {(x["round"], x["layer"]): x for x in lines if x["event"] == "layer"}
    for k, options in ((2, []), (1, ["--round", 1])):  # the figures of metrics.jsonl, found again in the ticket
        units = json.loads(run("ticket", "inspect", document["ticket"], *options, "--json")[1])["units"]
        assert units["round"] == k and len(units["layers"]) == 3
        for x in units["layers"]:
            assert {n: layers[k, x["name"]][n] for n in x if n != "name"} == {n: v for n, v in x.items() if n != "name"}
    code, _, err = run("ticket", "inspect", document["ticket"], "--round", 1)
    assert code == 0 and "round 1" in err and "kept on paths" in err
    assert run("ticket", "verify", document["ticket"])[0] == 0

    code, out4, _ = run("runs", "--json")
    assert code == 0 and [r["rounds_done"] for r in json.loads(out4)["runs"]] == [3]

    # the same recipe from the run's own file: the same run
    code, out5, _ = run("find-ticket", "lenet-300-100", "digits", "--config", folder / "recipe.toml", "--json")
    assert code == 0 and json.loads(out5) == document

    # training the dense net and a ticket again gives what the search gave
    for k in (0, 2):
        code, out6, err = run("train", document["ticket"], "--round", k, "--json")
        assert code == 0, err
        retrained, searched = json.loads(out6), document["rounds"][k]
        timing = {"seconds", "images_per_second"}
        assert {x: v for x, v in retrained.items() if x not in timing} == {
            x: v for x, v in searched.items() if x not in timing
        }


def test_replicates_report_means(run):
    code, out, err = run("find-ticket", "lenet-300-100", "digits", *SHORT, "--replicates", 2, "--seed", 5, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert [r["seed"] for r in document["replicates"]] == [5, 6]
    a, b = (r["rounds"][1]["test_accuracy"] for r in document["replicates"])
    assert document["rounds"][1]["test_accuracy"] == pytest.approx((a + b) / 2)
    assert [x["round"] for x in document["mask_overlap"]] == [0, 1, 2]
    masks = [fastlth.load_ticket(document["ticket"].replace("/r5/", f"/r{seed}/")).mask(2) for seed in (5, 6)]
    both, either = (sum(int(op(a, masks[1][n]).sum()) for n, a in masks[0].items())
                    for op in (torch.logical_and, torch.logical_or))  # fmt: skip
    assert document["mask_overlap"][2]["jaccard"] == pytest.approx(both / either)
    assert "masks of the replicates" in err
    lines = (Path(document["run"]).parent / "overlap.jsonl").read_text().splitlines()
    assert [json.loads(x) for x in lines] == [
        {"event": "overlap", "seeds": [5, 6], **found} for found in document["mask_overlap"]
    ]
    code, out, _ = run("find-ticket", "lenet-300-100", "digits", *SHORT, "--seed", 6, "--json")
    assert json.loads(out)["rounds"] == document["replicates"][1]["rounds"]


def test_fresh_starts_beside_the_old_run(run):
    command = ["find-ticket", "lenet-300-100", "digits", *SHORT, "--json"]
    first = json.loads(run(*command)[1])
    second = json.loads(run(*command, "--fresh")[1])
    assert second["run"] == first["run"] + ".2"
    assert [r["test_accuracy"] for r in first["rounds"]] == [r["test_accuracy"] for r in second["rounds"]]


def test_theta0_as_a_seed_changes_the_file_and_nothing_else(run):
    command = ["find-ticket", "lenet-300-100", "digits", *SHORT, "--json"]
    stored = json.loads(run(*command, "--out", "a")[1])
    seeded = json.loads(run(*command, "--theta0", "seed", "--out", "b")[1])
    assert [r["test_accuracy"] for r in stored["rounds"]] == [r["test_accuracy"] for r in seeded["rounds"]]
    big, small = (json.loads(run("ticket", "inspect", d["ticket"], "--json")[1])["bytes"] for d in (stored, seeded))
    assert big["theta0"] > 100_000 and small["theta0"] == 0 and big["masks"] == small["masks"]
    nets = [fastlth.load_ticket(d["ticket"]).model(2).state_dict() for d in (stored, seeded)]
    assert all((nets[0][n] == nets[1][n]).all() for n in nets[0])
    assert run("ticket", "verify", seeded["ticket"])[0] == 0
    # a stopped search with a seed goes on too
    more = [*SHORT, "--rounds", "3", "--json"]
    code, out, err = run("find-ticket", "lenet-300-100", "digits", *more, "--theta0", "seed", "--out", "b")
    assert code == 0, err
    assert len(json.loads(out)["rounds"]) == 4


def test_one_shot_is_one_round_at_the_density_asked_for(run):
    no_rounds = [*SHORT[:4], *SHORT[6:]]
    code, out, err = run("find-ticket", "lenet-300-100", "digits", *no_rounds, "--one-shot", "0.1", "--json")
    assert code == 0, err
    rounds = json.loads(out)["rounds"]
    assert [r["kept"] for r in rounds] == [50_200, 5_020]


DIGITS_AT_INIT = ["prune-at-init", "lenet-300-100", "digits", "-i", "30", "--set", "compute.threads=1"]
DIVERGES = ["--set", "train.optimizer=sgd", "--lr", "1e30", *SHORT]

BAD = {
    "unknown model": (2, ["find-ticket", "vg19", "cifar-10"], "did you mean 'vgg19'"),
    "unknown dataset": (2, ["find-ticket", "vgg19", "cifar"], "cifar-10"),
    "unknown preset": (2, ["find-ticket", "vgg19", "cifar-10", "--preset", "papr"], "paper"),
    "preset without the pair": (2, ["find-ticket", "lenet-5", "mnist", "--preset", "paper"], "--preset"),
    "pair without a preset": (2, ["find-ticket", "vgg19", "mnist"], "--iterations (or --epochs), --batch-size, --lr"),
    "unknown --set key": (2, ["find-ticket", "vgg19", "cifar-10", "--set", "prune.rat=0.1"], "prune.rate"),
    "unknown --set section": (2, ["find-ticket", "vgg19", "cifar-10", "--set", "prun.rate=0.1"], "prune"),
    "malformed --set": (2, ["find-ticket", "vgg19", "cifar-10", "--set", "prune.rate"], "section.field=value"),
    "rate 0": (2, ["find-ticket", "vgg19", "cifar-10", "--rate", "0"], "(0, 1)"),
    "rate 1": (2, ["find-ticket", "vgg19", "cifar-10", "--rate", "1"], "(0, 1)"),
    "model too big": (2, ["find-ticket", "vgg19", "digits", "-i", "9", "-b", "9", "-l", "1"], "at least 16x16"),
    "model too big 2": (2, ["find-ticket", "lenet-5", "digits", "-i", "9", "-b", "9", "-l", "1"], "at least 12x12"),
    "unequal global rates": (2, ["find-ticket", "conv-2", "cifar-10", "--scope", "global"], "prune.scale"),
    "two lengths": (2, ["find-ticket", "vgg19", "cifar-10", "-i", "5", "-e", "5"], "give one"),
    "one shot and rounds": (2, ["find-ticket", "vgg19", "cifar-10", "--one-shot", "0.1", "--rounds", "3"], "--rounds"),
    "one shot and a rate": (2, ["find-ticket", "vgg19", "cifar-10", "--one-shot", "0.1", "--rate", "0.3"], "--rate"),
    "one shot too sparse": (2, ["find-ticket", "vgg19", "cifar-10", "--one-shot", "0.0001"], "at least 0.00025"),
    "one shot by sign": (2, ["find-ticket", "lenet-300-100", "digits", "--one-shot", "0.1",
                             "--criterion", "large_final_same_sign_single"], "decides itself"),
    "dropout 1": (2, ["find-ticket", "lenet-300-100", "digits", "--dropout", "1"], "[0, 1)"),
    "momentum of adam": (2, ["find-ticket", "lenet-300-100", "digits", "--momentum", "0.9"], "optimizer adam"),
    "unknown branch": (2, ["branch", "nowhere", "reinit"], "random-reinit"),
    "branch of nothing": (4, ["branch", "nowhere", "random-reinit"], "nowhere"),
    "prune-at-init by what": (
        2, ["prune-at-init", "lenet-300-100", "digits", "--method", "snap", "--density", "0.1"], "did you mean 'snip'",
    ),
    "prune-at-init, no trial": (
        2, [*DIGITS_AT_INIT, "--method", "erk", "--density", "0.1", "--trials", "0"], "at least 1",
    ),
    "prune-at-init, equal trials": (
        2, [*DIGITS_AT_INIT, "--method", "snip", "--density", "0.1", "--trials", "3"], "draws nothing",
    ),
    "prune-at-init, images": (
        2, [*DIGITS_AT_INIT, "--method", "snip", "--density", "0.1", "--images", "5000"], "at most the 837 training",
    ),
    "prune-at-init, too sparse": (2, [*DIGITS_AT_INIT, "--method", "erk", "--density", "0.00001"], "at least 1.99e-05"),
    "prune-at-init, factors of one budget": (
        2, [*DIGITS_AT_INIT, "--method", "snip", "--density", "0.1", "--set", "prune.scale.fc1=0.5"], "one budget",
    ),
    "prune-at-init, two scopes": (
        2, [*DIGITS_AT_INIT, "--method", "snip", "--density", "0.1", "--scope", "layer", "--set", "prune.scope=global",
            "--set", "prune.scale={}"], "contradict each other",
    ),
    "last replicate's seed": (
        2, ["find-ticket", "lenet-300-100", "digits", "--seed", "4294967295", "--replicates", "2"], "a lower --seed",
    ),
    "option of runs before clean": (2, ["runs", "--out", "other", "clean", "--yes"], "put it behind clean"),
    "option of bench before step": (2, ["bench", "--json", "step"], "put it behind step"),
    "image size of digits": (2, ["data", "prepare", "digits", "--image-size", "32"], "imagefolder:PATH"),
    "two data folders": (2, ["find-ticket", "vgg19", "cifar-10", "a", "--data-dir", "b"], "give one"),
    "no such device": (2, ["find-ticket", "lenet-300-100", "digits", "--device", "cuda:7"], "cpu"),
    "not a device": (2, ["find-ticket", "lenet-300-100", "digits", "--device", "gpu"], "cuda"),
    "no such config": (2, ["find-ticket", "vgg19", "cifar-10", "--config", "none.toml"], "none.toml"),
    "rewind past the end": (2, ["find-ticket", "lenet-300-100", "digits", "--rewind-to", "1500it"], "below"),
    "rewind nonsense": (2, ["find-ticket", "lenet-300-100", "digits", "--rewind-to", "soon"], "500it"),
    "batch too large": (2, ["find-ticket", "lenet-300-100", "digits", "-b", "5000"], "837"),
    "seed contradiction": (
        2, ["find-ticket", "lenet-300-100", "digits", "--theta0", "seed", "--rewind-to", "5"], "seed",
    ),
    "save-every": (2, ["find-ticket", "lenet-300-100", "digits", "--save-every", "often"], "60s"),
    "no such option": (2, ["find-ticket", "lenet-300-100", "digits", "--roundz", "3"], "--rounds"),
    "no such ticket": (4, ["ticket", "inspect", "none.ticket"], "none.ticket"),
    "not a run": (4, ["resume", "nowhere"], "nowhere"),
    "unknown data set to prepare": (2, ["data", "prepare", "imagenet"], "mnist"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_line_and_touches_no_file(run, tmp_path, name):
    expected, arguments, says = BAD[name]
    code, out, err = run(*arguments)
    assert code == expected, err
    assert out == ""
    assert says in " ".join(err.split())
    assert "Traceback" not in err
    if name != "no such option":  # typer draws a box of its own around that one
        assert err.startswith("fastlth: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_missing_data_without_a_network(run, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    code, out, err = run("find-ticket", "lenet-300-100", "mnist", "--data-dir", tmp_path / "data")
    assert code == 4 and out == "" and "mnist" in err and "Traceback" not in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = run("find-ticket", "lenet-300-100", "digits", *SHORT, "--out", "file/runs")
    assert code == 2 and err.startswith("fastlth: ") and "file" in err
    assert (tmp_path / "file").read_text() == "in the way"


def test_divergence_exits_with_5_and_names_the_iteration(run):
    code, _, err = run("find-ticket", "lenet-300-100", "digits", *DIVERGES)
    assert code == 5
    assert "round 0: the loss became NaN or infinite at iteration" in err and "--lr" in err


def test_python_m_fastlth():
    done = subprocess.run([sys.executable, "-m", "fastlth", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"fastlth {fastlth.__version__}\n"


def test_doctor_and_data_list(run):
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert code == 0 and report["torch"] and report["device"]
    code, out, _ = run("data", "list", "--json")
    rows = {r["name"]: r for r in json.loads(out)["datasets"]}
    assert code == 0 and rows["digits"]["state"] == "ready" and rows["cifar-10"]["shape"] == [3, 32, 32]
