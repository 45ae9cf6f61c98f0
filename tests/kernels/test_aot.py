"""Kernels are compiled without a GPU, and what the compiler made of them is read right and judged."""

import dataclasses

import pytest

pytest.importorskip("triton")

import triton
from fastlth_kernels.launch import AotCase, jit, tl

from benchmarks import aot

GOOD = {"registers": 40, "stack": 0, "shared": 1024, "spills": 0, "loads_128": 3, "stores_128": 2, "tensor_core": 4,
        "tf32": 0, "instructions": 1000}  # fmt: skip


@jit
def _product(a, b, out, N: tl.constexpr, PRECISION: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None]
    total = tl.dot(tl.load(a + i * N + j), tl.load(b + i * N + j), input_precision=PRECISION)
    tl.store(out + i * N + j, total)


def case(dtype: str, precision: str = "ieee") -> AotCase:
    signature = {"a": f"*{dtype}", "b": f"*{dtype}", "out": "*fp32"}
    return AotCase("product", _product, signature, {"N": 64, "PRECISION": precision}, ("a", "b", "out"))


def test_tensor_cores_and_wide_loads_are_seen():
    for arch in aot.SHARED:
        found = aot.measure(case("bf16"), arch)
        assert found["tensor_core"] > 0 and found["loads_128"] > 0 and found["stores_128"] > 0
        assert 16 < found["registers"] <= 255 and found["shared"] > 0 and found["instructions"] > 50
        assert found["stack"] == found["spills"] == found["tf32"] == 0


def test_tf32_is_seen():
    """The interpreter computes the same either way."""
    ieee, fast = case("fp32"), case("fp32", "tf32")
    assert aot.measure(ieee, 80)["tf32"] == 0
    assert aot.measure(fast, 80)["tf32"] > 0
    [says] = aot.broken_laws(dataclasses.replace(fast, ieee=True), 80, aot.measure(fast, 80))
    assert "TF32" in says


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stack": 16}, "spills"), ({"spills": 2}, "spills"), ({"shared": 300_000}, "232448"),
        ({"tensor_core": 0}, "no tensor cores"), ({"tf32": 1}, "TF32"), ({}, None),
    ],
)  # fmt: skip
def test_laws(change, says):
    strict = AotCase("any", None, {}, tensor_cores=True, ieee=True)
    found = list(aot.broken_laws(strict, 90, {**GOOD, **change}))
    assert [says in found[0]] == [True] if says else not found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"registers": 41}, "registers 41, budget 40: worse"), ({"registers": 39}, "better, keep it with --update"),
        ({"loads_128": 2}, "worse"), ({"stores_128": 3}, "better"), ({"shared": 2048}, "worse"),
        ({"tensor_core": 2}, "worse"), ({"instructions": 1060}, "worse"), ({"instructions": 1040}, None), ({}, None),
    ],
)  # fmt: skip
def test_budget(change, says):
    found = list(aot.compare(GOOD, {**GOOD, **change}))
    assert says in found[0] if says else not found


def test_a_kernel_without_a_budget_fails():
    assert list(aot.compare(None, GOOD)) == ["is not in kernel_budget.toml: run --update"]


def test_the_command(tmp_path, monkeypatch, capsys):
    """Writes the numbers, holds them, and says which kernel and number differ: exit code 3."""
    budget = tmp_path / "budget.toml"
    monkeypatch.setattr(aot, "BUDGET", budget)
    monkeypatch.setattr(aot, "cases", lambda: iter([case("bf16")]))
    assert aot.main(["--update"]) == 0
    assert aot.main([]) == 0
    before = aot.measure(case("bf16"), 90)["registers"]
    budget.write_text(budget.read_text().replace(f"registers = {before}", f"registers = {before - 1}"))
    assert aot.main([]) == 3
    assert f"product sm_90: registers {before}, budget {before - 1}: worse" in capsys.readouterr().err
    with budget.open("a") as file:
        file.write('"gone sm_90" = {registers = 1}\n')
    assert aot.main([]) == 3
    assert "gone sm_90: is in kernel_budget.toml and nowhere else: run --update" in capsys.readouterr().err
    budget.write_text(budget.read_text().replace(f'"{triton.__version__}"', '"0.0.1"'))
    assert aot.main([]) == 0
    assert "only the laws" in capsys.readouterr().out


def test_every_case_has_a_name_of_its_own_and_a_kernel_of_the_package():
    names = [c.name for c in aot.cases()]
    assert len(names) == len(set(names)) > 10
    assert all(c.kernel.__module__.startswith("fastlth_kernels.") for c in aot.cases())
    assert all(set(c.kernel.arg_names) == set(c.signature) | set(c.constants) for c in aot.cases())


@pytest.mark.slow
def test_the_budget_is_kept(capsys):
    """`python -m benchmarks.aot`, under a minute: no kernel has become worse, and none better unnoticed."""
    code = aot.main([])
    assert code == 0, capsys.readouterr().err
