"""``fastlth bench ticket``: a document that other tools read, and sizes that do not depend on the machine."""

from __future__ import annotations

import json
import sys

import pytest

from fastlth.bench.ticket import OURS, synthetic
from fastlth.cli.main import main
from fastlth.recipe import Recipe
from fastlth.store import inspect
from fastlth.store import ticket as tickets


def bench(monkeypatch, capfd, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastlth", "bench", "ticket", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capfd.readouterr()
    assert not stop.value.code, err
    return out, err


SMALL = ["--model", "lenet-300-100", "--dataset", "digits", "--rounds", "5"]


def test_the_document(monkeypatch, capfd):
    out, _ = bench(monkeypatch, capfd, *SMALL, "--json")
    document = json.loads(out)
    assert document.keys() == {"when", "commit", "machine", "versions", "rows"}
    rows = {row["path"]: row for row in document["rows"]}
    assert document["rows"][0]["path"] == OURS
    for row in rows.values():
        assert (row["subject"], row["model"], row["dataset"]) == ("ticket", "lenet-300-100", "digits")
        assert row["bytes"].keys() == {"masks", "theta0"}
    masks = {path.removesuffix(", theta0 by torch.save"): row["bytes"]["masks"] for path, row in rows.items()}
    theta0 = {path: row["bytes"]["theta0"] for path, row in rows.items()}
    weights = 64 * 300 + 300 * 100 + 1000
    everything = weights + 300 + 100 + 10
    bound = masks["order-0 entropy of pruned_at and of theta0's bytes"]
    assert bound < masks[OURS] < 1.1 * bound
    assert masks["bit masks"] == 5 * weights // 8  # each layer's size is a multiple of 8
    assert masks[OURS] < masks["bit masks + zlib"] < masks["bit masks"]
    assert masks["torch.save of the weights per round"] > 5 * 4 * everything
    assert theta0[OURS] < 0.9 * 4 * everything
    assert rows["ours, theta0 as a seed"]["bytes"] == {"masks": masks[OURS], "theta0": 0}


def test_the_table(monkeypatch, capfd):
    out, err = bench(monkeypatch, capfd, *SMALL)
    assert out == "" and "masks MB" in err and "bit masks + zlib" in err


def test_the_synthetic_search_is_a_whole_one(tmp_path):
    recipe = Recipe.from_dict({"model": {"name": "lenet-300-100"}, "data": {"name": "digits"},
                               "train": {"iterations": 1, "batch_size": 1, "lr": 1.0},
                               "prune": {"rounds": 3, "scope": "global"}})  # fmt: skip
    ticket = synthetic(recipe)
    tickets.save(tmp_path / "ticket", ticket)
    assert inspect.verify(tmp_path / "ticket") == []
    assert [ticket.kept(k) for k in range(4)] == [50_200, 40_160, 32_128, 25_703]


@pytest.mark.slow
def test_vgg19_and_twenty_rounds_fit_in_78_megabytes(monkeypatch, capfd):
    """9.1 MB of masks (entropy bound 8.93) and 69 of theta0; under 10 MB where a seed stands for theta0."""
    document = json.loads(bench(monkeypatch, capfd, "--json")[0])
    rows = {row["path"]: row["bytes"] for row in document["rows"]}
    assert rows[OURS]["masks"] <= 9_100_000 and rows[OURS]["theta0"] <= 69_000_000
    assert sum(rows["ours, theta0 as a seed"].values()) < 10_000_000
