"""metrics.jsonl: whole lines of strict JSON, cut to a saved length."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from fastlth.errors import EnvironmentFailure, OutputError, TicketError
from fastlth.store import atomic
from fastlth.store.metrics_file import MetricsFile


def test_lines_are_there_at_once_and_strict(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write({"loss": 0.1, "note": "\u00e9\n"})
        metrics.write({"loss": float("nan"), "deep": [{"x": float("inf")}, (-float("inf"), 1)]})
        lines = path.read_bytes().splitlines(keepends=True)
        assert metrics.bytes == path.stat().st_size == sum(map(len, lines))
    assert [json.loads(line) for line in lines] == [
        {"loss": 0.1, "note": "\u00e9\n"},
        {"loss": None, "deep": [{"x": None}, [None, 1]]},
    ]
    assert all(line.endswith(b"\n") for line in lines)


def test_cut_and_go_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write({"i": 1})
        metrics.sync()
        saved = metrics.bytes
        metrics.write({"i": 2})
    path.write_bytes(path.read_bytes() + b'{"half')
    with MetricsFile(path) as metrics:
        metrics.cut(saved)
        assert metrics.bytes == saved
        metrics.write({"i": 3})
        assert metrics.bytes == path.stat().st_size
    assert path.read_bytes() == b'{"i": 1}\n{"i": 3}\n'


def test_a_file_that_is_too_short_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write({"i": 1})
        with pytest.raises(TicketError, match=r"has 9 bytes but the saved search has written 10; .* --fresh"):
            metrics.cut(10)
    assert path.read_bytes() == b'{"i": 1}\n'


def test_a_line_that_fails_half_way_is_taken_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(fd: int, data: bytes) -> None:
        os.write(fd, data[:4])
        raise OSError(errno.ENOSPC, "full")

    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write({"i": 1})
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "write_all", full)
            with pytest.raises(EnvironmentFailure, match="the disk is full"):
                metrics.write({"i": 2})
        assert path.read_bytes() == b'{"i": 1}\n'
        metrics.write({"i": 3})
    assert path.read_bytes() == b'{"i": 1}\n{"i": 3}\n'


def test_sync_and_open_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="choose another folder"):
        MetricsFile(tmp_path / "missing" / "metrics.jsonl")

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        monkeypatch.setattr(atomic, "sync", broken)
        with pytest.raises(EnvironmentFailure):
            metrics.sync()
    metrics.close()  # a second time is harmless


def test_a_real_full_device(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    link = tmp_path / "metrics.jsonl"
    link.symlink_to("/dev/full")
    fd = os.open(link, os.O_WRONLY)
    with pytest.raises(OSError) as caught:
        atomic.write_all(fd, b"x")
    os.close(fd)
    assert isinstance(atomic.explain(caught.value, link), EnvironmentFailure)
    assert "the disk is full" in str(atomic.explain(caught.value, link))
