"""Several tasks in threads of their own, watched from one place.

Worth it for work that leaves the interpreter's lock, such as the compiled intervals of the sparse engine.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
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
    show: Callable[[int, Event], None],
) -> list[Result]:  # fmt: skip
    """The results of ``tasks``, in their order; ``workers`` run at a time.

    A task gets two functions: one hands an event on, which ``show`` gets in the calling thread together with the
    task's number; the other says whether a task has failed, so that the rest should stop and save. When all have
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

    with ThreadPoolExecutor(workers, thread_name_prefix="fastlth-search") as pool:
        futures = [pool.submit(work, number) for number in range(len(tasks))]
        try:
            while not all(future.done() for future in futures):
                wait([future for future in futures if not future.done()], LOOK_SECONDS, FIRST_EXCEPTION)
                show_all()
                if failed.is_set():
                    for future in futures:
                        future.cancel()  # those that have not begun
        except BaseException:
            failed.set()
            raise
    show_all()
    errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error
    return [future.result() for future in futures]
