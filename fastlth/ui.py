"""What a person sees while a search runs, on stderr, and the guard that turns signals into a safe stop.

Decides nothing: the view is shown events, the guard remembers a signal number.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from fastlth.experiments.trial import TrialFinished, TrialStarted
from fastlth.happenings import Beside, Happening, Notice, Started
from fastlth.recipe import Recipe
from fastlth.search import InRound, RoundFinished, RoundStarted
from fastlth.training.early_bird import MaskDrawn
from fastlth.training.trainer import Evaluated

LONG_SECONDS = 600.0  # a search that takes longer than this says so
PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal


class StopGuard:
    """While it is entered, the first SIGINT, SIGTERM or SIGUSR1 asks for a stop at the next safe point.

    A second SIGINT leaves at once: files are written by renaming, so nothing can be half-written.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> int | None:
        return self.requested

    def __enter__(self) -> StopGuard:
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if number := getattr(signal, name, None):  # Windows has no SIGUSR1
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            if os.isatty(2):
                os.write(2, b"\x1b[?25h\n")  # the live view hides the cursor
            os._exit(128 + number)
        self.requested = self.requested or number
        os.write(2, b"\nstopping at the next safe point and saving; Ctrl-C again leaves at once\n")


class View:
    """Shows a search's events: a live bar on a terminal, plain lines elsewhere, and one table at the end."""

    def __init__(self, console: Console, header: str = "", shorter: str = "") -> None:
        self._console, self._header, self._shorter = console, header, shorter
        self._progress = Progress(  # 80 columns hold all of it
            TextColumn("round {task.fields[round]}/{task.fields[rounds]} {task.fields[density]:.1%}"),
            BarColumn(12), TextColumn("{task.completed:,.0f}/{task.total:,.0f}"), _TimeLeft(),
            TextColumn("{task.fields[rate]:,.0f} images/s {task.fields[accuracy]}"),
            console=console, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task(
            "", round=0, rounds=0, density=1.0, rate=0.0, accuracy="", left=None, visible=False
        )
        self._pace = _Pace()
        self._said_long = False
        self.began = False
        """whether anything had to be trained"""
        self._line_at = time.monotonic()
        self._race = _Race()

    def __enter__(self) -> View:
        if self._console.is_terminal:
            self._print("reading the data; what is still auto is timed")
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def __call__(self, event: Happening | Beside) -> None:
        match event:
            case Beside():
                self._beside(event)
            case Started():
                self._started(event)
            case Notice():
                self._print(event.text)
            case RoundStarted():
                self._pace.begin_round(event.round, event.iteration)
                self._progress.update(
                    self._task, round=event.round, density=event.density, completed=event.iteration, accuracy=""
                )
            case InRound():
                self._in_round(event)
            case RoundFinished():
                self._print(_sentence(event.result))

    def _started(self, event: Started) -> None:
        recipe = event.recipe
        self.began = True
        self._pace = _Pace(recipe.train.iterations, recipe.prune.rounds, recipe.prune.rewind_to)
        self._progress.update(self._task, rounds=recipe.prune.rounds, total=recipe.train.iterations, visible=True)
        if event.replicate[0] == 0 and self._header:
            self._print(self._header)
            self._header = ""  # once, also where several searches follow each other
        if event.replicate[1] > 1:
            self._print(f"replicate {event.replicate[0] + 1} of {event.replicate[1]}, seed {recipe.seeds.base}")
        self._say_how(event)

    def _say_how(self, event: Started) -> None:
        compute = event.compute
        how = [compute.device, compute.precision, "compiled" if compute.compile == "on" else "eager"]
        how += ["channels-last"] if compute.channels_last == "on" else []
        how += [f"{compute.loader} loader", f"{compute.engine} engine"]
        how += [f"{compute.threads} thread{'s' if compute.threads > 1 else ''}"] if compute.device == "cpu" else []
        if compute.engine == "sparse":
            how += [f"kept weights alone at density {compute.break_even:g} and below"]
        if event.replicate[1] > 1 and compute.together in ("batched", "streams"):
            how += ["replicates as one net" if compute.together == "batched" else "replicates side by side"]
        if compute.engine == "graph" and compute.compact > 0:
            how += [f"smaller nets where {compute.compact:.0%} of the work is left or less"]
        if compute.shifted and compute.shifted != ("auto",):
            how += [f"{len(compute.shifted)} gradients of convolutions by shifted products"]
        if compute.kept:
            low, high = min(compute.kept.values()), max(compute.kept.values())
            at = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            how += [f"{len(compute.kept)} layers from their kept weights alone at density {at} and below"]
        self._print(f"{', '.join(how)}; {event.path}")
        if event.recipe.prune.rewind_to:
            self._print(f"rewinding to iteration {event.recipe.prune.rewind_to:,}")
        if event.measured:
            self._print("timed: " + "; ".join(f"{k} {v:,.0f} images/s" for k, v in event.measured.items()))
        if event.resumed:
            where = f", at iteration {event.iteration:,} of the next" if event.iteration else ""
            self._print(f"going on after {counted(event.rounds_done, 'finished round')}{where}")
        if event.moved:
            self._print(f"not as it was when this run began ({event.moved}): bits may differ from here on")

    def _beside(self, beside: Beside) -> None:
        """Replicates side by side: their finished rounds as lines, one bar for all steps."""
        event = beside.event
        self.began = True
        if isinstance(event, Started) and self._race.has(beside.replicate):  # another search, of the next rewind point
            self._race = _Race()
        race = self._race
        match event:
            case Started():
                if self._header:
                    self._print(self._header)
                    self._header = ""
                race.enter(beside, event.recipe)
                self._print(f"replicate {beside.replicate + 1} of {event.replicate[1]}, seed {beside.seed}")
                self._say_how(event)
            case RoundStarted():
                race.at(beside.replicate, event.round, event.iteration)
            case InRound():
                race.at(beside.replicate, event.round, event.event.iteration)
                if isinstance(event.event, Evaluated):
                    race.rates[beside.replicate] = event.event.images_per_second
            case RoundFinished():
                self._print(f"seed {beside.seed}  {_sentence(event.result)}")
            case Notice():
                self._print(f"seed {beside.seed}  {event.text}")
        left = race.seconds_left()
        lowest, rate = min(race.rounds.values(), default=0), sum(race.rates.values())
        self._progress.update(self._task, round=lowest, total=race.total, completed=race.done, rate=rate, left=left,
                              visible=True)  # fmt: skip
        if not self._console.is_terminal and time.monotonic() - self._line_at > PLAIN_EVERY:
            self._print(f"{race.done:,} of {race.total:,} iterations  {rate:,.0f} images/s together"
                        + (f"  {duration(left)} left" if left is not None else ""))  # fmt: skip

    def _in_round(self, event: InRound) -> None:
        inner = event.event
        left = self._pace.seconds_left(inner.iteration)
        self._progress.update(self._task, completed=inner.iteration, left=left)
        if isinstance(inner, MaskDrawn) and inner.found:
            self._print(f"round {event.round} ends at iteration {inner.iteration:,}: its mask moved by at most "
                        f"{inner.distance:.3f} in five epochs")  # fmt: skip
        if not isinstance(inner, Evaluated):
            return
        accuracy = f"validation {inner.validation.accuracy:.2%}"
        self._progress.update(self._task, rate=inner.images_per_second, accuracy=f"{inner.validation.accuracy:.2%}")
        if left is not None and not self._said_long:
            self._said_long = True
            if left > LONG_SECONDS:
                self._print(f"about {duration(left)} to go at this speed{self._shorter}")
        if not self._console.is_terminal and time.monotonic() - self._line_at > PLAIN_EVERY:
            self._print(f"round {event.round}  iteration {inner.iteration:,}  {inner.images_per_second:,.0f} images/s  "
                        f"{accuracy}" + (f"  {duration(left)} left" if left is not None else ""))  # fmt: skip

    def _print(self, line: str) -> None:
        self._line_at = time.monotonic()
        self._progress.console.print(line, highlight=False, soft_wrap=True, markup=False)


class TrialLines:
    """Shows the trainings of a branch as plain lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._line_at = time.monotonic()

    def __call__(self, event: TrialStarted | InRound | TrialFinished) -> None:
        match event:
            case TrialStarted():
                self._print(f"{event.trial.folder}: density {event.density:.2%}, from iteration {event.iteration:,}")
                for layer, what in event.collapsed.items():
                    self._print(f"warning: {layer} {what}")
            case TrialFinished():
                self._print(_sentence(event.result))
            case InRound(event=Evaluated() as inner) if time.monotonic() - self._line_at > PLAIN_EVERY:
                self._print(
                    f"round {event.round}  iteration {inner.iteration:,}  "
                    f"{inner.images_per_second:,.0f} images/s  validation {inner.validation.accuracy:.2%}"
                )

    def _print(self, line: str) -> None:
        self._line_at = time.monotonic()
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)


class FigureLines:
    """Shows many searches and their controls, one after the other, as plain lines: a bar for each would not help."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._trial = TrialLines(console)

    def __call__(self, event: object) -> None:
        match event:
            case str():
                self._print(event)
            case Beside():
                self(event.event)
            case Started():
                self._print(f"{event.path}, {event.recipe.prune.rounds} rounds")
            case Notice():
                self._print(event.text)
            case RoundFinished():
                self._print(_sentence(event.result))
            case TrialStarted() | TrialFinished() | InRound():
                self._trial(event)

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)


class _Pace:
    """Seconds per iteration, evaluations included, since this process began to train."""

    SETTLED = 3.0

    def __init__(self, iterations: int = 1, rounds: int = 0, rewind_to: int = 0) -> None:
        self._iterations, self._rounds, self._rewind_to = iterations, rounds, rewind_to
        self._began = time.monotonic()
        self._done = 0
        self._round, self._at = 0, 0

    def begin_round(self, round: int, iteration: int) -> None:
        self._round, self._at = round, iteration

    def seconds_left(self, iteration: int) -> float | None:
        """For all rounds still to come, or None while it is too early to say."""
        self._done += iteration - self._at
        self._at = iteration
        elapsed = time.monotonic() - self._began
        if elapsed < self.SETTLED or self._done == 0:
            return None
        later = (self._rounds - self._round) * (self._iterations - self._rewind_to)
        return elapsed / self._done * (self._iterations - iteration + later)


class _Race:
    """Steps done and to do over replicates that run side by side."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._steps: dict[int, int] = {}
        self._first: dict[int, int] = {}
        self._length, self._from, self.total = 0, 0, 0
        self.rounds: dict[int, int] = {}
        self.rates: dict[int, float] = {}

    def has(self, replicate: int) -> bool:
        return replicate in self._steps

    def enter(self, beside: Beside, recipe: Recipe) -> None:
        self._length, self._from = recipe.train.iterations, recipe.prune.rewind_to
        self._steps[beside.replicate] = 0
        self.total = beside.of * (self._length + recipe.prune.rounds * (self._length - self._from))

    def at(self, replicate: int, round: int, iteration: int) -> None:
        done = iteration + (round * (self._length - self._from) if round else 0)
        self._first.setdefault(replicate, done)
        self._steps[replicate], self.rounds[replicate] = done, round

    @property
    def done(self) -> int:
        return sum(self._steps.values())

    def seconds_left(self) -> float | None:
        made, elapsed = self.done - sum(self._first.values()), time.monotonic() - self._began
        if elapsed < _Pace.SETTLED or made == 0:
            return None
        return elapsed / made * (self.total - self.done)


class _TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        left = task.fields["left"]
        return Text("" if left is None else f"{duration(left)} left")


def duration(seconds: float) -> str:
    """3 h 12 min, 4 min 5 s or 12 s."""
    s = round(seconds)
    if s >= 86_400:
        return f"{s // 86_400} d {s % 86_400 // 3600} h"
    if s >= 3600:
        return f"{s // 3600} h {s % 3600 // 60} min"
    return f"{s // 60} min {s % 60} s" if s >= 60 else f"{s} s"


def counted(count: int, what: str) -> str:
    """1 round, 2 rounds."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def rounds_table(rounds: Sequence[Mapping[str, Any]], winner: int | None, spread: bool = False) -> Table:
    """One row per round; the winning ticket is marked."""
    title = "means over replicates" if spread else None
    table = Table(title=title, box=None, pad_edge=False, header_style="bold")
    for column in ("round", "density", "kept", "early stop", "test acc. there", "test acc. at end", "seconds", ""):
        table.add_column(column, justify="left" if not column else "right")
    for r in rounds:
        mark = "winning ticket" if r["round"] == winner else "dense" if r["round"] == 0 else ""
        table.add_row(
            str(r["round"]), f"{r['density']:.2%}", f"{r['kept']:,.0f}", f"{r['early_stop_iteration']:,.0f}",
            f"{r['early_stop_test_accuracy']:.2%}", f"{r['test_accuracy']:.2%}", f"{r['seconds']:.1f}", mark,
            style="bold green" if r["round"] == winner else None,
        )  # fmt: skip
    return table


def rewind_table(points: Sequence[tuple[int, Sequence[Mapping[str, Any]], int | None]]) -> Table:
    """One row per search: (rewind point, rounds, winning round or None)."""
    table = Table(title="rewind points", box=None, pad_edge=False, header_style="bold")
    for column in ("rewound to", "winning round", "density", "test acc. at early stop", "last round", "density",
                   "test acc. at early stop"):  # fmt: skip
        table.add_column(column, justify="right")
    for iteration, rounds, winner in points:
        cells = [(f"{r['round']}", f"{r['density']:.2%}", f"{r['early_stop_test_accuracy']:.2%}")
                 for r in ([rounds[winner]] if winner is not None else []) + [rounds[-1]]]  # fmt: skip
        found = [x for cell in cells for x in cell] if winner is not None else ["none", "", "", *cells[0]]
        table.add_row(f"{iteration:,}", *found)
    return table


def _sentence(r: Mapping[str, Any]) -> str:
    return (
        f"round {r['round']:>2}  density {r['density']:7.2%}  early stop {r['early_stop_iteration']:>6,}  "
        f"test {r['early_stop_test_accuracy']:.2%} at early stop, {r['test_accuracy']:.2%} at the end  "
        f"{duration(r['seconds'])} at {r['images_per_second']:,.0f} images/s"
    )
