"""The gate: worse fails, better fails until it is written down, and a restless machine judges nothing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import tomllib
from datetime import datetime
from pathlib import Path

import pytest
import torch

from fastlth import bench
from fastlth.bench import check, counts, memory, record, rounds, step
from fastlth.bench.paired import Paired
from fastlth.bench.rivals import Eager, Plain
from fastlth.bench.subject import Ours, masks_of_round, random_source, recipe_for, row
from fastlth.composition import compose
from fastlth.training.engines.graph import GraphEngine
from tests.helpers import CPU, assert_masked

EXPECTED = {"a": 100, "b": 0, "modules imported by --help": 400}


def verdicts(found):
    return {v.name: v for v in check.judge_counts(EXPECTED, {**EXPECTED, **found})}


def test_equal_counts_pass():
    assert all(v.passed for v in verdicts({}).values())


@pytest.mark.parametrize(("found", "says"), [({"a": 101}, "worse by +1.0%"), ({"b": 1}, "worse by +1"),
                                             ({"a": 99}, "better by -1.0%"), ({"c": 1}, "is not in the file"),
                                             ({"modules imported by --help": 430}, "worse")])  # fmt: skip
def test_any_other_count_fails_and_says_why(found, says):
    (name,) = found
    all_of_them = verdicts(found)
    assert not all_of_them[name].passed and says in all_of_them[name].says
    assert all(v.passed for n, v in all_of_them.items() if n != name)


def test_a_count_that_is_gone_fails():
    assert [v.name for v in check.judge_counts(EXPECTED, {"a": 100, "b": 0}) if not v.passed] == [
        "modules imported by --help"
    ]


def test_libraries_may_move_the_imports_a_little():
    assert verdicts({"modules imported by --help": 410})["modules imported by --help"].passed


def timing(ratio, low, high):
    return Paired(seconds_a=1.0, seconds_b=ratio or 1.0, ratio=ratio, low=low, high=high, control_low=0.99,
                  control_high=1.01, pairs=20, quantiles_a=(0.9, 1.0, 1.1))  # fmt: skip


@pytest.mark.parametrize(("ratio", "low", "high", "passed"), [
    (2.0, 1.9, 2.1, True), (1.5, 1.4, 1.6, True), (1.4, 1.2, 1.51, True), (1.4, 1.35, 1.45, False),
    (None, 0.5, 3.0, True),
])  # fmt: skip
def test_a_ratio_falls_only_when_its_whole_interval_is_below_the_floor(ratio, low, high, passed):
    recipe = recipe_for("lenet-300-100", "mnist")
    one = row("step", recipe, "ours", "eager", 1.0, timing(ratio, low, high), 60)
    name = "step lenet-300-100 mnist ours vs eager 1.000"
    verdict = check.judge_ratio(one, {name: 1.5})
    assert verdict.name == name and verdict.passed is passed
    assert not check.judge_ratio(one, {}).passed  # a row without a floor is not forgotten


def test_a_cpu_may_have_floors_of_its_own():
    table = {"counts": {}, "floors": {"a": 2.0, "b": 3.0}, "floors-AVX2": {"b": 1.0}}
    assert check.floors_here(table, "AVX2") == {"a": 2.0, "b": 1.0}
    assert check.floors_here(table, "AVX512") == {"a": 2.0, "b": 3.0}
    file = tomllib.loads(check.EXPECTED.read_text())
    own = [names for section, names in file.items() if section.startswith("floors-")]
    assert all(names.keys() <= file["floors"].keys() for names in own)


@pytest.mark.slow
def test_the_file_has_a_floor_for_every_gated_row_and_every_count(monkeypatch):
    table = tomllib.loads(check.EXPECTED.read_text())
    for module in (step, rounds, check.loaders, check.startup):
        monkeypatch.setattr(f"{module.__name__}.paired", lambda a, b, **_: timing(2.0, 1.9, 2.1))
    names = {check.ratio_name(r) for r in check.measured_rows()}
    assert names >= set(table["floors"]) and names - set(table["floors"]) <= {n for n in names if "ffcv" in n}


@pytest.mark.slow
def test_counts_are_those_of_the_file():
    table = tomllib.loads(check.EXPECTED.read_text())
    assert [f"{v.name}: {v.says}" for v in check.judge_counts(table["counts"], counts.measure()) if not v.passed] == []


def test_a_planted_host_read_and_a_planted_operation_are_counted(monkeypatch):
    recipe = compose("lenet-300-100", "digits", settings=CPU).recipe
    before = counts.step(recipe)
    assert before["host reads"] == 0 and before["optimizer launches"] == 1

    from fastlth.training.optim import MaskedOptimizer

    inner = MaskedOptimizer.step

    def more(self, pruned):
        inner(self, pruned)
        for p in self.parameters.values():
            p.data.mul_(1.0)

    monkeypatch.setattr(MaskedOptimizer, "step", more)
    after = counts.step(recipe)
    assert after["operations"] == before["operations"] + 6
    assert after["bytes"] == before["bytes"] + 2 * 4 * 50_610
    monkeypatch.setattr(MaskedOptimizer, "step", lambda self, pruned: (inner(self, pruned), float(self.lr)))
    assert counts.step(recipe)["host reads"] == 1


@pytest.mark.parametrize(("planted", "expected"), [
    (lambda loss: loss, (0, 0)), (lambda loss: loss + torch.tensor(1.0, device="cpu"), (0, 1)),
    (lambda loss: loss * loss.item(), (1, 0)),
])  # fmt: skip
def test_a_step_of_a_gpu_that_is_not_there_shows_what_it_does_on_the_host(monkeypatch, planted, expected):
    settings = {**CPU, "compute.engine": "graph", "compute.precision": "bf16", "data.augment": "flip-crop",
                "data.validation": 64}  # fmt: skip
    recipe = compose("conv-2", "cifar-10", settings=settings).recipe
    inner = GraphEngine._forward

    def forward(self, images, labels):
        assert images.device == labels.device == torch.device("cuda:0")
        loss, hits = inner(self, images, labels)
        return planted(loss), hits

    monkeypatch.setattr(GraphEngine, "_forward", forward)
    found = counts.on_paper(recipe)
    assert (found["host reads"], found["operations elsewhere"] > 0) == (expected[0], expected[1] > 0)
    assert found["graphs"] == 2


def test_masks_of_a_round_have_its_counts_and_are_obeyed_by_all():
    recipe = recipe_for("lenet-300-100", "digits")
    recipe = dataclasses.replace(recipe, compute=compose("lenet-300-100", "digits", settings=CPU).recipe.compute)
    masks, density = masks_of_round(recipe, 2)
    assert [int(m.sum()) for m in masks.values()] == [12_288, 19_200, 810]
    assert density == pytest.approx(32_298 / 50_200)
    source = random_source("digits", images=recipe.data.validation + 100)
    ours, eager, plain = Ours(recipe, source), Eager(recipe, source.train, masks), Plain(recipe, source.train, masks)
    ours.prune(masks)
    for way in (ours, eager, plain):
        way.steps(3)
    assert_masked(ours.engine.weights(), masks)
    for rival in (eager, plain):
        for name, mask in masks.items():
            assert (rival.model.get_parameter(name).detach()[~mask] == 0).all()
            assert torch.count_nonzero(rival.model.get_parameter(name)[mask]) > 0


@pytest.mark.parametrize(("model", "dataset", "batch", "shape"), [
    ("lenet-300-100", "fashion-mnist", 128, (1, 28, 28)), ("vgg-16", "cifar100", 128, (3, 32, 32)),
    ("conv-2", "cifar10", 60, (3, 32, 32)), ("lenet-900-300", "mnist", 60, (1, 28, 28)),
])  # fmt: skip
def test_every_data_set_of_the_catalogue_has_a_recipe_for_timing(model, dataset, batch, shape):
    recipe = recipe_for(model, dataset)
    assert (recipe.train.batch_size, recipe.data.facts.shape, recipe.data.validation) == (batch, shape, 1_000)
    pixels = random_source(dataset, images=10).train.pixels
    assert (pixels.shape[3], *pixels.shape[1:3]) == shape


def test_bench_takes_shapes_by_name(command):
    code, out, err = command("bench", "step", "lenet-300-100", "imagefolder:/flowers")
    assert (code, out) == (2, "") and "bench takes the shape of mnist, " in err


def test_each_comparison_is_told_when_it_ends_also_in_a_log(capsys):
    from fastlth.cli import bench

    one = {"subject": "step", "model": "net", "dataset": "set", "path": "ours", "against": "eager", "density": 1.0,
           "n": 6, "images_per_second": 2.0, "against_images_per_second": 1.0, "ratio": 2.0, "ratio_low": 1.9,
           "ratio_high": 2.1}  # fmt: skip

    def rows():
        assert bench.FIRST in capsys.readouterr().err
        yield one
        assert "measured step net ours against eager" in capsys.readouterr().err

    assert bench._rows(False, [rows()], None, bench.FIRST) == [one]
    assert "2.00" in capsys.readouterr().err


def test_the_rivals_learn():
    """A rival that does not train would be an easy one to beat."""
    recipe = dataclasses.replace(recipe_for("lenet-300-100", "digits"))
    from fastlth.data.sources import data_root, load

    source = load("digits", data_root())
    masks, _ = masks_of_round(recipe, 0)
    from fastlth.bench.rivals import normalised
    from fastlth.catalogue import DATASETS

    images = normalised(source.test, DATASETS["digits"])
    labels = torch.from_numpy(source.test.labels)
    for rival in (Eager(recipe, source.train, masks), Plain(recipe, source.train, masks)):
        rival.steps(120)
        rival.model.eval()
        accuracy = (rival.model(images).argmax(1) == labels).float().mean()
        assert accuracy > 0.9


def test_outside_a_checkout_check_says_so(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = command("bench", "--check")
    assert code == 2 and "needs a checkout" in err


def test_a_regression_exits_with_3_and_names_the_row(command, monkeypatch, tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "expected.toml").write_text('[counts]\n"step x operations" = 10\n\n[floors]\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(counts, "measure", lambda: {"step x operations": 12})
    monkeypatch.setattr(check, "measured_rows", lambda: iter(()))
    code, out, err = command("bench", "--check", "--json")
    assert code == 3 and "step x operations: worse by +20.0% (expected 10, found 12)" in err
    assert json.loads(out)["verdicts"][0]["passed"] is False
    code, _, _ = command("bench", "--check", "--update")
    assert code == 0 and tomllib.loads((tmp_path / "benchmarks" / "expected.toml").read_text())["counts"] == {
        "step x operations": 12
    }
    assert command("bench", "--check")[0] == 0


def test_markdown_goes_to_stdout_and_the_exit_code_stays(command, monkeypatch, tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "expected.toml").write_text('[counts]\n"a|b" = 10\nc = 1\n\n[floors]\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(counts, "measure", lambda: {"a|b": 12, "c": 1})
    monkeypatch.setattr(check, "measured_rows", lambda: iter(()))
    code, out, _ = command("bench", "--check", "--markdown")
    assert code == 3
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert table == ["|  | gate | expected | found |  |", "| --- | --- | --- | --- | --- |",
                     "| FAIL | a\\|b | 10 | 12 | worse by +20.0% |", "| ok | c | 1 | 1 |  |"]  # fmt: skip


@pytest.mark.parametrize(("options", "says"), [
    (["--markdown"], "--markdown belongs to --check"), (["--update"], "--update belongs to --check"),
    (["--check", "--markdown", "--json"], "choose one"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(command, options, says):
    code, out, err = command("bench", *options)
    assert code == 2 and out == "" and says in err


def test_bench_step_prints_one_document_and_draws(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    megabytes = {"ours": 100, "eager": 200, "plain": 300}
    monkeypatch.setattr(memory, "peak_bytes", lambda recipe, subject, paths, round: {p: megabytes[p] for p in paths})
    code, out, err = command("bench", "step", "lenet-300-100", "digits", "--rounds", "0,20",
                          "--seconds", "0.2", "--no-compiled", "--json", "--plot", "step.svg",
                          "--record", "sub/r.jsonl")  # fmt: skip
    assert code == 0, err
    document = json.loads(out)
    fields = {"subject", "model", "dataset", "path", "density", "images_per_second", "against", "ratio", "ratio_low",
              "ratio_high"}  # fmt: skip
    assert all(fields <= set(r) for r in document["rows"]) and {"machine", "versions"} <= set(document)
    assert [(r["path"], r["against"]) for r in document["rows"]] == [
        ("ours", "eager"), ("ours", "eager"), ("ours", "plain"), ("eager", "plain"),
    ]  # fmt: skip
    assert document["rows"][0]["density"] == 1.0 and document["rows"][1]["density"] < 0.02
    assert [(r["peak_bytes"], r["against_peak_bytes"]) for r in document["rows"]] == [
        (100, 200), (100, 200), (100, 300), (200, 300)
    ]  # fmt: skip
    assert (tmp_path / "step.svg").read_text().count("<path") > 10
    kept = json.loads((tmp_path / "sub" / "r.jsonl").read_text())
    assert {k: kept[k] for k in document} == document
    first, last = kept["accuracy"].values()
    assert first > 0.9 and last > 0.9


def test_records_are_added_and_none_is_changed(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "accuracy", lambda: {"net": 0.5})
    for number in (1, 2):
        record.append({"rows": [number]}, tmp_path / "r.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert lines == [{"rows": [n], "accuracy": {"net": 0.5}} for n in (1, 2)]


def test_a_document_says_when_where_and_of_what(monkeypatch, tmp_path):
    document = bench.document([])
    assert datetime.fromisoformat(document["when"]).tzinfo is not None
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
                          capture_output=True, text=True)  # fmt: skip
    assert document["commit"] == (done.stdout.strip() or None)
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "lib" / "fastlth" / "bench" / "__init__.py"))
    assert bench.commit() is None
