"""Searches as real processes, small enough to be stopped often, and what it means that two of them are equal."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fastlth.metrics import TIMING_FIELDS
from fastlth.store.ticket import load

ROOT = Path(__file__).parents[2]
TIMEOUT = 300  # seconds; only so that a hanging process fails a test instead of stopping the suite

FIXED = [
    "--device", "cpu", "--precision", "fp32", "--compile", "off", "--loader", "resident", "--engine", "dense",
    "--set", "compute.threads=1", "--set", "compute.channels_last=off",
]  # fmt: skip


def find_ticket(out: Path, *, rounds: int = 20, iterations: int = 600, save_every: str = "0.05s", seed: int = 0,
                settings: tuple[str, ...] = ()) -> list[str]:  # fmt: skip
    """The arguments of a search over the real digits; late rewinding, so that theta_k is at stake too."""
    more = [x for setting in ("evaluate.every=20", *settings) for x in ("--set", setting)]
    return ["find-ticket", "lenet-300-100", "digits", "--rounds", str(rounds), "-i", str(iterations), "-b", "32",
            "--rewind-to", "30it", "--save-every", save_every, "--seed", str(seed), "--out", str(out),
            *FIXED, *more]  # fmt: skip


class Process:
    """The command as a process of its own, which does not outlive the ``with`` block.

    Cold: ``python -m fastlth``, as a shell starts it. Warm: forked from a server that has imported torch already,
    so that a test in the ordinary suite can afford a dozen.
    """

    def __init__(self, arguments: list[str], *, warm: bool) -> None:
        self._err = tempfile.NamedTemporaryFile("r", suffix=".stderr")
        self._process: subprocess.Popen[str] | BaseProcess
        with _environment():
            if warm:
                self._process = FORKSERVER.Process(target=_main, args=(arguments, self._err.name))
                self._process.start()
            else:
                with open(self._err.name, "w") as err:
                    self._process = subprocess.Popen(
                        [sys.executable, "-m", "fastlth", *arguments], text=True, stderr=err,
                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    )  # fmt: skip

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code, None before the end; -9 is death by signal 9."""
        return self._process.poll() if isinstance(self._process, subprocess.Popen) else self._process.exitcode

    def finish(self) -> tuple[int, str]:
        """(exit code, stderr) of a process that is about to end."""
        if isinstance(self._process, subprocess.Popen):
            self._process.wait(TIMEOUT)
        else:
            self._process.join(TIMEOUT)
        assert self.code is not None, "it does not end"
        return self.code, Path(self._err.name).read_text()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.code is None:
            self.signal(signal.SIGKILL)
            self.finish()
        self._err.close()


FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload([
    "fastlth.cli.main", "fastlth.cli.show", "fastlth.running", "fastlth.ui", "sklearn.datasets",
    "torch._dynamo",  # which every optimizer imports when it is made
])  # fmt: skip


def _main(arguments: list[str], err: str) -> None:
    os.dup2(os.open(err, os.O_WRONLY), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ["fastlth", *arguments]
    from fastlth.cli.main import main

    main()


@contextmanager
def _environment() -> Iterator[None]:
    """Processes started here import from this checkout, installed or not."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT}/kernels"
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def complete(arguments: list[str], *, warm: bool) -> None:
    """Run to the end."""
    with Process(arguments, warm=warm) as process:
        code, err = process.finish()
    assert code == 0, err


def run_folder(out: Path) -> Path:
    """The one run under ``out``."""
    (folder,) = out.glob("*/r*")
    return folder


def wait_until(condition: Callable[[], bool], process: Process, pause: float = 0.002) -> bool:
    """Whether the condition came true before the process ended."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if process.code is not None:
            return condition()
        assert time.monotonic() < deadline, "nothing happens any more"
        time.sleep(pause)
    return True


def metrics_size(out: Path) -> int:
    return sum(file.stat().st_size for file in out.glob("*/r*/metrics.jsonl"))


def at_work(out: Path, process: Process) -> bool:
    """Wait until the process has begun to train (or to cut metrics, just before); False if it has ended."""
    before = metrics_size(out)
    return wait_until(lambda: metrics_size(out) != before, process)


def content(folder: Path) -> dict[str, Any]:
    """All that may not depend on how often a run was stopped: the ticket and the metrics, timing aside."""
    ticket = load(folder / "search.ticket")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "recipe": ticket.recipe.digest,
        "rewind": {n: (a.dtype.str, a.shape, a.tobytes()) for n, a in ticket.rewind.items()},
        "rewind_iteration": ticket.rewind_iteration,
        "pruned_at": {n: (a.shape, a.tobytes()) for n, a in ticket.pruned_at.items()},
        "rounds": [_untimed(r) for r in ticket.rounds],
        "metrics": [_untimed(line) for line in lines],
    }


def assert_equal_runs(folder: Path, reference: Path) -> None:
    """Bit for bit, no line twice and none missing, and nothing left over from what was interrupted."""
    mine, other = content(folder), content(reference)
    assert mine.keys() == other.keys()
    for key in mine:
        assert mine[key] == other[key], f"{key} of {folder} is not that of an undisturbed search"
    assert sorted(p.name for p in folder.iterdir()) == ["lock", "metrics.jsonl", "recipe.toml", "search.ticket"]


def _untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in TIMING_FIELDS}
