"""Which workers there are: on this machine, or in a Ray cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fastlth.errors import RecipeError, unknown
from fastlth.scaling.local import Local, Slot, slots
from fastlth.scaling.perform import Place
from fastlth.scaling.schedule import Backend
from fastlth.scaling.tasks import Worker

WHERE = ("local", "ray")
GROUP = 4
"""cores of a worker on a CPU: what small nets need to run side by side, and convolutions still use well"""


@dataclass(frozen=True)
class Wanted:
    """What was asked for; None: decided by looking."""

    on: str = "local"
    cores: int | None = None
    gpus: float | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.on not in WHERE:
            raise RecipeError(unknown("--on", self.on, WHERE))
        if self.cores is not None and self.cores < 1:
            raise RecipeError(f"--cores must be at least 1, got {self.cores}")
        if self.gpus is not None and not (0 < self.gpus < 1 or self.gpus in (0, 1)):
            raise RecipeError(f"--gpus must be 0, 1 or a share of one in between, got {self.gpus:g}")
        if self.address is not None and self.on != "ray":
            raise RecipeError(f"--address {self.address} is a Ray cluster's; add --on ray")


def workers(wanted: Wanted) -> tuple[Worker, int]:
    """What a task gets and how many run at a time. Connects to Ray where that was asked for.

    Raises RecipeError where Ray is not installed or there is no such cluster.
    """
    if wanted.on == "ray":
        from fastlth.scaling import on_ray

        return on_ray.workers(wanted.cores, wanted.gpus, wanted.address)
    gpus = _gpus() if wanted.gpus != 0 else []
    if wanted.gpus and not gpus:
        raise RecipeError(f"--gpus {wanted.gpus:g}, but this machine has none; leave it out")
    worker = Worker(cores=min(wanted.cores or GROUP, len(_cores())), gpus=(wanted.gpus or 1.0) if gpus else 0.0)
    return worker, len(_slots(worker))


def backend(wanted: Wanted, worker: Worker, place: Place) -> Backend:
    """The workers themselves. To be closed."""
    if wanted.on == "ray":
        from fastlth.scaling import on_ray

        return on_ray.OnRay(worker, place)
    return Local(_slots(worker), place)


def _slots(worker: Worker) -> list[Slot]:
    return slots(_cores(), worker.cores, _gpus() if worker.gpus else [], worker.gpus or 1.0)


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them, without a CUDA context in this process."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]
