"""Tasks to workers until all have ended. Where they run is the backend's affair: local.py, on_ray.py.

done       its tasks-to-come may begin
failed     reported; what needs it is left out; everything else goes on
held       another process, perhaps another scheduler's, writes its run: tried again later, when that has ended
lost       its worker or node is gone: begun again, goes on from its last save; given up after ``LOSSES`` in a row
           without a finished training between them

The state of the work is what lies under OUT and nowhere else, so a scheduler may die, or be two.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fastlth.errors import EnvironmentFailure
from fastlth.experiments.figures.work import Training
from fastlth.scaling.perform import Outcome
from fastlth.scaling.tasks import Task

LOSSES = 5
PUT_OFF_SECONDS = 2.0
LOOK_SECONDS = 0.2
COUNT_SECONDS = 3.0
"""between looks at what is done under OUT, or longer where a look takes long"""


class Backend(Protocol):
    """Where tasks run. All methods return at once, ``wait`` after ``seconds`` at most."""

    def free(self) -> bool:
        """Whether it takes another task."""

    def start(self, task: Task) -> None: ...

    def wait(self, seconds: float) -> list[Outcome]:
        """The tasks that ended."""

    def stop(self) -> None:
        """Ask all running tasks to save and end."""

    def close(self) -> None:
        """End all workers."""


@dataclass(frozen=True)
class Progress:
    """One look at everything."""

    tasks: int
    tasks_done: int
    failed: int
    running: tuple[str, ...]
    trainings: int
    trainings_done: int
    seconds_left: float | None
    """None until something has been trained"""


Show = Callable[[Progress | Outcome], None]


@dataclass
class _Queue:
    """Tasks that wait: for others, for their time, or for a worker."""

    tasks: dict[str, Task]
    ready: list[tuple[float, int, str]] = field(default_factory=list)
    """(not before, place in the order, name)"""
    blocked: dict[str, set[str]] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def of(tasks: Sequence[Task]) -> _Queue:
        known = {t.name for t in tasks}
        queue = _Queue({t.name: t for t in tasks}, order={t.name: i for i, t in enumerate(tasks)})
        for task in tasks:
            queue.blocked[task.name] = set(task.after) & known
        for name in [n for n, waits in queue.blocked.items() if not waits]:
            queue.put(name, 0.0)
        return queue

    def put(self, name: str, not_before: float) -> None:
        self.blocked.pop(name, None)
        heapq.heappush(self.ready, (not_before, self.order[name], name))

    def take(self) -> str | None:
        if self.ready and self.ready[0][0] <= time.monotonic():
            return heapq.heappop(self.ready)[2]
        return None

    def done(self, name: str) -> None:
        for other in [n for n, waits in self.blocked.items() if name in waits]:
            self.blocked[other].discard(name)
            if not self.blocked[other]:
                self.put(other, 0.0)

    def drop(self, name: str) -> list[str]:
        """What can never begin now."""
        dropped = [n for n, waits in self.blocked.items() if name in waits]
        for other in dropped:
            self.blocked.pop(other, None)
        return [m for n in dropped for m in (n, *self.drop(n))]

    def __bool__(self) -> bool:
        return bool(self.ready or self.blocked)


def run(
    tasks: Sequence[Task], backend: Backend, out: Path, *, show: Show = lambda _: None,
    stopped: Callable[[], int | None] = lambda: None, seconds: Callable[[Training], float] = lambda _: 1.0,
) -> list[Outcome]:  # fmt: skip
    """The last outcome of every task, in the order in which they ended.

    ``seconds`` is about what a training takes, for the time left. With ``stopped``, running tasks save and end, and the
    rest is not begun: their outcomes are "stopped".
    """
    return _Run(tasks, backend, out, show, stopped, seconds).run()


class _Run:
    def __init__(
        self, tasks: Sequence[Task], backend: Backend, out: Path, show: Show, stopped: Callable[[], int | None],
        seconds: Callable[[Training], float],
    ) -> None:  # fmt: skip
        self._queue, self._backend, self._show, self._stopped = _Queue.of(tasks), backend, show, stopped
        self._running: dict[str, Task] = {}
        self._ended: dict[str, Outcome] = {}
        self._losses: dict[str, tuple[int, int]] = {}
        """task -> (losses in a row, trainings it had done then)"""
        self._watch = _Watch(tasks, out, seconds)

    def run(self) -> list[Outcome]:
        stopping = False
        while self._running or (self._queue and not stopping):
            if not stopping and self._stopped():
                stopping = True
                self._backend.stop()
            while not stopping and self._backend.free() and (name := self._queue.take()) is not None:
                self._begin(name)
            for outcome in self._backend.wait(LOOK_SECONDS):
                self._take(outcome, stopping)
            if progress := self._watch.look(self._running, self._ended):
                self._show(progress)
        self._show(self._watch.now(self._running, self._ended))
        left = [Outcome(n, "stopped", "not begun") for n in self._queue.tasks if n not in self._ended]
        return [*self._ended.values(), *left]

    def _begin(self, name: str) -> None:
        task = self._queue.tasks[name]
        self._watch.count(task)
        if self._watch.finished(name):  # by an earlier run, or by another scheduler
            self._end(Outcome(name, "done"))
            return
        self._running[name] = task
        self._backend.start(task)

    def _take(self, outcome: Outcome, stopping: bool) -> None:
        task = self._running.pop(outcome.task)
        again = outcome.status == "held" or (outcome.status == "stopped" and not stopping)
        if outcome.status == "lost" and not stopping:
            count = self._watch.count(task)
            losses, before = self._losses.get(outcome.task, (0, count))
            losses = losses + 1 if count == before else 1
            self._losses[outcome.task] = losses, count
            again = losses < LOSSES
            if not again:
                text = f"lost {losses} times in a row: {outcome.text}"
                outcome = Outcome(outcome.task, "failed", text, outcome.seconds, EnvironmentFailure.exit_code)
        if again and not stopping:
            wait = PUT_OFF_SECONDS if outcome.status == "held" else 0.0
            self._queue.put(outcome.task, time.monotonic() + wait)
        elif again or outcome.status == "lost":
            self._end(Outcome(outcome.task, "stopped", outcome.text, outcome.seconds))
        else:
            self._end(outcome)

    def _end(self, outcome: Outcome) -> None:
        self._ended[outcome.task] = outcome
        self._show(outcome)
        if outcome.status == "done":
            self._queue.done(outcome.task)
        elif outcome.status == "failed":
            for name in self._queue.drop(outcome.task):
                self._end_left_out(name, outcome.task)

    def _end_left_out(self, name: str, because: str) -> None:
        self._ended[name] = Outcome(name, "failed", f"not begun, since '{because}' failed")
        self._show(self._ended[name])


class _Watch:
    """Counts trainings that are done under OUT: those of running tasks again at every look, others once."""

    def __init__(self, tasks: Sequence[Task], out: Path, seconds: Callable[[Training], float]) -> None:
        self._out = out
        self._of: dict[str, tuple[str, ...]] = {}
        """task -> its trainings; two tasks may need the same one"""
        self._seconds: dict[str, float] = {}
        self._done: set[str] = set()
        for task in tasks:
            mine = task.trainings(out)
            self._of[task.name] = tuple(t.where for t in mine)
            self._done |= {t.where for t in mine if t.done}
            self._seconds |= {t.where: seconds(t) for t in mine if t.where not in self._seconds}
        self._first = self._expected_left()
        self._began = time.monotonic()
        self._next = 0.0

    def count(self, task: Task) -> int:
        """How many of the task's trainings are done now."""
        if not self.finished(task.name):
            self._done |= {t.where for t in task.trainings(self._out) if t.done}
        return sum(where in self._done for where in self._of[task.name])

    def finished(self, name: str) -> bool:
        return all(where in self._done for where in self._of[name])

    def look(self, running: dict[str, Task], ended: dict[str, Outcome]) -> Progress | None:
        """What there is, if it is time to look again."""
        began = time.monotonic()
        if began < self._next:
            return None
        for task in running.values():
            self.count(task)
        took = time.monotonic() - began
        self._next = began + max(COUNT_SECONDS, 20 * took)
        return self.now(running, ended)

    def now(self, running: dict[str, Task], ended: dict[str, Outcome]) -> Progress:
        status = [o.status for o in ended.values()]
        for name, outcome in ended.items():
            if outcome.status == "done":  # also rounds that a target density made unnecessary
                self._done.update(self._of[name])
        return Progress(
            tasks=len(self._of), tasks_done=status.count("done"), failed=status.count("failed"),
            running=tuple(running), trainings=len(self._seconds), trainings_done=len(self._done),
            seconds_left=self._left(),
        )  # fmt: skip

    def _expected_left(self) -> float:
        return sum(s for where, s in self._seconds.items() if where not in self._done)

    def _left(self) -> float | None:
        """The work left at the pace so far: what was expected of the work done, against the time it took."""
        left = self._expected_left()
        made, elapsed = self._first - left, time.monotonic() - self._began
        return left * elapsed / made if made > 0 else None
