"""The numbers of a report, against the search's own results and ten lines of numpy."""

from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import pytest

import fastlth
from fastlth.report import curves, layers
from fastlth.report.figure import Axis, Curves, Panel, Point, Series, summarise, to_csv

QUANTITIES = {
    "accuracy-early-stop": ("early_stop_test_accuracy", "test_accuracy_at_early_stop"),
    "early-stop": ("early_stop_iteration", "early_stop_iteration"),
    "accuracy-end": ("test_accuracy", "test_accuracy_at_end"),
    "train-accuracy": ("train_accuracy", "train_accuracy_at_end"),
    "seconds": ("seconds", "seconds"),
    "images-per-second": ("images_per_second", "images_per_second"),
}


@pytest.mark.parametrize("name", QUANTITIES)
def test_csv_holds_means_and_ranges_of_the_search(name, searched, table):
    field, column = QUANTITIES[name]
    rows = [r for r in table(name) if r["series"] == "tickets"]
    a, b = (r.rounds for r in searched.search.replicates)
    assert len(rows) == 4
    for row, one, two in zip(rows, a, b, strict=True):
        assert float(row["density"]) == one["density"]
        assert float(row[column]) == pytest.approx(fmean([one[field], two[field]]), rel=1e-12)
        assert [float(row["low"]), float(row["high"])] == sorted([one[field], two[field]])
        assert row["replicates"] == "2"


def test_dense_line_is_the_dense_round_over_the_whole_range(searched, table):
    rows = [r for r in table("accuracy-early-stop") if r["series"] == "dense"]
    mean = fmean(r.rounds[0]["early_stop_test_accuracy"] for r in searched.search.replicates)
    assert [float(r["test_accuracy_at_early_stop"]) for r in rows] == [pytest.approx(mean, rel=1e-12)] * 2
    assert [float(r["density"]) for r in rows] == [1.0, searched.search.rounds[-1]["density"]]


def test_branches_are_controls(searched, table):
    rows = [r for r in table("accuracy-early-stop") if r["series"] == "random reinit"]
    assert [float(r["test_accuracy_at_early_stop"]) for r in rows] == [
        r["early_stop_test_accuracy"] for r in searched.control
    ]
    assert [float(r["density"]) for r in rows] == [r["density"] for r in searched.control]


def test_winning_ticket_is_ringed(searched, table):
    rows = [r for r in table("accuracy-early-stop") if r["series"] == "winning ticket"]
    winner = searched.search.winning_round
    assert len(rows) == (winner is not None)
    if rows:
        assert float(rows[0]["density"]) == searched.search.rounds[winner]["density"]


def test_training_curves_are_the_metrics(subjects, table):
    rows = [r for r in table("training-accuracy") if r["series"].startswith("round 3,")]
    values = {}
    for replicate in subjects[0].replicates:
        for e in replicate.evaluations:
            if e["round"] == 3:
                values.setdefault(e["iteration"], []).append(e["validation_accuracy"])
    assert len(rows) == 4 and [len(v) for v in values.values()] == [2] * 4
    assert {float(r["iteration"]): float(r["validation_accuracy"]) for r in rows} == {
        i: pytest.approx(fmean(v), rel=1e-12) for i, v in values.items()
    }


def test_density_per_layer_and_overlap_against_numpy(searched, table):
    tickets = [fastlth.load_ticket(r.ticket) for r in searched.search.replicates]
    masks = [[{n: m.numpy() for n, m in t.mask(k).items()} for k in range(4)] for t in tickets]
    found = {(r["series"], int(float(r["round"]))): float(r["density"]) for r in table("density-per-layer")}
    assert found == {(n.removesuffix(".weight"), k): m.mean() for k in range(4) for n, m in masks[0][k].items()}
    assert [s for s, k in found if k == 0] == ["fc1", "fc2", "output"]

    flat = [[np.concatenate([m.ravel() for m in r.values()]) for r in one] for one in masks]
    for row in table("overlap-rounds"):
        a, b = flat[0][int(row["round a"])], flat[0][int(row["round b"])]
        assert float(row["overlap"]) == (a & b).sum() / (a | b).sum()
    assert len(table("overlap-rounds")) == 16

    rows = [r for r in table("overlap-replicates") if r["series"] == "tickets"]
    for k, row in enumerate(rows, start=1):
        expected = sum(masks[0][k][n].mean() * masks[1][k][n].sum() for n in masks[0][k])
        both = (flat[0][k] & flat[1][k]).sum()
        assert float(row["overlap_relative_to_chance"]) == pytest.approx(both / expected, rel=1e-12)
    assert len(rows) == 3


def test_a_replicate_overlaps_itself_as_one_over_density(subjects):
    import dataclasses

    one = dataclasses.replace(subjects[0], replicates=(subjects[0].replicates[0],) * 2)
    [panel] = layers.overlap_between_replicates([one]).panels
    points = panel.series[0].points
    kept = [sum(int(((at == 0) | (at > k)).sum()) for at in one.replicates[0].pruned_at.values()) for k in (1, 2, 3)]
    chance = [
        sum(int(((at == 0) | (at > k)).sum()) ** 2 / at.size for at in one.replicates[0].pruned_at.values())
        for k in (1, 2, 3)
    ]
    assert [p.y for p in points] == [pytest.approx(a / b) for a, b in zip(kept, chance, strict=True)]


def test_summarise():
    assert summarise(0.5, [None, None]) is None and summarise(0.5, []) is None
    assert summarise(0.5, [math.nan]) is None
    assert summarise(0.5, [0.25, None]) == Point(0.5, 0.25)
    assert summarise(1, [3, 1, 2]) == Point(1.0, 2.0, 1.0, 3.0, 3)
    assert summarise(0.1, [0.3, 0.3]) == Point(0.1, 0.3, 0.3, 0.3, 2)


def test_csv_keeps_every_digit_and_odd_names():
    third = 1 / 3
    series = Series('a, "b"\nc', (Point(third, -third),))
    figure = Curves("n", "t", "c", Axis("x", "x"), Axis("y", "y"), (Panel("p", (series,)),))
    import csv
    import io

    [_, row] = list(csv.reader(io.StringIO(to_csv(figure))))
    assert row[1] == 'a, "b"\nc' and float(row[2]) == third and float(row[3]) == -third and row[4:] == ["", "", "1"]


def test_chosen_rounds(subjects):
    assert curves.choose(subjects[0]) == [0, 1, 2, 3]
    assert curves.choose(subjects[0], [2, 9]) == [2]
