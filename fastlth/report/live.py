"""A run in the terminal while it goes on: the round's curve beside the dense net's, and the rounds so far.

It follows metrics.jsonl from anywhere that can read it, and costs the search nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlth.errors import TicketError
from fastlth.recipe import Recipe
from fastlth.report.subject import records
from fastlth.search import over, winning_round
from fastlth.store.lock import held
from fastlth.store.run import LOCK, METRICS, RECIPE, read_recipe, run_folders

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

EVERY = 1.0  # seconds between looks at the file
WIDTH, HEIGHT = 64, 12  # of the chart, in characters
MOST_ROWS = 12  # of the table; earlier rounds scroll out
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille character: [column][row]


@dataclass(frozen=True)
class Progress:
    """What metrics.jsonl says so far."""

    recipe: Recipe
    rounds: tuple[Mapping[str, Any], ...]
    """results of the finished rounds"""
    evaluations: tuple[Mapping[str, Any], ...]

    @property
    def finished(self) -> bool:
        """Whether the search has nothing left to train."""
        return over(self.recipe, self.rounds)


def follow(
    path: Path, console: Console, *, every: float = EVERY, sleep: Callable[[float], None] = time.sleep
) -> Progress:
    """Show the run until it is finished; without a terminal, a line per finished round.

    Raises TicketError where there is no run at ``path``.
    """
    if (folder := find(path)) is None:
        console.print(f"{path} is still being timed", highlight=False, soft_wrap=True)
    while folder is None:
        sleep(every)
        folder = find(path)
    looks = _looks(folder, every, sleep)
    if not console.is_terminal:
        return _lines(looks, console)
    from rich.live import Live

    with Live(console=console, auto_refresh=False) as live:
        for progress in looks:
            live.update(view(progress, folder, _idle(folder)), refresh=True)
    return progress


def _looks(folder: Path, every: float, sleep: Callable[[float], None]) -> Iterator[Progress]:
    """What there is, again and again until the run is finished; read only where the file has grown."""
    size = -1
    while True:
        if (now := _size(folder)) != size:
            size, progress = now, read(folder)
        yield progress
        if progress.finished:
            return
        sleep(every)


def find(path: Path) -> Path | None:
    """The run folder: ``path`` itself, or of the replicates in it the one written last; None while it is there and
    what ``auto`` becomes is still being found out. Raises TicketError where there is none."""
    if (path / RECIPE).exists():
        return path
    folders = run_folders(path).values()
    found = [folder for folder in folders if (folder / RECIPE).exists()]
    if not found and any(held(folder / LOCK) for folder in (path, *folders)):
        return None
    if not found:
        raise TicketError(f"there is no run in {path}; give a run folder r<seed> ('fastlth runs' lists the runs)")
    return max(found, key=lambda folder: -_idle(folder))


def read(folder: Path) -> Progress:
    """What the files of a run say now. Raises TicketError where its recipe cannot be read."""
    recipe, _ = read_recipe(folder / RECIPE)
    lines = list(records(folder / METRICS))
    rounds = tuple(line for line in lines if line.get("event") == "round")
    return Progress(recipe, rounds, tuple(line for line in lines if line.get("event") == "evaluation"))


def view(progress: Progress, folder: Path, idle: float) -> RenderableType:
    """The chart, the table and a line about where it stands."""
    from rich.console import Group
    from rich.text import Text

    from fastlth.ui import duration, rounds_table

    recipe, rounds = progress.recipe, progress.rounds
    number = len(rounds)
    head = f"{recipe.model.name} on {recipe.data.name}, seed {recipe.seeds.base}  {folder}"
    if progress.finished:
        where = f"finished: {number} rounds"
    else:
        at = [e["iteration"] for e in progress.evaluations if e["round"] == number]
        where = f"round {number}/{recipe.prune.rounds}, iteration {max(at, default=0):,}/{recipe.train.iterations:,}"
        where += f"; nothing new for {duration(idle)}" if 60 < idle < float("inf") else ""
    shown = number - 1 if progress.finished else number
    curves = [_curve(progress, k) for k in dict.fromkeys((0, shown))]
    parts: list[RenderableType] = [Text(head, style="bold"), Text(where)]
    if any(curves):
        legend = "validation accuracy; dotted: dense, solid: this round" if shown else "validation accuracy, dense"
        parts += [Text(legend, style="dim"), Text("\n".join(chart(curves, WIDTH, HEIGHT, recipe.train.iterations)))]
    if rounds:
        parts.append(rounds_table(rounds[-MOST_ROWS:], winning_round([rounds]) if progress.finished else None))
    return Group(*parts)


def chart(curves: Sequence[Sequence[tuple[float, float]]], width: int, height: int, right: float) -> list[str]:
    """Curves of (x, y) points as lines of braille text with a scale of per cent on the left; the last is solid.

    x runs from 0 to ``right``. The y scale leaves out the lowest tenth of the values, where the steep start lies.
    """
    values = sorted(y for curve in curves for _, y in curve)
    low, high = values[len(values) // 10], values[-1]
    span = (high - low) or 0.01
    cells = [[0] * width for _ in range(height)]
    for number, curve in enumerate(curves):
        solid = number == len(curves) - 1
        before: int | None = None
        for column in range(2 * width):
            y = _at(curve, right * column / (2 * width - 1))
            if y is None or y < low or not (solid or column % 3 == 0):
                before = None
                continue
            row = round((high - y) / span * (4 * height - 1))
            # where it is steep, a column's dots reach up or down to those of the column before
            first, last = sorted((row, row if before is None else before + (row > before) - (row < before)))
            for one in range(first, last + 1):
                cells[one // 4][column // 2] |= DOTS[column % 2][one % 4]
            before = row
    labels = {0: high, height - 1: low}
    return [
        f"{f'{100 * labels[i]:.2f}' if i in labels else '':>7} ┤" + "".join(chr(0x2800 + cell) for cell in line)
        for i, line in enumerate(cells)
    ]


def _at(curve: Sequence[tuple[float, float]], x: float) -> float | None:
    """The curve's height at x, straight between its points; None outside them."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def _curve(progress: Progress, round: int) -> list[tuple[float, float]]:
    return [(e["iteration"], e["validation_accuracy"]) for e in progress.evaluations
            if e["round"] == round and e["validation_accuracy"] is not None]  # fmt: skip


def _lines(looks: Iterator[Progress], console: Console) -> Progress:
    said = 0
    for progress in looks:
        for r in progress.rounds[said:]:
            console.print(f"round {r['round']:>2}  density {r['density']:7.2%}  early stop "
                          f"{r['early_stop_iteration']:>6,}  test {r['early_stop_test_accuracy']:.2%} there, "
                          f"{r['test_accuracy']:.2%} at the end", highlight=False)  # fmt: skip
        said = len(progress.rounds)
    return progress


def _size(folder: Path) -> int:
    try:
        return (folder / METRICS).stat().st_size
    except OSError:
        return 0


def _idle(folder: Path) -> float:
    """Seconds since the run last wrote a line."""
    try:
        return time.time() - (folder / METRICS).stat().st_mtime
    except OSError:
        return float("inf")
