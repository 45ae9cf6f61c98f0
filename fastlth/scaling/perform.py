"""One task in this process. It leaves a log, and an outcome in place of an exception: one task stops no other.

OUT/logs/<task>.log    what the task said each time it was begun, and why it failed
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from fastlth.errors import FastlthError, RunLockedError, Stopped
from fastlth.experiments.figures.declare import Branched
from fastlth.experiments.figures.scale import Job
from fastlth.experiments.figures.work import make, make_follow, run_of
from fastlth.happenings import Beside
from fastlth.scaling.tasks import Task, chained, needs_dense
from fastlth.search import RoundStarted
from fastlth.side_by_side import cores, side_by_side
from fastlth.store import atomic
from fastlth.store.run import RECIPE, read_recipe

LOGS = "logs"
LONGEST_NAME = 200

Show = Callable[[Any], None]
Stop = Callable[[], int | None]


@dataclass(frozen=True)
class Outcome:
    """What became of a task that was begun."""

    task: str
    status: str
    """done; failed; held (another process writes its run); stopped (saved, to go on); lost (its worker is gone)"""
    text: str = ""
    """one sentence where it is not done"""
    seconds: float = 0.0
    code: int = 1
    """of a failure: the exit code of its error"""


@dataclass(frozen=True)
class Place:
    """Where tasks find and leave everything: plain, so that it travels to workers."""

    out: Path
    data_dir: Path | None = None

    def log(self, task: str) -> Path:
        readable = re.sub(r"[^\w.=-]+", "-", task, flags=re.ASCII).strip("-")
        if len(readable) > LONGEST_NAME:  # what tells two tasks apart may stand at the end
            readable = f"{readable[:LONGEST_NAME]}-{hashlib.sha256(task.encode()).hexdigest()[:8]}"
        return self.out / LOGS / f"{readable}.log"


def perform(task: Task, place: Place, stopped: Stop = lambda: None) -> Outcome:
    """Make the task's trainings that are not done. Raises nothing but what ends the process."""
    began = time.monotonic()

    def outcome(status: str, text: str = "", code: int = 1) -> Outcome:
        return Outcome(task.name, status, text, time.monotonic() - began, code)

    try:
        with _log(place.log(task.name)) as (file, show):
            try:
                _train(task.job, place, show, stopped)
                return outcome("done")
            except RunLockedError as error:
                show(f"put off: {error}")
                return outcome("held", str(error))
            except Stopped as error:
                show("stopped and saved")
                return outcome("stopped", str(error))
            except FastlthError as error:
                show(f"failed: {error}")
                return outcome("failed", str(error), error.exit_code)
            except Exception as error:
                traceback.print_exc(file=file)
                return outcome("failed", f"a bug: {type(error).__name__}: {error}")
    except FastlthError as error:  # the log itself cannot be written
        return outcome("failed", str(error), error.exit_code)


def _train(job: Job, place: Place, show: Show, stopped: Stop) -> None:
    if not job.follow:
        make(job, place.out, data_dir=place.data_dir, show=show, stopped=stopped)
        return
    parts = _by_round(job)
    if needs_dense(job):  # the dense net trained again, for all of them
        make_follow(parts.pop(0), place.out, data_dir=place.data_dir, show=show, stopped=stopped)

    def train(part: Job) -> Callable[[Show, Callable[[], bool]], None]:
        return lambda tell, failed: make_follow(
            part, place.out, data_dir=place.data_dir, show=tell,
            stopped=lambda: stopped() or (signal.SIGTERM if failed() else None),
        )  # fmt: skip

    together = min(len(parts), _side_by_side(job, place.out))
    if together > 1:
        side_by_side([train(part) for part in parts], workers=together, show=lambda _, event: show(event))
        return
    for part in parts:
        make_follow(part, place.out, data_dir=place.data_dir, show=show, stopped=stopped)


def _by_round(job: Job) -> list[Job]:
    """The rounds of a branch that need not follow each other, as jobs of their own."""
    (follow,) = job.follow
    if not isinstance(follow, Branched) or chained(follow):
        return [job]
    rounds = [dataclasses.replace(follow, rounds=(k,)) for k in follow.rounds]
    return [dataclasses.replace(job, follow=(one,)) for one in rounds] or [job]


def _side_by_side(job: Job, out: Path) -> int:
    """As many as there are cores where the search's engine leaves the interpreter alone, as for replicates."""
    file = run_of(out, job.recipe) / RECIPE
    if not file.exists():
        return 1
    resolved = read_recipe(file)[1]
    return max(1, cores() // int(resolved["threads"])) if resolved["engine"] == "sparse" else 1


@contextmanager
def _log(path: Path) -> Iterator[tuple[TextIO, Show]]:
    """The log, opened at its end, and what writes an event into it."""
    from rich.console import Console

    from fastlth.ui import FigureLines

    atomic.make_folders(path.parent)
    try:
        file = path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise atomic.explain(error, path) from error
    with file:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(f"-- {now} process {os.getpid()} on {socket.gethostname()}\n")
        lines = FigureLines(Console(file=file, width=160, force_terminal=False))

        def show(event: Any) -> None:
            inner = event.event if isinstance(event, Beside) else event
            if isinstance(inner, RoundStarted):
                seed = f"seed {event.seed} " if isinstance(event, Beside) else ""
                file.write(f"{seed}round {inner.round} from iteration {inner.iteration}\n")
            lines(event)

        yield file, show
