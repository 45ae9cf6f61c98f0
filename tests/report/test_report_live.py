"""Following a run: the chart, and that it ends when the run is finished and not before."""

from __future__ import annotations

import io
import shutil

import pytest
from rich.console import Console

from fastlth.errors import TicketError
from fastlth.report import live
from fastlth.store.lock import Lock


@pytest.fixture
def growing(searched, tmp_path):
    """A run that writes some lines whenever its follower sleeps: (folder, sleep, how often it slept)"""
    source = searched.search.replicates[0].path
    folder = tmp_path / "runs" / "r0"
    folder.mkdir(parents=True)
    shutil.copy(source / "recipe.toml", folder)
    left = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert len(left) == 36  # four rounds of four evaluations, a result, a line for each of three layers, one of work
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        assert left, "it goes on after the run is finished"
        with (folder / "metrics.jsonl").open("a") as file:
            for _ in range(3):
                if left:
                    line = left.pop(0)
                    file.write(line[:30])
                    file.flush()
                    live.read(folder)  # half a line is no line
                    file.write(line[30:])

    return folder, sleep, slept


@pytest.mark.parametrize("terminal", [True, False])
def test_it_ends_with_the_run(growing, searched, terminal):
    folder, sleep, slept = growing
    out = io.StringIO()
    progress = live.follow(folder, Console(file=out, force_terminal=terminal, width=120), every=0.5, sleep=sleep)
    assert progress.finished and len(slept) == 11 and set(slept) == {0.5}
    assert [{**r, "event": "round"} for r in searched.search.replicates[0].rounds] == list(progress.rounds)
    text = out.getvalue()
    for r in progress.rounds:
        assert f"{r['density']:.2%}" in text and f"{r['early_stop_test_accuracy']:.2%}" in text
    assert text.count("80.20%") == 1 or terminal  # plain lines say each round once


def test_a_run_that_is_still_being_timed_is_waited_for(growing, tmp_path):
    folder, sleep, slept = growing
    recipe = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").unlink()
    with pytest.raises(TicketError, match="there is no run in"):
        live.find(folder)
    (folder / "lock").touch()
    with pytest.raises(TicketError, match="there is no run in"):  # whoever held it is gone
        live.find(folder)

    def later(seconds):
        if len(slept) == 0:
            assert "is still being timed" in out.getvalue()
            (folder / "recipe.toml").write_text(recipe)
        sleep(seconds)

    out, lock = io.StringIO(), Lock(folder / "lock")
    try:
        assert live.follow(folder.parent, Console(file=out, width=120), every=0.5, sleep=later).finished
    finally:
        lock.release()


def test_a_parent_means_the_replicate_written_last(searched, tmp_path):
    import os

    parent = tmp_path / "runs"
    for replicate in searched.search.replicates:
        shutil.copytree(replicate.path, parent / replicate.path.name)
    for name, when in (("r0", 2_000), ("r1", 1_000)):
        os.utime(parent / name / "metrics.jsonl", (when, when))
    assert live.find(parent).name == "r0"
    assert live.find(parent / "r1").name == "r1"
    with pytest.raises(TicketError, match="no run"):
        live.find(tmp_path)


def dots(lines):
    """(x, y) of every dot, from the left and from the top."""
    found = set()
    for row, line in enumerate(lines):
        for column, char in enumerate(line.partition("┤")[2]):
            for i, rows in enumerate(live.DOTS):
                found |= {(2 * column + i, 4 * row + j) for j, bit in enumerate(rows) if (ord(char) - 0x2800) & bit}
    return found


def test_chart_of_a_straight_line():
    line = [(0.0, 0.0), (79.0, 0.79)]
    lines = live.chart([[*line]], 40, 20, 79.0)
    assert len(lines) == 20 and all(len(line) == 9 + 40 for line in lines)
    assert dots(lines) == {(x, 79 - x) for x in range(80)}
    assert lines[0].split()[0] == "79.00" and lines[-1].split()[0] == "0.00"


def test_chart_has_no_gaps_where_it_is_steep():
    found = dots(live.chart([[(0.0, 0.0), (10.0, 0.0), (10.5, 1.0), (20.0, 1.0)]], 20, 10, 20.0))
    for x in range(39):
        here, there = ({y for a, y in found if a == b} for b in (x, x + 1))
        assert min(abs(a - b) for a in here for b in there) <= 1
        assert here == set(range(min(here), max(here) + 1))


def test_chart_of_odd_curves():
    assert len(dots(live.chart([[(0.0, 0.5), (10.0, 0.5)]], 5, 4, 10.0))) == 10  # flat
    assert dots(live.chart([[(5.0, 0.5)]], 5, 4, 10.0)) == set()  # one point is no line yet
    both = live.chart([[(0.0, 0.9), (10.0, 0.9)], [(0.0, 0.8), (5.0, 0.8)]], 20, 4, 10.0)
    top, bottom = ({x for x, y in dots(both) if y == row} for row in (0, 15))
    assert top == set(range(0, 40, 3)) and bottom == set(range(20))  # dotted all the way, solid halfway


def test_chart_leaves_out_the_steep_start():
    curve = [(float(i), 0.1 if i == 0 else 0.9 + i / 1000) for i in range(20)]
    lines = live.chart([curve], 10, 5, 19.0)
    assert lines[-1].split()[0] == "90.10" or float(lines[-1].split()[0].rstrip("┤")) > 80
