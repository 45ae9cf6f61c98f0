"""The one view of many trainings: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from fastlth.scaling.perform import Outcome, Place
from fastlth.scaling.schedule import Progress
from fastlth.ui import duration

LINE_SECONDS = 30.0  # between lines where there is no terminal


class SweepView:
    def __init__(self, console: Console, place: Place) -> None:
        self._console, self._place = console, place
        self._bar = Bar(BarColumn(), TextColumn("{task.description}"), console=console, transient=True)
        self._task = self._bar.add_task("", total=1)
        self._line_at = time.monotonic()

    def __enter__(self) -> SweepView:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def __call__(self, event: Progress | Outcome) -> None:
        match event:
            case Progress():
                text = sentence(event)
                self._bar.update(self._task, total=event.trainings, completed=event.trainings_done, description=text)
                if not self._console.is_terminal and time.monotonic() - self._line_at > LINE_SECONDS:
                    self._print(text)
            case Outcome(status="done", seconds=seconds) if seconds:
                self._print(f"done: {event.task}, {duration(seconds)}")
            case Outcome(status="failed"):
                self._print(f"failed: {event.task}: {event.text}; log: {self._place.log(event.task)}")

    def _print(self, line: str) -> None:
        self._line_at = time.monotonic()
        self._bar.console.print(line, highlight=False, soft_wrap=True, markup=False)


def sentence(progress: Progress) -> str:
    left = "" if progress.seconds_left is None else f", about {duration(progress.seconds_left)} left"
    failed = f", {progress.failed} failed" if progress.failed else ""
    return (f"{progress.trainings_done:,} of {progress.trainings:,} trainings, {progress.tasks_done:,} of "
            f"{progress.tasks:,} tasks{failed}, {len(progress.running)} at work{left}")  # fmt: skip
