"""Several tasks in threads of their own, watched from one place.

Worth it for work that leaves the interpreter's lock, such as the compiled intervals of the sparse engine.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from fastlth.errors import Stopped

Event = TypeVar("Event")
Result = TypeVar("Result")

LOOK_SECONDS = 0.05  # a signal is noticed by the main thread when it runs Python code


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(
    tasks: Sequence[Callable[[Callable[[Event], None], Callable[[], bool]], Result]], *, workers: int,
    show: Callable[[int, Event], None], left_out: Callable[[int], None] = lambda number: None,
) -> list[Result]:  # fmt: skip
    """The results of ``tasks``, in their order; ``workers`` run at a time, or all of them where fewer than twice as
    many are left: three that share two cores have ended sooner than two at once and one after them, beside which a
    core idles.

    A task gets two functions: one hands an event on, which ``show`` gets in the calling thread together with the
    task's number; the other says whether a task has failed, so that the rest should stop and save. ``left_out`` gets
    the number of each task that does not begin since another has failed, for those that wait for it. When all have
    ended the first error is raised, where there is one; Stopped only if nothing else went wrong.
    """
    events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    failed = threading.Event()

    def work(number: int) -> Result:
        try:
            return tasks[number](lambda event: events.put((number, event)), failed.is_set)
        except BaseException:
            failed.set()
            raise

    def show_all() -> None:
        while not events.empty():
            show(*events.get())

    def leave_out() -> None:
        for number in range(len(futures), len(tasks)):
            left_out(number)

    futures: list[Future[Result]] = []
    with ThreadPoolExecutor(max(len(tasks), 1), thread_name_prefix="fastlth-search") as pool:
        try:
            while running := _begin(futures, len(tasks), workers, lambda number: pool.submit(work, number), failed):
                if failed.is_set():
                    leave_out()
                wait(running, LOOK_SECONDS, FIRST_COMPLETED)
                show_all()
        except BaseException:
            failed.set()
            leave_out()
            raise
    show_all()
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error
    return [future.result() for future in futures]


def _begin(
    futures: list[Future[Result]], tasks: int, workers: int, submit: Callable[[int], Future[Result]],
    failed: threading.Event,
) -> list[Future[Result]]:  # fmt: skip
    """Submits, appending to ``futures``, what may run now; those that run. None begins once one has failed."""
    running = [future for future in futures if not future.done()]
    at_once = workers if len(running) + tasks - len(futures) >= 2 * workers else tasks
    while len(running) < at_once and len(futures) < tasks and not failed.is_set():
        running.append(submit(len(futures)))
        futures.append(running[-1])
    return running
