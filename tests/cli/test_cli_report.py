"""``fastlth report`` as a person meets it."""

from __future__ import annotations

import json
import sys

import pytest

SHORT = ["-i", 20, "--set", "evaluate.every=10", "--rounds", 1, "--device", "cpu", "--precision", "fp32", "--compile",
         "off", "--set", "compute.threads=1"]  # fmt: skip


@pytest.fixture
def run(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return command


def test_from_a_search_to_a_page(run, tmp_path):
    found = json.loads(run("find-ticket", "lenet-300-100", "digits", *SHORT, "--json")[1])
    code, out, err = run("report", found["run"], found["ticket"], "--rounds", "0,1", "--out", "a b")
    assert code == 0 and out == "" and "report: a b/index.html" in err
    text = (tmp_path / "a b" / "index.html").read_text()
    assert f"fastlth report {found['run']} {found['ticket']} --rounds 0,1 --out &#x27;a b&#x27;" in text
    code, _, err = run("report", found["run"], "--rounds", "0,9", "--out", "c")
    assert code == 2 and err == "fastlth: --rounds 9 is not there; choose from 0 to 1, the finished ones\n"
    code, _, err = run("report", found["run"], "--live")
    assert code == 0 and "round  1  density" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a b", "runs"]


BAD = {
    "nothing": (2, ["report"], "give run folders"),
    "no run": (4, ["report", "nowhere"], "nowhere"),
    "live and bench": (2, ["report", "--live", "--bench"], "give one"),
    "live without a run": (2, ["report", "--live"], "one run"),
    "live nowhere": (4, ["report", "--live", "nowhere"], "nowhere"),
    "live and rounds": (2, ["report", "nowhere", "--live", "--rounds", "9"], "--live writes none"),
    "live and out": (2, ["report", "nowhere", "--live", "--out", "page"], "--live writes none"),
    "bench and rounds": (2, ["report", "--bench", "--rounds", "0"], "--bench draws records"),
    "rounds": (2, ["report", "nowhere", "--rounds", "all"], "0,3,7"),
    "no records": (4, ["report", "--bench"], "benchmarks/results"),
    "unknown sink": (2, ["find-ticket", "lenet-300-100", "digits", "--log", "mlflow"], "tensorboard"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(run, tmp_path, name):
    expected, arguments, says = BAD[name]
    code, out, err = run(*arguments)
    assert code == expected and out == "" and says in err and "Traceback" not in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(run, tmp_path):
    found = json.loads(run("find-ticket", "lenet-300-100", "digits", *SHORT, "--json")[1])
    (tmp_path / "file").write_text("")
    code, _, err = run("report", found["run"], "--out", "file")
    assert code == 2 and "file" in err and err.count("\n") == 1


def test_without_matplotlib(run, monkeypatch, tmp_path):
    found = json.loads(run("find-ticket", "lenet-300-100", "digits", *SHORT, "--json")[1])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("report", found["run"])
    assert code == 2 and "fastlth[report]" in err and not (tmp_path / "report").exists()
