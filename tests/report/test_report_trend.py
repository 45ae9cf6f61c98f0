"""Benchmark records over time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastlth.errors import DataError
from fastlth.report import trend
from fastlth.report.figure import Curves
from fastlth.report.write import write

MACHINE = {"system": "Linux x86_64", "cpu": "AVX2", "cores": 2, "gpus": []}


def a_record(day, ratio, machine=MACHINE, against="PyTorch"):
    return {"when": f"2026-01-{day:02}T12:00:00+00:00", "commit": f"c{day}", "machine": machine, "rows": [
        {"subject": "step", "model": "lenet-5", "dataset": "mnist", "path": "ours", "density": 1.0, "against": against,
         "ratio": ratio, "ratio_low": 0.9, "ratio_high": 2.5},
        {"subject": "ticket", "path": "ours", "bytes": {"masks": 1, "theta0": 2}},
    ]}  # fmt: skip


@pytest.fixture
def records(tmp_path):
    def save(*documents, name="a.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(d) + "\n" for d in documents))
        return tmp_path

    return save


def curves(document):
    return [f for f in document.figures if isinstance(f, Curves)]


def test_ratios_in_the_order_of_time(records):
    [figure] = curves(trend.document([records(a_record(9, 2.0), a_record(3, 1.5), a_record(5, None))], "x"))
    [panel] = figure.panels
    line = next(s for s in panel.series if s.label != "equal")
    assert [(p.x, p.y, p.low, p.high) for p in line.points] == [(1.0, 1.5, 0.9, 2.5), (2.0, 2.0, 0.9, 2.5)]
    assert line.label == "lenet-5 mnist ours at 100.00% against PyTorch"
    assert panel.title == "Linux x86_64, 2 cores, AVX2"
    assert figure.x.names == ("2026-01-03\nc3", "2026-01-09\nc9")


def test_a_panel_for_each_machine_and_a_line_for_each_rival(records):
    other = {**MACHINE, "cores": 16, "gpus": ["NVIDIA H200"]}
    [figure] = curves(trend.document([records(a_record(1, 1.0), a_record(2, 1.1, against="lecode"),
                                              a_record(3, 1.2, machine=other))], "x"))  # fmt: skip
    titles = [p.title.removeprefix("Linux x86_64, ") for p in figure.panels]
    assert titles == ["2 cores, AVX2", "16 cores, AVX2, NVIDIA H200"]
    assert [[s.points[0].y for s in p.series if s.label != "equal" and s.points] for p in figure.panels] == [
        [1.0, 1.1], [1.2],
    ]  # fmt: skip


def test_comparisons_of_commits_are_ratios_of_seconds(records):
    runs = [{"time_ratio": 1.2, "time_ratio_low": 1.1, "time_ratio_high": 1.3},
            {"time_ratio": 1.4, "time_ratio_low": 1.3, "time_ratio_high": 1.5},
            {"time_ratio": None, "time_ratio_low": 0.5, "time_ratio_high": 1.5}]  # fmt: skip
    row = {"subject": "compare", "model": "lenet", "base": "v1", "head": "main", "runs": runs}
    [figure] = curves(trend.document([records({**a_record(1, 1.0), "rows": [row]})], "x"))
    line = figure.panels[0].series[0]
    assert line.label == "lenet main against v1" and [p.y for p in line.points] == [1.4]
    assert figure.y.column == "time_ratio"


def test_values_of_one_record_stand_beside_each_other(records):
    record = a_record(1, 1.0)
    record["rows"] = [{**record["rows"][0], "ratio": r} for r in (1.0, 1.1, 1.2)]
    [figure] = curves(trend.document([records(record)], "x"))
    xs = [p.x for p in figure.panels[0].series[0].points]
    assert len(set(xs)) == 3 and xs == sorted(xs) and 0.5 < xs[0] and xs[-1] < 1.5


@pytest.mark.parametrize("text", ["", "nonsense\n", '{"when": "yesterday", "rows": []}\n', '[1]\n{"rows": 3}\n'])
def test_no_records(text, tmp_path):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match="no benchmark records"):
        trend.document([tmp_path], "x")
    with pytest.raises(DataError):
        trend.document([tmp_path / "none"], "x")


def test_the_records_of_this_repository(tmp_path):
    document = trend.document([Path(__file__).parents[2] / "benchmarks" / "results"], "fastlth report --bench")
    assert "bench compare" in write(document, tmp_path).read_text()
