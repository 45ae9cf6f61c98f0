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


def write_spec(
    path: Path, *, seeds: object = 2, branches: str = "", model: str = "lenet-300-100", dataset: str = "digits",
    **settings: object,
) -> Path:  # fmt: skip
    """A sweep, of LeNet-300-100 on the digits where not said otherwise; keyword train__lr is train.lr."""
    values = {**BASE, **{name.replace("__", "."): value for name, value in settings.items()}}
    lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
    path.write_text(f'model = "{model}"\ndataset = "{dataset}"\nseeds = {seeds}\n[settings]\n'
                    + "\n".join(lines) + "\n" + branches)  # fmt: skip
    return path


def _toml(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


OWN = """
import multiprocessing
import numpy as np
from torch import nn

def net(shape, classes):
    channels, height, width = shape
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(4 * height * width, classes))

def part(seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (120, 8, 8, 3), dtype=np.uint8), np.arange(120) % 4

def arrays(): return part(0), part(1)

def read_by_others():  # as slow data often is
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return tuple(pool.map(part, (0, 1)))
"""
OWN_SETTINGS: dict[str, object] = {"data__validation": 20, "train__batch_size": 16}


def own_code(folder: Path, name: str) -> None:
    """A module of one's own, and a folder of images ``flowers``, in ``folder``."""
    from PIL import Image

    (folder / f"{name}.py").write_text(OWN)
    draw = random.Random(0)
    for split in ("train", "val"):
        for number in range(2):
            (folder / "flowers" / split / str(number)).mkdir(parents=True)
            for i in range(40):
                colour = tuple(draw.randrange(100) + 100 * (c == number) for c in range(3))
                Image.new("RGB", (9 + i % 3, 8), colour).save(folder / "flowers" / split / str(number) / f"{i}.png")


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
        self._dead: set[int] = set()  # a process that has not been reaped yet looks as if it lived
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
            alive = match and int(match[1]) not in self._dead and os.path.exists(f"/proc/{match[1]}")
            if match and alive and "from iteration" in last:
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
                    self._dead.add(pid)
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


def times_begun(place: Place) -> int:
    """How often a task was begun, by the logs."""
    return sum(len(re.findall(r"^-- .* process", log.read_text(), re.M)) for log in place.out.glob("logs/*.log"))


def assert_went_on_from_the_last_save(murderer: Murderer) -> None:
    """Nothing is trained twice but what came after a save: the next round that begins is the saved one, and where."""
    for log, length, saved in murderer.killed:
        rest = log.read_text()[length:]
        for seed, (round, iteration) in saved.items():
            alone = rf"^(?:seed {seed} )?round (\d+) from iteration (\d+)$"
            if first := re.search(alone, rest, re.M):
                assert (int(first[1]), int(first[2])) >= (round, iteration), log
