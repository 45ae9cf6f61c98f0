"""Workers that are processes of this machine, one per GPU or per group of cores.

A worker takes one task after the other, so that torch is imported once. One that is gone (killed, out of memory) loses
its task, and another takes its place. Workers save and end when their scheduler is gone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastlth.scaling.perform import Outcome, Place
    from fastlth.scaling.tasks import Task

SPAWN = multiprocessing.get_context("spawn")  # a forked CUDA context is unusable, and so are a fork's threads
GRACE_SECONDS = 30.0


@dataclass(frozen=True)
class Slot:
    """What a worker may use."""

    cores: tuple[int, ...]
    """numbers of processors; empty: all"""
    gpu: str = ""
    """as CUDA_VISIBLE_DEVICES names it; empty: none"""


def slots(cores: Sequence[int], size: int, gpus: Sequence[str] = (), share: float = 1.0) -> list[Slot]:
    """``share`` of a GPU per worker, with ``size`` cores each where there are enough, else groups of ``size`` cores."""
    if gpus:
        places = [gpu for gpu in gpus for _ in range(max(1, int(1 / share + 1e-9)))]
        each = max(1, min(size, len(cores) // len(places)))
        starts = [(i * each) % max(1, len(cores) - each + 1) for i in range(len(places))]
        return [Slot(tuple(cores[s : s + each]), gpu) for s, gpu in zip(starts, places, strict=True)]
    size = max(1, min(size, len(cores)))
    return [Slot(tuple(cores[i : i + size])) for i in range(0, len(cores) - size + 1, size)]


@dataclass
class _Worker:
    slot: Slot
    process: BaseProcess
    pipe: Connection
    task: str | None = None
    began: float = 0.0


class Local:
    """The backend on this machine. A slot gets its process when it gets its first task."""

    def __init__(self, slots: Sequence[Slot], place: Place) -> None:
        self._place = place
        self._empty = list(slots)
        self._hired: list[_Worker] = []

    def free(self) -> bool:
        return bool(self._empty) or any(w.task is None for w in self._hired)

    def start(self, task: Task) -> None:
        worker = next((w for w in self._hired if w.task is None), None) or self._hire(self._empty.pop(0))
        worker.task, worker.began = task.name, time.monotonic()
        with contextlib.suppress(OSError):  # it died while it had nothing to do: ``wait`` finds it out
            worker.pipe.send(task)

    def wait(self, seconds: float) -> list[Outcome]:
        ended: list[Outcome] = []
        if not self._hired:
            time.sleep(seconds)
            return ended
        ready = wait([w.pipe for w in self._hired], seconds)
        for worker in [w for w in self._hired if w.pipe in ready]:
            try:
                ended.append(worker.pipe.recv())
                worker.task = None
            except (EOFError, OSError):
                if (lost := self._bury(worker)) is not None:
                    ended.append(lost)
        return ended

    def stop(self) -> None:
        for worker in self._hired:
            if worker.process.is_alive() and worker.process.pid is not None:
                os.kill(worker.process.pid, signal.SIGTERM)

    def close(self) -> None:
        for worker in self._hired:
            worker.pipe.close()  # which ends it when its task has
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in self._hired:
            _end(worker.process, deadline - time.monotonic())

    def _hire(self, slot: Slot) -> _Worker:
        ours, theirs = SPAWN.Pipe()
        # no daemon: that could start no processes, as one's own data may (docs/own-nets.md)
        process = SPAWN.Process(target=_work, args=(theirs, self._place), name="fastlth-worker", daemon=False)
        with _inherited(slot):
            process.start()
        theirs.close()
        self._hired.append(_Worker(slot, process, ours))
        return self._hired[-1]

    def _bury(self, worker: _Worker) -> Outcome | None:
        """The slot is empty again; what becomes of the task that the worker had."""
        from fastlth.scaling.perform import Outcome

        _end(worker.process, GRACE_SECONDS)
        worker.pipe.close()
        self._hired.remove(worker)
        self._empty.append(worker.slot)
        if worker.task is None:
            return None
        text = f"its process {worker.process.pid} ended with {_cause(worker.process.exitcode)}"
        return Outcome(worker.task, "lost", text, time.monotonic() - worker.began)


def _end(process: BaseProcess, seconds: float) -> None:
    process.join(max(0.0, seconds))
    if process.is_alive():
        process.kill()
        process.join()


@contextlib.contextmanager
def _inherited(slot: Slot) -> Iterator[None]:
    """What a process must have before it imports torch: its cores, which it inherits, and its GPU."""
    affinity = os.sched_getaffinity(0) if slot.cores and hasattr(os, "sched_getaffinity") else None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        if affinity is not None:
            os.sched_setaffinity(0, slot.cores)
        os.environ["CUDA_VISIBLE_DEVICES"] = slot.gpu
        yield
    finally:
        if affinity is not None:
            os.sched_setaffinity(0, affinity)
        os.environ.pop("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def _work(pipe: Connection, place: Place) -> None:
    """The life of a worker."""
    scheduler = os.getppid()
    asked: list[int] = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the scheduler decides
    for name in ("SIGTERM", "SIGUSR1"):
        if number := getattr(signal, name, None):  # Windows has no SIGUSR1
            signal.signal(number, lambda number, _: asked.append(number))

    def stopped() -> int | None:
        return asked[0] if asked else signal.SIGTERM if os.getppid() != scheduler else None

    from fastlth.scaling.perform import perform

    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        outcome = perform(task, place, stopped)
        try:
            pipe.send(outcome)
        except OSError:
            return
        if asked:
            return


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name} (out of memory?)" if name == "SIGKILL" else name
    return f"exit code {code}"
