"""A signal ends a search at the next safe point, saved; the command it prints goes on from there."""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.endurance.searches import TIMEOUT, Process, assert_equal_runs, at_work, complete, find_ticket, run_folder

SIGNALS = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138}


def printed_command(err: str) -> list[str]:
    """The last line's resume command, as a shell would read it, without the leading ``fastlth``."""
    found = re.fullmatch(r"fastlth: stopped and saved; go on with: (fastlth resume .*)", err.splitlines()[-1])
    assert found, err
    program, *arguments = shlex.split(found[1])
    assert program == "fastlth"
    return arguments


@pytest.mark.parametrize(
    ("times", "rounds", "iterations", "warm"),
    [
        pytest.param(1, 4, 300, True, id="once each"),
        pytest.param(7, 20, 600, False, marks=pytest.mark.endurance, id="seven times each"),
    ],
)
def test_stopped_by_signals_and_resumed_as_printed_the_search_is_the_same(tmp_path, times, rounds, iterations, warm):
    complete(find_ticket(tmp_path / "whole", rounds=rounds, iterations=iterations), warm=warm)
    # a path that a shell would split, since the printed command must be one to paste; saves only when stopped
    out = tmp_path / "my runs"
    command = find_ticket(out, rounds=rounds, iterations=iterations, save_every="1h")
    delays = random.Random(7)
    for name in [*SIGNALS] * times:
        with Process(command, warm=warm) as process:
            assert at_work(out, process), "ended before it could be stopped: make the search longer"
            time.sleep(delays.random() / 5)
            process.signal(getattr(signal, name))
            code, err = process.finish()
        assert code == SIGNALS[name], err
        assert "stopping at the next safe point" in err and "Traceback" not in err
        command = printed_command(err)
    complete(command, warm=warm)
    assert_equal_runs(run_folder(out), run_folder(tmp_path / "whole"))


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.endurance)])
def test_a_second_interrupt_leaves_at_once_and_damages_nothing(tmp_path, times):
    rounds = 1 + times
    complete(find_ticket(tmp_path / "whole", rounds=rounds, iterations=300), warm=True)
    command = find_ticket(tmp_path / "out", rounds=rounds, iterations=300)
    delays = random.Random(3)
    for _ in range(times):
        with Process(command, warm=True) as process:
            assert at_work(tmp_path / "out", process)
            time.sleep(delays.random() / 10)
            process.signal(signal.SIGINT)
            time.sleep(0.001)
            process.signal(signal.SIGINT)
            code, err = process.finish()
        assert code == 130, err
        assert "Traceback" not in err
    complete(command, warm=True)
    assert_equal_runs(run_folder(tmp_path / "out"), run_folder(tmp_path / "whole"))


ENDLESS_STEP = """
import time
from fastlth.ui import StopGuard
with StopGuard() as guard:
    print("ready", flush=True)
    while True:
        time.sleep(1)  # a step that never ends, so that only the second interrupt can
"""


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_a_second_interrupt_waits_for_no_step(first):
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", ENDLESS_STEP], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "PYTHONPATH": f"{root}:{root}/kernels"})  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(getattr(signal, first))
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 130
    finally:
        process.kill()
        process.communicate()
