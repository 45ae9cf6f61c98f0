"""``bench --check``: two gates that keep fastlth fast, held in benchmarks/expected.toml of a checkout.

*Counts* are deterministic and must equal the file: worse fails, and better fails too until the file is updated, so
that a gain is kept. *Ratios* against the rivals in the same run must stay above floors well under what was measured.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastlth import toml
from fastlth.bench import counts, loaders, rounds, startup, step
from fastlth.bench.subject import Row
from fastlth.errors import RecipeError

EXPECTED = Path("benchmarks") / "expected.toml"
SLACK = {"modules imported by --help": 0.05}  # share by which a count may differ, where libraries have a say


@dataclass(frozen=True)
class Verdict:
    """One row of the gate. ``expected`` is a count, or the floor of a ratio."""

    name: str
    expected: float | None
    found: float | None
    passed: bool
    says: str


def expected_file(checkout: Path) -> Path:
    """benchmarks/expected.toml of the checkout. Raises RecipeError outside one."""
    file = checkout / EXPECTED
    if not file.exists():
        raise RecipeError(f"bench --check needs a checkout of fastlth: there is no {file}; run it in one")
    return file


def check(checkout: Path) -> Iterator[Verdict]:
    """All verdicts, counts first; the ratios take about a minute and a half."""
    table = tomllib.loads(expected_file(checkout).read_text())
    floors = floors_here(table, torch.backends.cpu.get_cpu_capability())
    yield from judge_counts(table["counts"], counts.measure())
    for row in measured_rows():
        yield judge_ratio(row, floors)


def floors_here(table: Mapping[str, Any], capability: str) -> dict[str, float]:
    """The floors on a CPU that torch calls ``capability``: those of its own section go before the others."""
    return {**table["floors"], **table.get(f"floors-{capability}", {})}


def update(checkout: Path) -> None:
    """Write the counts found now into expected.toml; floors are set by hand."""
    file = expected_file(checkout)
    table = tomllib.loads(file.read_text())
    head = "".join(f"{line}\n" for line in file.read_text().splitlines() if line.startswith("#"))
    file.write_text(head + toml.dumps({**table, "counts": counts.measure()}))


def judge_counts(expected: Mapping[str, int], found: Mapping[str, int]) -> Iterator[Verdict]:
    """A verdict per count; one that is missing on either side fails. All counts are better when lower."""
    for name in {**expected, **found}:
        want, have = expected.get(name), found.get(name)
        if want is None or have is None:
            yield Verdict(name, want, have, False, "is not in the file" if want is None else "was not found")
        elif abs(have - want) <= SLACK.get(name, 0.0) * want:
            yield Verdict(name, want, have, True, "")
        else:
            change = f"{(have - want) / want:+.1%}" if want else f"{have - want:+d}"
            says = f"worse by {change}" if have > want else f"better by {change}: keep it with bench --check --update"
            yield Verdict(name, want, have, False, says)


def judge_ratio(row: Row, floors: Mapping[str, float]) -> Verdict:
    """A ratio fails only when even the upper end of its interval is below the floor, and its control was steady."""
    name = ratio_name(row)
    floor = floors.get(name)
    if floor is None:
        return Verdict(name, None, row["ratio"], False, "has no floor in the file")
    if row["ratio"] is None:
        return Verdict(name, floor, None, True, "not judged: the machine was too restless")
    fell = row["ratio_high"] < floor
    says = f"fell {1 - row['ratio'] / floor:.1%} below its floor" if fell else ""
    return Verdict(name, floor, row["ratio"], not fell, says)


def ratio_name(row: Row) -> str:
    """The name of a row's ratio in ``expected.toml``: what is compared with what, and for steps the density."""
    pair = [row["model"], row["dataset"]] if row["model"] else []
    density = [f"{row['density']:.3f}"] if row["subject"] == "step" else []
    return " ".join([row["subject"], *pair, row["path"], "vs", row["against"], *density])


def measured_rows(say: Callable[[str], Any] = lambda _: None) -> Iterator[Row]:
    """The rows whose ratios are gated."""
    for subject in (
        step.rows("lenet-300-100", "mnist", [0, 10, 20], seconds=3.0, peaks=False),
        step.rows("conv-2", "cifar-10", [0], seconds=6.0, peaks=False),
        rounds.rows("lenet-300-100", "mnist", seconds=8.0, peaks=False),
        loaders.rows("lenet-300-100", "mnist", seconds=3.0),
        startup.rows(seconds=8.0),
    ):
        for row in subject:
            if row["path"] not in ("eager", "compiled"):  # a rival against a rival says nothing about us
                say(ratio_name(row))
                yield row
