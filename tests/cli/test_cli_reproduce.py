"""``fastlth reproduce`` as a person and as a script meet it."""

from __future__ import annotations

import csv
import json
import os
import signal

import pytest


@pytest.fixture
def reproduce(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: command("reproduce", *arguments)


def test_a_figure_from_runs_to_picture(reproduce, tmp_path):
    code, out, err = reproduce("fc-3", "--scale", "smoke", "--dry-run", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert (plan["figure"], plan["trainings"], plan["done"]) == ("fc-3", 4, 0) and plan["seconds"] > 0
    assert "4 trainings, 0 of them done" in err and "on this machine, measured" in err
    assert not (tmp_path / "runs").exists() and not (tmp_path / "reproduced").exists()

    code, out, err = reproduce("fc-3", "--scale", "smoke", "--json")
    assert code == 0, err
    made = json.loads(out)
    folder = tmp_path / "reproduced" / "fc-3-smoke"
    assert made["report"] == "reproduced/fc-3-smoke"
    assert {f.name for f in folder.iterdir()} >= {"report.md", "index.html"}
    (picture,) = made["pictures"]
    assert all((folder / f"{picture['name']}.{kind}").stat().st_size for kind in ("csv", "png", "svg"))
    with (folder / f"{picture['name']}.csv").open(newline="") as file:
        header, *rows = list(csv.reader(file))
    assert header == picture["columns"]
    assert rows == [["" if v is None else str(v) for v in row] for row in picture["rows"]]

    code, out, err = reproduce("fc-3", "--scale", "smoke", "--report", "again")
    assert code == 0 and out == "" and "4 trainings, 4 of them done" in err and "images/s" not in err
    assert (tmp_path / "again" / "report.md").exists()


def test_a_table_of_numbers_beside_the_papers(reproduce, tmp_path):
    code, out, err = reproduce("zhou-supermasks", "--scale", "smoke", "--json")
    assert code == 0, err
    rows = json.loads(out)["paper"]
    assert [(r["line"], r["paper"]) for r in rows] == [
        ("one-shot, signed constants", "86.30 %"), ("learned", "95.30 %"),
        ("learned, rescaled, signed constants", "98.00 %")]  # fmt: skip
    text = (tmp_path / "reproduced" / "zhou-supermasks-smoke" / "report.md").read_text()
    for row in rows:
        assert row["here"].endswith(" %")
        assert f"| LeNet | {row['line']} | test accuracy |  | {row['paper']} | {row['here']} |" in text
    assert "the numbers mean nothing" in text


def test_stopped(reproduce, monkeypatch):
    """A signal while it trains: saved, and the command that goes on is this one."""
    from fastlth.experiments.figures import work

    run = work.running.run
    monkeypatch.setattr(work.running, "run", lambda *a, **k: (os.kill(os.getpid(), signal.SIGTERM), run(*a, **k))[1])
    code, out, err = reproduce("fc-3", "--scale", "smoke")
    assert code == 143 and out == ""
    assert "go on with: fastlth reproduce fc-3 --scale smoke\n" in err


def test_list(reproduce):
    code, out, err = reproduce("--list", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)["figures"]}
    assert rows["fc-4"]["trainings"] == 1050 and rows["fc-4"]["needs"] == []
    for name in rows:
        assert name in err


@pytest.mark.parametrize(("arguments", "sentence"), [
    (("fc-99",), "unknown figure 'fc-99'"),
    (("fc-4", "--list"), "--list shows all figures and would not draw fc-4"),
    ((), "reproduce needs a figure such as fc-4"),
    (("fc-3", "--scale", "long"), "unknown scale 'long'; choose one of: paper, short, smoke"),
])  # fmt: skip
def test_refusals(reproduce, arguments, sentence):
    code, out, err = reproduce(*arguments)
    assert code == 2 and out == "" and sentence in err
