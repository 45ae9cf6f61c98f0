"""A disk that fills up while a search runs: one clear line, nothing lost, and on it goes once there is room."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.endurance.searches import Process, assert_equal_runs, complete, content, find_ticket, run_folder, wait_until


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 3 MB, where mounting is allowed."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed: {done.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def fill(file: Path) -> None:
    """Take all the room that is left, to the last byte."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    os.write(fd, bytes(size))
    finally:
        os.close(fd)


def assert_says_that_the_disk_is_full(code: int, err: str) -> None:
    last = err.splitlines()[-1]
    assert code == 6, err
    assert last.startswith("fastlth: the disk is full: ") and "make room and start the same command again" in last
    assert err.count("the disk is full") == 1 and "Traceback" not in err


@pytest.mark.slow
def test_a_search_on_a_disk_that_fills_up(small_disk, tmp_path):
    complete(find_ticket(tmp_path / "whole", rounds=6, iterations=400), warm=True)
    command = find_ticket(small_disk / "runs", rounds=6, iterations=400)
    with Process(command, warm=True) as process:
        assert wait_until(lambda: any((small_disk / "runs").glob("*/r0/search.ticket")), process)
        process.signal(signal.SIGSTOP)
        fill(small_disk / "ballast")
        process.signal(signal.SIGCONT)
        assert_says_that_the_disk_is_full(*process.finish())
    folder = run_folder(small_disk / "runs")
    saved = content(folder)  # reads and checks every byte
    with Process(command, warm=True) as process:  # still no room
        assert_says_that_the_disk_is_full(*process.finish())
    assert content(folder)["rounds"] == saved["rounds"]
    assert not any(folder.glob(".*"))
    (small_disk / "ballast").unlink()
    complete(command, warm=True)
    assert_equal_runs(folder, run_folder(tmp_path / "whole"))


def test_a_disk_that_is_full_from_the_start(small_disk):
    fill(small_disk / "ballast")
    with Process(find_ticket(small_disk / "runs", rounds=1, iterations=40), warm=True) as process:
        assert_says_that_the_disk_is_full(*process.finish())


def test_the_filler_leaves_no_byte(small_disk):
    fill(small_disk / "ballast")
    with pytest.raises(OSError) as caught:
        (small_disk / "more").write_bytes(b"x")
    assert caught.value.errno == errno.ENOSPC
