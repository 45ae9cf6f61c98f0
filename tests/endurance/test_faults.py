"""Every single open, write, fsync, rename and removal of a search fails once: nothing that was saved is lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from fastlth.errors import EnvironmentFailure
from fastlth.running import run
from tests.endurance.disks import Death, Disk
from tests.endurance.searches import assert_equal_runs, run_folder
from tests.helpers import small_recipe


class AtOnce:
    """The saver's thread, made deterministic: a save is done when submitted; its error still comes later."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, call: Callable[..., None], *args: Any) -> Future[None]:
        future: Future[None] = Future()
        try:
            future.set_result(call(*args))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool) -> None:
        pass


@pytest.fixture
def disk(monkeypatch, tmp_path):
    monkeypatch.setattr("fastlth.saving.ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr("fastlth.saving.Saver.due", lambda self: True)
    monkeypatch.setattr("fastlth.training.trainer.CHUNK_SECONDS", 1e9)  # one step first, then up to the evaluation
    return Disk(monkeypatch, tmp_path)


RECIPE = small_recipe(train__iterations=6, evaluate__every=3, prune__rounds=1, prune__rewind_to=2)


def one_of_each(calls: list[tuple[str, str]]) -> list[int]:
    """The last position of every kind of call on every file; the last one of a kind comes upon something saved."""
    return sorted({call: position for position, call in enumerate(calls)}.values())


@pytest.mark.parametrize("how", ["full", "broken", "killed", "power"])
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.endurance)], ids=["one of each", "all"])
def test_a_failure_at_any_call_to_the_disk_loses_nothing(disk, tmp_path, every, how):
    disk.fail(-1, "")
    run(RECIPE, out=tmp_path / "whole")
    calls, reference = disk.calls, run_folder(tmp_path / "whole")
    print(f"{len(calls)} calls, {len(set(calls))} kinds")
    assert {call for call, _ in calls} == {"mkdir", "open", "write", "fsync", "ftruncate", "replace", "unlink"}
    for position in range(len(calls)) if every else one_of_each(calls):
        where, out = f"{how} at call {position}, {' '.join(calls[position])}", tmp_path / str(position)
        disk.heal()
        disk.fail(position, how)
        caught: BaseException | None = None
        try:
            run(RECIPE, out=out)
        except (EnvironmentFailure, Death) as error:
            caught = error
        assert len(disk.calls) > position, where
        if how in ("full", "broken"):  # the name in the lock is a courtesy, which may fail
            assert isinstance(caught, EnvironmentFailure) or calls[position][1] == "lock", where
            assert caught is None or "\n" not in str(caught), where
            assert not any(out.glob("*/*/.*")), where  # cleaned up where that was possible
        else:
            assert isinstance(caught, Death), where
        disk.heal()
        run(RECIPE, out=out)
        assert_equal_runs(run_folder(out), reference)


def test_the_disk_that_fails_also_loses_what_was_not_synced(disk, tmp_path):
    """The instrument itself: without the fsyncs, a power cut must be seen."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    disk.fail(-1, "power")
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(fd, b" synced")
    os.fsync(fd)
    os.write(fd, b" lost")
    with pytest.raises(AssertionError, match="renamed before it was synced"):
        os.replace(path, tmp_path / "other")
    disk.fail(0, "power")
    with pytest.raises(Death):
        os.write(fd, b"never")
    disk.heal()
    assert path.read_bytes() == b"old synced"
