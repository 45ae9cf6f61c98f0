"""Workers of a Ray cluster. Ray places tasks, starts those of lost workers and nodes again, and keeps to resources.

Every node must see OUT and the data under the same paths, and have fastlth installed. Nothing but tasks and outcomes
goes through Ray: what a lost task had done is under OUT. A stop is asked for by a file there, which workers look for.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastlth.errors import EnvironmentFailure, RecipeError
from fastlth.scaling.machine import GROUP
from fastlth.scaling.perform import LOGS, Outcome, Place, perform
from fastlth.scaling.tasks import Task, Worker
from fastlth.store import atomic

OBJECT_STORE_BYTES = 100 * 2**20  # of a cluster made here; outcomes are all that lies in it
RETRIES = 3
LOOK_FOR_STOP_SECONDS = 1.0
CONNECT_SECONDS = 10.0
INSTALL = "--on ray needs Ray, which is not installed; install fastlth[ray], or use --on local"


def workers(cores: int | None, gpus: float | None, address: str | None) -> tuple[Worker, int]:
    """What a task gets and how many fit into the cluster now. Connects to it, or makes one of this machine.

    Raises RecipeError where Ray is not installed or nothing fits, EnvironmentFailure where no cluster answers.
    """
    ray = connect(address)
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    sizes = [int(n["CPU"]) for n in nodes if n.get("CPU", 0) >= 1]
    there = sum(n.get("GPU", 0) for n in nodes)
    each = (1.0 if there else 0.0) if gpus is None else gpus
    worker = Worker(cores=cores or min([GROUP, *sizes]), gpus=each)
    count = sum(_fit(n, worker) for n in nodes)
    if not count:
        raise RecipeError(f"no node of the Ray cluster has {worker.cores} processors and {worker.gpus:g} GPUs free for "
                          "a task; give fewer with --cores and --gpus")  # fmt: skip
    return worker, count


def connect(address: str | None) -> Any:
    """The module ray, connected: to ``address``, else to the cluster that Ray finds, else to one made here."""
    if find_spec("ray") is None:
        raise RecipeError(INSTALL)
    import ray

    if ray.is_initialized():
        return ray
    given = address or os.environ.get("RAY_ADDRESS") or ""
    if given.rpartition(":")[2].isdigit() and "//" not in given and not _answers(given):  # Ray would try for minutes
        raise EnvironmentFailure(f"no Ray cluster at {given}: nothing answers there; start one with 'ray start --head'")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if given:
            ray.init(address=given, **quiet)
            return ray
        try:
            if (noted := _noted()) and not _answers(noted):
                raise ConnectionError(f"nothing answers at {noted}")
            ray.init(address="auto", **quiet)
        except ConnectionError:
            ray.init(include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        where = given or "this machine"
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EnvironmentFailure(f"no Ray cluster at {where}: {first}; start one with 'ray start --head'") from error
    return ray


def _noted() -> str:
    """The cluster of this machine that Ray would join, "" where it has noted none. A cluster that was killed leaves its
    note behind, and Ray would wait for it for minutes."""
    root = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or tempfile.gettempdir()
    try:
        return (Path(root) / "ray" / "ray_current_cluster").read_text().strip()
    except OSError:
        return ""


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


class OnRay:
    """The backend on a Ray cluster, which is connected already."""

    def __init__(self, worker: Worker, place: Place) -> None:
        import ray

        self._ray, self._place = ray, place
        self._stop = place.out / LOGS / f"stop-{secrets.token_hex(4)}"
        self._remote = ray.remote(
            num_cpus=worker.cores, num_gpus=worker.gpus, max_retries=RETRIES, scheduling_strategy="SPREAD"
        )(_perform)
        self._running: dict[Any, tuple[str, float]] = {}

    def free(self) -> bool:
        return True  # Ray queues what does not fit yet, and sees the demand

    def start(self, task: Task) -> None:
        ref = self._remote.options(name=task.name).remote(task, self._place, self._stop)
        self._running[ref] = task.name, time.monotonic()

    def wait(self, seconds: float) -> list[Outcome]:
        if not self._running:  # all that is left has been put off
            time.sleep(seconds)
            return []
        refs = list(self._running)
        if not self._ray.wait(refs, num_returns=1, timeout=seconds)[0]:
            return []
        ended, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        return [self._outcome(ref) for ref in ended]

    def stop(self) -> None:
        atomic.make_folders(self._stop.parent)
        atomic.write(self._stop, b"")  # Ray's own cancelling would not let them save

    def close(self) -> None:
        atomic.delete(self._stop)  # the connection ends with this process, and with it what may still run

    def _outcome(self, ref: Any) -> Outcome:
        name, began = self._running.pop(ref)
        errors = self._ray.exceptions
        try:
            found: Outcome = self._ray.get(ref)
            return found
        except errors.RayTaskError as error:  # it could not even be begun, such as where fastlth is not installed
            text = str(error).strip().splitlines()[-1]
            return Outcome(name, "failed", text, time.monotonic() - began, EnvironmentFailure.exit_code)
        except errors.RayError as error:
            text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            return Outcome(name, "lost", text, time.monotonic() - began)


def _fit(node: dict[str, float], worker: Worker) -> int:
    """How many workers a node holds."""
    many = node.get("CPU", 0) // worker.cores
    return int(min(many, node.get("GPU", 0) // worker.gpus) if worker.gpus else many)


def _perform(task: Task, place: Place, stop: Path) -> Outcome:
    if stop.exists():
        return Outcome(task.name, "stopped", "not begun")
    return perform(task, place, _looks_for(stop))


def _looks_for(file: Path) -> Callable[[], int | None]:
    """SIGTERM's number once ``file`` is there."""
    looked = 0.0

    def stopped() -> int | None:
        nonlocal looked
        now = time.monotonic()
        if now - looked < LOOK_FOR_STOP_SECONDS:
            return None
        looked = now
        return signal.SIGTERM if file.exists() else None

    return stopped
