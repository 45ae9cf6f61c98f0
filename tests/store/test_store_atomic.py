"""A file is the old one or the new one, whatever fails: every single call of every write is made to."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastlth.errors import EnvironmentFailure, OutputError
from fastlth.recipe import Recipe
from fastlth.store import atomic
from fastlth.store.metrics_file import MetricsFile
from fastlth.store.run import Run, State
from fastlth.store.ticket import Ticket

ROOT = Path(__file__).parents[2]
CALLS = ("open_new", "write_all", "sync", "replace", "remove")


class Disk:
    """Counts the store's calls to the disk and fails the one it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fail_at = -1
        self.error: BaseException = OSError(errno.EIO, "input/output error")
        for name in CALLS:
            monkeypatch.setattr(atomic, name, self.counted(name, getattr(atomic, name)))

    def counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) - 1 != self.fail_at:
                return call(*args)
            if name == "write_all":  # half of it arrives
                os.write(args[0], memoryview(args[1])[: memoryview(args[1]).nbytes // 2])
            raise self.error

        return wrapped

    def reset(self, fail_at: int = -1) -> None:
        self.calls, self.fail_at = [], fail_at


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    yield Disk(monkeypatch)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "i"), OSError(errno.ENOSPC, "f"), KeyboardInterrupt()], ids=repr)
def test_write_leaves_the_old_file_or_the_new_one(disk: Disk, tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    parts: list[atomic.Buffer] = [b"new", memoryview(b" content"), bytearray(b" here")]
    atomic.write(path, parts)
    steps = ["open_new", *["write_all"] * 3, "sync", "replace", "sync"]
    assert disk.calls == steps
    disk.error = error
    for position in range(len(steps)):
        path.write_bytes(b"old")
        disk.reset(fail_at=position)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else EnvironmentFailure):
            atomic.write(path, parts)
        assert len(disk.calls) == position + 1
        assert path.read_bytes() == (b"new content here" if position == 6 else b"old")
        assert list(tmp_path.iterdir()) == [path]


def test_short_writes_are_continued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    atomic.write(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, EnvironmentFailure, "the disk is full"),
        (errno.EDQUOT, EnvironmentFailure, "quota is used up"),
        (errno.EFBIG, EnvironmentFailure, "limit on file sizes"),
        (errno.EIO, EnvironmentFailure, "was saved before is whole"),
        (errno.EACCES, OutputError, "make it writable or choose another folder"),
        (errno.EROFS, OutputError, "make it writable or choose another folder"),
    ],
)
def test_errors_say_what_to_do(disk: Disk, tmp_path: Path, number: int, kind: type[Exception], words: str) -> None:
    disk.error = OSError(number, os.strerror(number))
    disk.reset(fail_at=1)
    with pytest.raises(kind, match=words) as caught:
        atomic.write(tmp_path / "file", b"data")
    assert str(tmp_path / "file") in str(caught.value)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "missing" / "x", tmp_path / "file" / "x", tmp_path / ("n" * 300)):
        with pytest.raises(OutputError, match="choose another folder"):
            atomic.write(path, b"data")
    with pytest.raises(OutputError, match="choose another folder"):
        atomic.make_folders(tmp_path / "file" / "x" / "y")
    with pytest.raises(OutputError):  # the target is a folder
        atomic.write(tmp_path, b"data")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_delete_and_sweep(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic.delete(path)
    atomic.write(path, b"x")
    (tmp_path / ".file.0badcafe.tmp").write_bytes(b"half")
    atomic.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    disk.reset(fail_at=0)
    with pytest.raises(EnvironmentFailure):
        atomic.delete(path)
    assert path.exists()
    disk.reset()
    atomic.delete(path)
    assert disk.calls == ["remove", "sync"]
    assert not path.exists()


# The same for everything a run writes.


def recipe() -> Recipe:
    return Recipe.from_dict({"model": {"name": "lenet-300-100"}, "data": {"name": "digits"},
                             "train": {"iterations": 100, "batch_size": 20, "lr": 1e-3}})  # fmt: skip


def a_ticket(rounds: int) -> Ticket:
    at = np.array([0, 0, 1, 2, 3], np.uint8)
    return Ticket(recipe=recipe(), resolved={}, rewind={"w": np.arange(5, dtype=np.float32)}, rewind_iteration=0,
                  pruned_at={"w": np.where(at > rounds, 0, at).astype(np.uint8)}, all_weights=5,
                  rounds=tuple({"round": r, "kept": 5 - r, "density": 1 - r / 5} for r in range(rounds)))  # fmt: skip


def play(run: Run, seen: Callable[[str], None]) -> None:
    """What a search does to its folder in three rounds; ``seen`` hears of every step that ended well."""
    run.write_recipe(recipe(), {"device": "cpu"})
    seen("recipe")
    with MetricsFile(run.metrics_path) as metrics:
        for round in range(3):
            for iteration in (1, 2):
                metrics.write({"round": round, "iteration": iteration})
                metrics.sync()
                seen(f"metrics {metrics.bytes}")
                info = {"round": round, "iteration": iteration, "metrics_bytes": metrics.bytes}
                run.save_state(State({"w": np.full(50, iteration, np.float32)}, info))
                seen(f"state {round} {iteration}")
            run.save_ticket(a_ticket(round + 1))
            seen(f"ticket {round + 1}")
            run.drop_state()
            seen("drop")


def test_everything_saved_before_a_failure_is_still_there(disk: Disk, tmp_path: Path) -> None:
    with Run.open(tmp_path / "good", recipe()) as run:
        disk.reset()
        play(run, lambda _: None)
    total = len(disk.calls)
    assert total > 80
    for position in range(total):
        disk.reset()
        done: list[str] = []
        with Run.open(tmp_path / str(position), recipe()) as run:
            disk.reset(fail_at=position)
            with pytest.raises(EnvironmentFailure):
                play(run, done.append)
            disk.reset()
        assert list(run.path.glob(".*")) == []
        with Run.open(tmp_path / str(position), recipe()) as again:
            check_like(again, done)


def check_like(run: Run, done: list[str]) -> None:
    """What is on disk is what the steps that ended left, or, for the step that failed, what it was to leave."""
    rounds = [int(s.split()[1]) for s in done if s.startswith("ticket")]
    ticket = run.ticket()
    saved = len(ticket.rounds) if ticket else 0
    assert saved - (rounds[-1] if rounds else 0) in (0, 1)
    states = [s.split()[1:] for s in done if s.startswith("state")]
    state = run.state()
    if states and int(states[-1][0]) == saved:  # the round of the last state is not in the ticket yet
        assert state is not None
        assert [str(state.info["round"]), str(state.info["iteration"])] >= states[-1]
    if state is not None:
        assert (state.arrays["w"] == state.info["iteration"]).all()
        with MetricsFile(run.metrics_path) as metrics:  # its lines are there, and whole
            metrics.cut(state.info["metrics_bytes"])
            assert run.metrics_path.read_bytes().endswith(b"}\n")


CHILD = """
import resource, sys
from pathlib import Path
from fastlth.errors import EnvironmentFailure
from fastlth.store import atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    atomic.write(Path(sys.argv[1]), bytes(5000))
except EnvironmentFailure as error:
    print(error)
"""


def test_a_real_file_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    child = subprocess.run([sys.executable, "-c", CHILD, path], capture_output=True, text=True, check=False,
                           env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"})  # fmt: skip
    assert child.stdout.startswith("the limit on file sizes is reached")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


WRITER = """
import sys
from pathlib import Path
from fastlth.store import atomic
print("ready", flush=True)
while True:
    for letter in (b"a", b"b"):
        atomic.write(Path(sys.argv[1]), letter * 3_000_000)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * 3_000_000)
    for pause in range(8):
        child = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE,
                                 env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"})  # fmt: skip
        assert child.stdout is not None
        with child, child.stdout:
            child.stdout.readline()
            time.sleep(0.003 * pause)
            child.send_signal(signal.SIGKILL)
        assert set(path.read_bytes()) in ({ord("a")}, {ord("b")})
        assert path.stat().st_size == 3_000_000
        atomic.sweep(tmp_path)
        assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_tried_before_hours_are_spent(tmp_path):
    atomic.check_folder(tmp_path / "new" / "one")
    assert list((tmp_path / "new" / "one").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*file.*; make it writable or choose another folder"):
        atomic.check_folder(tmp_path / "file")
