"""Benchmark records over time: ratios with their intervals, per subject and machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastlth.errors import DataError
from fastlth.report.document import Code, Document, Section, Table
from fastlth.report.figure import Axis, Curves, Look, Panel, Point, Series
from fastlth.report.subject import records as lines_of

MANY_TICKS = 5

Key = tuple[float, str, str]
"""of a record: when, commit, machine"""


@dataclass(frozen=True)
class Measured:
    """One row of one record."""

    when: float
    """seconds since 1970"""
    commit: str
    machine: str
    subject: str
    what: str
    """who is compared with whom, on what"""
    ratio: float
    low: float
    high: float
    faster: bool
    """above 1 is faster; False: it is a ratio of seconds, and above 1 is slower"""

    @property
    def key(self) -> Key:
        """What it has in common with the other measurements of one sitting."""
        return self.when, self.commit, self.machine


def document(places: Sequence[Path], command: str) -> Document:
    """``places`` are .jsonl files or folders of them. Raises DataError where they hold no measured ratio."""
    rows = sorted(_read(places), key=lambda r: r.when)
    if not rows:
        raise DataError(f"no benchmark records in {', '.join(map(str, places))}; give a folder of .jsonl records, such "
                        "as benchmarks/results of a checkout")  # fmt: skip
    records = list(dict.fromkeys(r.key for r in rows))
    days = [_day(r.when) for r in (rows[0], rows[-1])]
    span = days[0] if days[0] == days[1] else f"{days[0]} to {days[1]}"
    subjects = dict.fromkeys((r.subject, r.faster) for r in rows)
    figures = tuple(_figure(subject, faster, rows, records) for subject, faster in subjects)
    newest = {(r.subject, r.what, r.machine): r for r in rows}
    table = Table("", ("subject", "what", "machine", "commit", "day", "ratio", "95 %"), tuple(
        (r.subject, r.what, r.machine, r.commit, _day(r.when), f"{r.ratio:.3f}", f"{r.low:.3f} to {r.high:.3f}")
        for r in newest.values()
    ))  # fmt: skip
    return Document(
        "Benchmarks over time",
        (f"{len(rows)} ratios, measured from {span}." if days[0] != days[1] else f"{len(rows)} ratios of {span}.",
         "Every ratio is of paired, alternated timings made in one run on one machine."),
        (Section("Ratios", figures), Section("Newest of each", (table,)),
         Section("Commands", (Code("This report", (command,)),))),
    )  # fmt: skip


def _figure(subject: str, faster: bool, rows: Iterable[Measured], records: Sequence[Key]) -> Curves:
    """Records stand at even distances in their order: they come in bursts, weeks apart."""
    own = [r for r in rows if (r.subject, r.faster) == (subject, faster)]
    whats = list(dict.fromkeys(r.what for r in own))
    own_records = [key for key in records if any(r.key == key for r in own)]
    panels = []
    for machine in dict.fromkeys(r.machine for r in own):
        series = []
        for i, what in enumerate(whats):
            here = [key for key in own_records if key[2] == machine]
            found = {key: [r for r in own if (r.key, r.what) == (key, what)] for key in here}
            points = tuple(
                Point(records.index(key) + 1 + _beside(i, len(whats), j, len(same)), r.ratio, r.low, r.high)
                for key, same in found.items() for j, r in enumerate(same)
            )  # fmt: skip
            series.append(Series(what, points, Look(colour=i, marker=i, dash=i, bars=True)))
        places = [records.index(key) + 1 for key in own_records if key[2] == machine]
        one = (Point(min(places) - 0.5, 1.0), Point(max(places) + 0.5, 1.0))
        series.append(Series("equal", one, Look(colour=-1, dash=2, marker=None, thin=True), legend=False))
        panels.append(Panel(machine, tuple(series)))
    meaning = "Images/s of ours / of the other: above 1 is faster." if faster else (
        "Seconds of the first named / of the second: above 1 is slower.")  # fmt: skip
    step = -(-len(own_records) // MANY_TICKS)
    ticks = {float(records.index(key) + 1): f"{_day(key[0])}\n{key[1]}" for key in own_records[::step]}
    x = Axis("record (day, commit)", "record", ticks=tuple(ticks), names=tuple(ticks.values()))
    y = Axis("ratio" if faster else "ratio of seconds", "ratio" if faster else "time_ratio")
    return Curves(f"bench-{subject}", f"bench {subject}", f"{meaning} Bars are 95 % intervals.", x, y, tuple(panels))


def _beside(i: int, count: int, j: int, same: int) -> float:
    """Where the j-th of ``same`` values of line i of ``count`` stands in its record's place, which is 1 wide."""
    width = 0.7 / count
    return width * (i - (count - 1) / 2 + (j - (same - 1) / 2) / same)


def _read(places: Sequence[Path]) -> Iterator[Measured]:
    for place in places:
        files = sorted(place.glob("*.jsonl")) if place.is_dir() else [place]
        for file in files:
            for record in lines_of(file):
                yield from _rows(record)


def _rows(record: Mapping[str, Any]) -> Iterator[Measured]:
    """Rows with a ratio and its interval; those whose control strayed have none."""
    try:
        when = datetime.fromisoformat(record["when"])
        rows = list(record["rows"])
    except (KeyError, TypeError, ValueError):
        return  # a record of another kind
    time = when.replace(tzinfo=when.tzinfo or UTC).timestamp()
    machine, commit = _machine(record.get("machine") or {}), str(record.get("commit", ""))
    for row in rows:
        found = row.get("ratio"), row.get("ratio_low"), row.get("ratio_high")
        faster = True
        if row.get("runs"):  # of bench compare: several runs, the last one that counts decided
            clean = [run for run in row["runs"] if run.get("time_ratio") is not None]
            last = clean[-1] if clean else {}
            found = last.get("time_ratio"), last.get("time_ratio_low"), last.get("time_ratio_high")
            faster = False
        ratio, low, high = found
        if ratio is None or low is None or high is None:
            continue
        yield Measured(time, commit, machine, str(row.get("subject", "")), _what(row), ratio, low, high, faster)


def _what(row: Mapping[str, Any]) -> str:
    parts = [str(row[key]) for key in ("model", "dataset", "path") if row.get(key)]
    if row.get("density") is not None:
        parts.append(f"at {row['density']:.2%}")
    if row.get("against"):
        parts.append(f"against {row['against']}")
    if row.get("head"):
        parts.append(f"{row['head']} against {row.get('base', '')}")
    return " ".join(parts)


def _machine(machine: Mapping[str, Any]) -> str:
    gpus = machine.get("gpus") or []
    cores = f"{machine.get('cores', '?')} cores, {machine.get('cpu', '')}".rstrip(", ")
    return ", ".join([str(machine.get("system", "unknown machine")), cores, *map(str, gpus)])


def _day(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%d")
