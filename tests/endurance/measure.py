"""How long a stop takes, and what saving costs: ``python -m tests.endurance.measure``. Prints, asserts nothing.

A lenet-300-100 on images of MNIST's size (random pixels), so that it runs anywhere.
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import threading
import time
from unittest.mock import patch

from fastlth import running
from fastlth.errors import Stopped
from fastlth.saving import Saver
from fastlth.ui import StopGuard
from tests.helpers import random_source, small_recipe

SETTINGS = {"evaluate__every": 100, "train__batch_size": 60, "data__validation": 5000, "prune__rounds": 20}
SOURCE = random_source("mnist", train=60_000, test=10_000)


def recipe(iterations: int, **settings: object) -> running.Recipe:
    return small_recipe("lenet-300-100", "mnist", train__iterations=iterations, **{**SETTINGS, **settings})


def stop_latency(times: int) -> list[float]:
    """Seconds from SIGTERM to the end of ``run``, saved, sent at moments spread over the time between two saves."""
    taken = []
    for i in range(times):
        with tempfile.TemporaryDirectory() as out, StopGuard() as guard:
            sent: list[float] = []

            def send(sent: list[float] = sent) -> None:
                sent.append(time.perf_counter())
                os.kill(os.getpid(), signal.SIGTERM)

            timer = threading.Timer(1.0 + 0.137 * i, send)
            timer.start()
            try:
                running.run(recipe(50_000), out=out, stopped=guard)
            except Stopped:
                taken.append(time.perf_counter() - sent[0])
            timer.join()
    return taken


def saving_share(save_every: float, seconds_wanted: float = 20.0) -> tuple[float, float, int]:
    """(share of the time in which the training thread waits for a save, seconds in all, saves)."""
    waits: list[float] = []
    real = Saver.state

    def timed(self: Saver, event: object) -> None:
        started = time.perf_counter()
        real(self, event)  # type: ignore[arg-type]
        waits.append(time.perf_counter() - started)

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out, patch.object(Saver, "state", timed):
        try:
            running.run(recipe(50_000, store__save_every=save_every), out=out,
                        stopped=lambda: 15 if time.perf_counter() - began > seconds_wanted else None)  # fmt: skip
        except Stopped:
            waits.pop()
    total = time.perf_counter() - began
    return sum(waits) / total, total, len(waits)


def main() -> None:
    with patch("fastlth.running.load", lambda *_: SOURCE):
        stop_latency(1)  # what is imported at the first use
        taken = sorted(stop_latency(12))
        print(f"stop: median {statistics.median(taken):.2f} s, worst {taken[-1]:.2f} s, n={len(taken)}")
        for every in (1.0, 60.0):
            share, total, saves = saving_share(every)
            print(f"--save-every {every:g}s: {saves} saves in {total:.1f} s stop the step for {share:.2%} of the time")


if __name__ == "__main__":
    main()
