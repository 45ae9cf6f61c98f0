"""``python -m benchmarks.scheduling``: what handing out a task costs, on local workers and beyond Ray's own.

Empty tasks go through the scheduler, and empty functions through Ray alone, in turn; the time until all have ended is
divided by their number. Workers have started before. Without Ray installed only local workers are timed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

from fastlth.scaling import local, on_ray, schedule
from fastlth.scaling.perform import Outcome, Place
from fastlth.scaling.schedule import Backend
from fastlth.scaling.tasks import Task, Worker
from fastlth.side_by_side import cores


@dataclass(frozen=True)
class Nothing:
    """One training that is never done before its task is."""

    where: str
    done: bool = False


@dataclass(frozen=True)
class Empty:
    """A task as the scheduler sees it."""

    name: str
    after: tuple[str, ...] = ()

    def trainings(self, out: Path) -> list[Nothing]:
        return [Nothing(self.name)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tasks", type=int, default=300, help="in each repetition")
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, patch.object(local, "_work", _echo), ExitStack() as stack:
        place = Place(Path(folder))
        workers = local.Local([local.Slot(()) for _ in range(cores())], place)
        stack.callback(workers.close)
        ways = {"local workers": _scheduled(place, workers)}
        if find_spec("ray") is not None:
            on_ray.connect(None)
            ways |= {"Ray": _scheduled(place, _on_ray(place)), "Ray alone": _ray_alone()}
        for call in ways.values():
            call(options.tasks)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.repetitions):
            for name, call in ways.items():
                began = time.perf_counter()
                call(options.tasks)
                seconds[name].append((time.perf_counter() - began) / options.tasks)
    for name, found in seconds.items():
        print(f"{name:14} {1e3 * statistics.median(found):6.2f} ms per task ({1e3 * min(found):.2f}-"
              f"{1e3 * max(found):.2f}, {len(found)} x {options.tasks} tasks)", flush=True)  # fmt: skip
    return 0


def _scheduled(place: Place, backend: Backend) -> Callable[[int], None]:
    def call(count: int) -> None:
        tasks = cast(list[Task], [Empty(f"task {i}") for i in range(count)])
        ended = schedule.run(tasks, backend, place.out)
        assert [o.status for o in ended] == ["done"] * count

    return call


def _on_ray(place: Place) -> Backend:
    with patch.object(on_ray, "_perform", _nothing):
        return on_ray.OnRay(Worker(cores=1), place)


def _ray_alone() -> Callable[[int], None]:
    import ray

    remote: Any = ray.remote(num_cpus=1, max_retries=on_ray.RETRIES, scheduling_strategy="SPREAD")(_nothing)
    return lambda count: ray.get([remote.remote(Empty(f"task {i}"), None, None) for i in range(count)]) and None


def _echo(pipe: Connection, place: Place) -> None:
    """A local worker that does nothing."""
    while True:
        try:
            pipe.send(Outcome(pipe.recv().name, "done"))
        except (EOFError, OSError):
            return


def _nothing(task: Task, place: Place | None, stop: Path | None) -> Outcome:
    return Outcome(task.name, "done")


if __name__ == "__main__":
    raise SystemExit(main())
