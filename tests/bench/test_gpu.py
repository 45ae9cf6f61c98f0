"""The script for a GPU, as far as it can be tried without one: every part runs, nothing wrong gets timed."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import gpu, gpu_numerics, gpu_steps


def run(tmp_path, *more: str) -> tuple[int, dict]:
    code = gpu.main(["kernels", "--out", str(tmp_path / "out"), "--dry-run", *more])
    return code, json.loads((tmp_path / "out" / "kernels.json").read_text())


def test_dry_run(tmp_path):
    code, found = run(tmp_path)
    assert code == 0 and found["dry_run"]
    assert all(check["passed"] for check in found["checks"])
    subjects = {row["subject"] for row in found["rows"]}
    assert subjects == {"copy", "masked_step", "prune_lowest", "assemble_batch", "layer", "replicates"}
    assert {row["variant"] for row in found["rows"] if row["subject"] == "layer"} == {"ours", "library", "naive"}
    assert {row["role"] for row in found["rows"] if row["subject"] == "layer"} == {"forward", "forward and backward"}
    for row in found["rows"]:
        assert 0 < row["low"] <= row["microseconds"] <= row["high"]
    assert all("compiled" in name for name in found["left_out"])


def test_when_the_time_is_over_the_rest_is_named(tmp_path):
    code, found = run(tmp_path, "--minutes", "0")
    assert code == 0 and not found["rows"] and len(found["left_out"]) > 5


@pytest.mark.parametrize("value", [float("nan"), 1.0])
def test_a_wrong_kernel_is_found_and_not_timed(tmp_path, monkeypatch, value):
    right = gpu_numerics.masked_linear.masked_linear

    def wrong(*arguments):
        y = right(*arguments)
        return y + torch.zeros_like(y).index_fill(2, torch.tensor(3), value)

    monkeypatch.setattr(gpu_numerics.masked_linear, "masked_linear", wrong)
    code, found = run(tmp_path)
    assert code == 1 and "masked_linear: wrong" in found["left_out"]
    assert not any("lenet" in row.get("layer", "") for row in found["rows"]) and len(found["rows"]) > 5
    assert {check["check"].split()[0] for check in found["checks"] if not check["passed"]} == {"masked_linear"}


def test_a_check_that_cannot_be_made_has_failed_and_the_others_are_made(tmp_path):
    ledger = gpu.Ledger(tmp_path, torch.device("cpu"), 60.0)
    ledger.attempt("masked_conv2d 3x3", lambda: 1 / 0)
    ledger.attempt("bits", lambda: ledger.check("bits", 0.0, 0))
    written = json.loads((tmp_path / "kernels.json").read_text())["checks"]
    assert [(c["check"], c["passed"]) for c in written] == [
        ("masked_conv2d 3x3 cannot run: ZeroDivisionError division by zero", False), ("bits", True)]  # fmt: skip
    assert not ledger.right("masked_conv2d") and ledger.right("masked_linear", "bits")


def test_a_variant_that_fails_is_named_and_the_others_are_timed(tmp_path):
    ledger = gpu.Ledger(tmp_path, torch.device("cpu"), 60.0, rounds=3)

    def fails() -> None:
        raise RuntimeError("out of memory")

    medians = ledger.compare({"subject": "any"}, {"ours": lambda: None, "naive": fails})
    assert set(medians) == {"ours"} and ledger.left_out == ["any naive: RuntimeError out of memory"]


PARTS = {"invariants": None, "steps": {"peak", "step", "smaller nets"}, "profile": {"profile"},
         "lenet": {"replicates", "round", "search", "searches"}, "vgg": {"round", "search"},
         "together": {"together"}}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_dry_and_goes_on(part, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_steps, "COMPILE_SECONDS", math.inf)  # nothing is compiled
    words = [part, "--out", str(tmp_path), "--dry-run", "--minutes", "60"]  # enough for the slowest machine
    assert gpu.main(words) == 0
    found = json.loads((tmp_path / f"{part}.json").read_text())
    assert found["dry_run"] and all(check["passed"] for check in found["checks"])
    if PARTS[part] is None:
        assert len(found["checks"]) > 20
        return
    assert {row["subject"] for row in found["rows"]} == PARTS[part]
    assert not [name for name in found["left_out"] if ":" in name], found["left_out"]
    assert gpu.main(words) == 0
    assert json.loads((tmp_path / f"{part}.json").read_text())["rows"] == found["rows"]  # nothing is measured twice


@pytest.mark.gpu
def test_invariants_on_the_device(tmp_path):
    assert gpu.main(["invariants", "--out", str(tmp_path)]) == 0


def test_nan_is_the_largest_error():
    assert math.isnan(gpu_numerics._largest(0.5, float("nan"), 0.1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device(tmp_path, capsys):
    assert gpu.main(["kernels", "--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err
