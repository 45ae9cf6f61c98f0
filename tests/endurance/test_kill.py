"""kill -9 at any moment, the same command again: the search is the one it would have been."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.endurance.searches import (
    Process,
    assert_equal_runs,
    at_work,
    complete,
    find_ticket,
    run_folder,
    wait_until,
)

SAMPLE = ("saving", "training", "training", "saving", "starting")
STARTING = {True: 0.5, False: 8.0}  # seconds within which a process, warm or cold, has begun to train, or nearly so


def being_saved(out: Path) -> bool:
    """Whether a file is being written beside the one it will replace."""
    return any(out.glob("*/r*/.*.tmp"))


def kill_somewhere(process: Process, out: Path, moment: str, delay: float) -> bool:
    """Send SIGKILL at one of three kinds of moment; False if the process ended by itself before."""
    if moment == "starting":
        time.sleep(delay)
    elif at_work(out, process):
        time.sleep(delay)
        if moment == "saving":
            wait_until(lambda: being_saved(out), process, pause=0.0)
    if process.code is None:
        process.signal(signal.SIGKILL)
    code, err = process.finish()
    assert code in (0, -signal.SIGKILL), err
    return code != 0


@pytest.mark.parametrize(
    ("kills", "rounds", "iterations", "warm"),
    [
        pytest.param(6, 4, 200, True, marks=pytest.mark.slow, id="six kills"),
        pytest.param(50, 20, 600, False, marks=pytest.mark.endurance, id="fifty kills over twenty rounds"),
    ],
)
def test_killed_at_random_moments_the_search_is_the_same(tmp_path, kills, rounds, iterations, warm):
    complete(find_ticket(tmp_path / "whole", rounds=rounds, iterations=iterations), warm=warm)
    reference = run_folder(tmp_path / "whole")
    moments = random.Random(20)
    done, searches = 0, 0
    while done < kills:  # a search that ends before all kills are made is followed by another
        searches += 1
        out = tmp_path / str(searches)
        command = find_ticket(out, rounds=rounds, iterations=iterations)
        while done < kills:
            moment = SAMPLE[done % len(SAMPLE)]
            delay = moments.random() * (STARTING[warm] if moment == "starting" else 1.0)
            with Process(command, warm=warm) as process:
                if not kill_somewhere(process, out, moment, delay):
                    break
            done += 1
        complete(command, warm=warm)
        assert_equal_runs(run_folder(out), reference)
    print(f"{done} kills in {searches} searches")


def test_two_processes_do_not_share_a_run_and_a_killed_holder_is_taken_over(tmp_path):
    command, other = (find_ticket(tmp_path / "one", rounds=2, iterations=300, seed=s) for s in (0, 1))
    with Process(command, warm=True) as first:
        assert at_work(tmp_path / "one", first)
        first.signal(signal.SIGSTOP)  # so that it holds its run for as long as the others look
        with Process(command, warm=True) as second, Process(other, warm=True) as beside:
            code, err = second.finish()
            assert code == 6, err
            assert f"in use by process {first.pid} on " in err.splitlines()[-1] and "Traceback" not in err
            assert beside.finish()[0] == 0  # another seed is another run
        first.signal(signal.SIGKILL)
        first.finish()
    complete(command, warm=True)
    for seed in (0, 1):
        alone = tmp_path / f"alone-{seed}"
        complete(find_ticket(alone, rounds=2, iterations=300, seed=seed), warm=True)
        (together,) = (tmp_path / "one").glob(f"*/r{seed}")
        assert_equal_runs(together, run_folder(alone))
