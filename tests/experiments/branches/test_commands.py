"""The commands `branch` and `prune-at-init`, and their page."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fastlth.experiments.control import KINDS, METHODS
from tests.helpers import CPU


def test_commands(command, monkeypatch, tmp_path, run):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("branch", run, "random-prune", "--rounds", "1,2", "--trials", "2", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert [r["round"] for r in document["rounds"]] == [1, 2] and len(document["trials"]) == 4
    code, out, err = command("branch", run, "random-prune", "--round", "1", "--rounds", "2")
    assert (code, out) == (2, "") and "give one" in err
    code, out, err = command("branch", run, "random-prune", "--rounds", "first")
    assert (code, out) == (2, "") and "1,7,9" in err
    short = [a for k, v in {**CPU, "evaluate.every": 10}.items() for a in ("--set", f"{k}={v}")]
    arguments = ["prune-at-init", "lenet-300-100", "digits", "--method", "snip", "--density", "0.1", "-i", "20", *short]
    code, out, err = command(*arguments, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["rounds"][0]["kept"] == 5_020 and Path(document["run"]).name == "r0"
    assert (Path(document["run"]) / "recipe.toml").exists()
    again = command(*arguments, "--json")
    assert again[0] == 0 and json.loads(again[1]) == document
    code, out, err = command("find-ticket", "lenet-300-100", "digits", "-i", "20", "--rounds", "1", *short, "--json")
    assert code == 0 and json.loads(out)["run"] == document["run"]  # the search goes where the baseline lies
    code, _, err = command("branch", document["run"], "prune-at-init", "--method", "synflow", "--round", "1")
    assert code == 0, err


def test_prune_at_init_refuses_settings_that_it_does_not_look_at(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = ["prune-at-init", "lenet-300-100", "digits", "--method", "snip", "--density", "0.1", "--trials", "2"]
    for setting in ("prune.criterion=random", "prune.rounds=3", "prune.to_density=0.1", "prune.rewind_to=5",
                    "prune.mask_1=signed_constant", "prune.mask_0=freeze_init", "prune.early_bird=0.1",
                    "prune.scope=global", "store.keep_weights=all"):  # fmt: skip
        code, out, err = command(*arguments, "--set", setting)
        refused = f"fastlth: {setting.partition('=')[0]} is for searches"
        assert (code, out, list(tmp_path.iterdir())) == (2, "", []) and err.startswith(refused), err
    for more in (["--set", "prune.scale.output=0"], ["--scope", "layer", "--set", "prune.scope=layer"]):
        assert "draws nothing" in command(*arguments, *more)[2], "the setting is taken, the trials are refused"


def test_the_page_names_every_kind_method_and_strategy(command):
    page = (Path(__file__).resolve().parents[3] / "docs" / "branches.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| `")]
    assert [name.strip("`") for name in rows[: len(KINDS)]] == list(KINDS)
    assert [name for row in rows[len(KINDS) :] for name in re.findall(r"`(\w+)`", row)] == list(METHODS)
    assert all(f"`{name}`" in page for name in ("layer", "global", "even", "erk"))
    words = " ".join(re.sub(r"[^\w-]", " ", command("branch", "--help")[1]).split())
    assert all(name in words for name in (*KINDS, *METHODS))
