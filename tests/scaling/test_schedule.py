"""The scheduler against a made-up backend: order, losses, failures, runs held by others, stops."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from fastlth.scaling import schedule
from fastlth.scaling.perform import Outcome


@dataclass(frozen=True)
class Made:
    """A training: done or not."""

    where: str
    done: bool


@dataclass(frozen=True)
class Fake:
    """A task whose trainings are names in a set that stands for the disk."""

    name: str
    after: tuple[str, ...] = ()
    size: int = 1
    disk: set[str] = field(default_factory=set, compare=False, hash=False)

    def trainings(self, out: object) -> list[Made]:
        return [Made(f"{self.name}/{i}", f"{self.name}/{i}" in self.disk) for i in range(self.size)]


class Backend:
    """``ends`` says what becomes of a task that was begun; it sees what was begun and what lies on the disk."""

    def __init__(self, workers: int, ends: Callable[[Fake], Outcome]) -> None:
        self._workers, self._ends = workers, ends
        self.begun: list[str] = []
        self.now: dict[str, Fake] = {}
        self.most = 0
        self.stopping = False

    def free(self) -> bool:
        return len(self.now) < self._workers

    def start(self, task: Fake) -> None:
        assert task.name not in self.now
        self.begun.append(task.name)
        self.now[task.name] = task
        self.most = max(self.most, len(self.now))

    def wait(self, seconds: float) -> list[Outcome]:
        if not self.now:
            return []
        task = self.now.pop(next(iter(self.now)))
        return [Outcome(task.name, "stopped") if self.stopping else self._ends(task)]

    def stop(self) -> None:
        self.stopping = True

    def close(self) -> None:
        pass


def done(task: Fake) -> Outcome:
    task.disk.update(f"{task.name}/{i}" for i in range(task.size))
    return Outcome(task.name, "done")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(schedule, "PUT_OFF_SECONDS", 0.01)


def run(tasks, backend, **more):
    return {o.task: o for o in schedule.run(tasks, backend, None, **more)}


def test_every_task_ends_once_after_what_it_needs_and_no_more_run_than_there_are_workers():
    draw = random.Random(1)
    tasks: list[Fake] = []
    for i in range(60):
        after = tuple({draw.choice(tasks).name for _ in range(draw.randrange(3))}) if tasks else ()
        tasks.append(Fake(f"t{i}", after))
    ended: list[str] = []

    def end(task: Fake) -> Outcome:
        assert set(task.after) <= set(ended)
        ended.append(task.name)
        return done(task)

    backend = Backend(4, end)
    outcomes = run(tasks, backend)
    assert sorted(backend.begun) == sorted(t.name for t in tasks)
    assert {o.status for o in outcomes.values()} == {"done"} and backend.most == 4


def test_a_lost_task_is_begun_again_until_it_is_done():
    lives = {"a": 3, "b": 0}

    def end(task: Fake) -> Outcome:
        lives[task.name] -= 1
        return Outcome(task.name, "lost", "gone") if lives[task.name] >= 0 else done(task)

    backend = Backend(1, end)
    assert run([Fake("a"), Fake("b")], backend)["a"].status == "done"
    assert backend.begun.count("a") == 4 and backend.begun.count("b") == 1


def test_a_task_that_is_always_lost_is_given_up_and_one_that_gets_on_is_not():
    steps = Fake("steps", size=12)

    def end(task: Fake) -> Outcome:
        if task is not steps:
            return Outcome(task.name, "lost", "killed")
        steps.disk.add(f"steps/{len(steps.disk)}")
        return Outcome("steps", "lost", "killed") if len(steps.disk) < 12 else Outcome("steps", "done")

    backend = Backend(1, end)
    outcomes = run([Fake("dead"), steps], backend)
    assert outcomes["dead"].status == "failed" and "lost 5 times in a row: killed" in outcomes["dead"].text
    assert backend.begun.count("dead") == schedule.LOSSES and outcomes["dead"].code == 6
    assert outcomes["steps"].status == "done"


def test_a_failure_stops_what_needs_it_and_nothing_else():
    tasks = [Fake("a"), Fake("b", ("a",)), Fake("c", ("b",)), Fake("d"), Fake("e", ("d",))]
    backend = Backend(2, lambda t: Outcome("a", "failed", "broken") if t.name == "a" else done(t))
    outcomes = run(tasks, backend)
    assert {n: o.status for n, o in outcomes.items()} == {
        "a": "failed", "b": "failed", "c": "failed", "d": "done", "e": "done"}  # fmt: skip
    assert outcomes["c"].text == "not begun, since 'a' failed" and sorted(backend.begun) == ["a", "d", "e"]


def test_what_another_scheduler_holds_is_tried_later_and_what_it_has_done_is_not_begun():
    held, theirs = Fake("held"), Fake("theirs")
    tries = []

    def end(task: Fake) -> Outcome:
        if task.name == "other":
            done(theirs)
        if task.name == "held" and len(tries) < 3:
            tries.append(1)
            return Outcome("held", "held", "in use")
        return done(task)

    backend = Backend(1, end)
    outcomes = run([Fake("other"), held, theirs], backend)
    assert {o.status for o in outcomes.values()} == {"done"}
    assert "theirs" not in backend.begun and backend.begun.count("held") == 4


def test_a_stop_lets_running_tasks_save_and_begins_nothing():
    asked: list[int] = []

    def end(task: Fake) -> Outcome:
        asked.append(15)
        return done(task)

    backend = Backend(2, end)
    outcomes = run([Fake(f"t{i}") for i in range(6)], backend, stopped=lambda: asked[0] if asked else None)
    assert [o.status for o in outcomes.values()].count("done") == 1
    assert {o.status for o in outcomes.values()} == {"done", "stopped"} and len(outcomes) == 6
    assert backend.stopping and len(backend.begun) <= 3


def test_progress_counts_a_shared_training_once_and_time_left_shrinks(monkeypatch):
    monkeypatch.setattr(schedule, "COUNT_SECONDS", 0.0)
    shown: list[schedule.Progress] = []
    tasks = [Fake(f"t{i}", size=2) for i in range(5)]
    backend = Backend(1, done)
    run(tasks, backend, show=lambda e: shown.append(e) if isinstance(e, schedule.Progress) else None)
    assert [p.trainings for p in shown] == [10] * len(shown)
    counts = [p.trainings_done for p in shown]
    assert counts == sorted(counts) and counts[-1] == 10 and shown[-1].tasks_done == 5
    assert shown[-1].seconds_left == 0.0
