"""Small sweeps, and what it means that the folder they left is the one of undisturbed single runs."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

from fastlth import running
from fastlth.experiments.branch import branch
from fastlth.metrics import TIMING_FIELDS
from fastlth.scaling.perform import Place
from fastlth.scaling.spec import Sweep, read
from fastlth.store import container
from fastlth.store import ticket as tickets
from fastlth.store.inspect import summary
from tests.helpers import CPU

BASE = {
    "train.iterations": 40, "train.batch_size": 32, "train.lr": 1e-3, "evaluate.every": 10, "prune.rounds": 2,
    "data.validation": 64, **CPU,
}  # fmt: skip


def write_spec(path: Path, *, seeds: object = 2, branches: str = "", **settings: object) -> Path:
    """A sweep of LeNet-300-100 on the digits; keyword train__lr is train.lr."""
    values = {**BASE, **{name.replace("__", "."): value for name, value in settings.items()}}
    lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
    path.write_text(f'model = "lenet-300-100"\ndataset = "digits"\nseeds = {seeds}\n[settings]\n'
                    + "\n".join(lines) + "\n" + branches)  # fmt: skip
    return path


def _toml(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def small_sweep(folder: Path, **given: object) -> Sweep:
    return read(write_spec(folder / "spec.toml", **given))


def undisturbed(sweep: Sweep, out: Path) -> Path:
    """Every search and branch made one after the other, without tasks and workers."""
    for job in sweep.jobs:
        search = running.run(job.recipe, out=out, replicates=job.replicates)
        for replicate in search.replicates:
            for follow in job.follow:
                branch(replicate.path, follow.control, rounds=follow.rounds or "all", trials=follow.trials)
    return out


def content(out: Path) -> dict[str, Any]:
    """Every search's and every control's lines and results under ``out``, timing aside, by where they lie."""
    found: dict[str, Any] = {}
    for file in [*out.glob("*/r*/**/metrics.jsonl"), *out.glob("*/r*/**/result.json")]:
        records = [json.loads(line) for line in file.read_text().splitlines()]
        found[str(file.relative_to(out))] = [
            {k: v for k, v in record.items() if k not in TIMING_FIELDS} for record in records
        ]
    for file in out.glob("*/r*/search.ticket"):
        ticket = tickets.load(file)
        arrays = {**ticket.pruned_at, **ticket.rewind}
        found[str(file.relative_to(out))] = {n: (a.dtype.str, a.shape, a.tobytes()) for n, a in arrays.items()}
    return found


def assert_same_content(out: Path, reference: Path) -> None:
    """Bit for bit the same results, no line of metrics twice, and no state of an unfinished round left."""
    mine, other = content(out), content(reference)
    assert mine.keys() == other.keys()
    for name in other:
        assert mine[name] == other[name], f"{name} is not that of an undisturbed run"
    assert not list(out.rglob("state.safetensors")) and not list(out.rglob("*.tmp"))


# Workers that are killed


class Murderer(threading.Thread):
    """Kills ``kills`` workers with SIGKILL, each in the middle of a training, while ``alive`` says so.

    A worker's process is known from its task's log. It is halted first, and what it had saved is noted: whoever goes on
    has to begin there.
    """

    def __init__(self, place: Place, kills: int, seed: int = 0) -> None:
        super().__init__(daemon=True)
        self._place, self._kills, self._draw = place, kills, random.Random(seed)
        self.killed: list[tuple[Path, int, dict[int, tuple[int, int]]]] = []
        """(log, its length then, seed -> what it had saved)"""
        self.over = threading.Event()

    def run(self) -> None:
        while len(self.killed) < self._kills and not self.over.is_set():
            time.sleep(0.05 + 0.3 * self._draw.random())
            if at_work := self._at_work():
                self._kill(*self._draw.choice(at_work))

    def _at_work(self) -> list[tuple[Path, int]]:
        """Logs of searches whose process has begun to train."""
        found = []
        for log in (self._place.out / "logs").glob("*to-round*.log"):
            last = log.read_text().rpartition("-- ")[2]
            match = re.match(r"\S+ process (\d+) on", last)
            if match and "from iteration" in last and os.path.exists(f"/proc/{match[1]}"):
                found.append((log, int(match[1])))
        return found

    def _kill(self, log: Path, pid: int) -> None:
        try:
            os.kill(pid, signal.SIGSTOP)
            text = log.read_text()
            last = text.rpartition("-- ")[2]
            if f"process {pid} on" in last and "from iteration" in last:
                try:
                    self.killed.append((log, len(text), self._saved(text)))
                finally:
                    os.kill(pid, signal.SIGKILL)
            else:  # it has begun another task meanwhile
                os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            return

    def _saved(self, text: str) -> dict[int, tuple[int, int]]:
        """seed -> (round, iteration) that the run folders in a log say are on disk."""
        found = {}
        for folder in {Path(m) for m in re.findall(r"^(\S+/r\d+), \d+ rounds$", text, re.M)}:
            ticket, state = folder / "search.ticket", folder / "state.safetensors"
            rounds, iteration = len(summary(ticket).rounds) if ticket.exists() else 0, 0
            if state.exists():
                info = json.loads(container.read(state)[1]["info"])
                if info["round"] == rounds:
                    iteration = int(info["progress"]["iteration"])
            found[int(folder.name[1:])] = rounds, iteration
        return found


def assert_went_on_from_the_last_save(murderer: Murderer) -> None:
    """Nothing is trained twice but what came after a save: the next round that begins is the saved one, and where."""
    for log, length, saved in murderer.killed:
        rest = log.read_text()[length:]
        for seed, (round, iteration) in saved.items():
            alone = rf"^(?:seed {seed} )?round (\d+) from iteration (\d+)$"
            if first := re.search(alone, rest, re.M):
                assert (int(first[1]), int(first[2])) >= (round, iteration), log
