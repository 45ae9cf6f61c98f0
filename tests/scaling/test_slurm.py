"""The batch script of docs/scaling.md, run by bash with a stand-in for scontrol."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.scaling.sweeps import assert_same_content, small_sweep, undisturbed

ROOT = Path(__file__).parents[2]


def script() -> str:
    text = (ROOT / "docs" / "scaling.md").read_text()
    (found,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", text, re.S)
    return found


def test_it_has_six_lines():
    assert len(script().splitlines()) == 6


@pytest.mark.endurance
def test_a_job_that_runs_out_of_time_saves_asks_for_requeueing_and_goes_on(tmp_path):
    found = small_sweep(tmp_path, seeds=2, train__iterations=3000, store__save_every=30.0)
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, lines in (
        ("scontrol", f'echo "$@" >> {tmp_path}/asked'),
        ("fastlth", f'exec {sys.executable} -m fastlth "$@"'),
    ):
        (bin / name).write_text(f"#!/bin/sh\n{lines}\n")
        (bin / name).chmod(0o755)
    text = script()
    assert "sweep.toml" in text and "/shared/runs" in text
    text = text.replace("sweep.toml", str(tmp_path / "spec.toml")).replace("/shared/runs", str(tmp_path / "runs"))
    (tmp_path / "job.sh").write_text(text)
    env = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": "1",
           "PYTHONPATH": f"{ROOT}:{ROOT}/kernels:{os.environ.get('PYTHONPATH', '')}"}  # fmt: skip

    job = subprocess.Popen(["bash", str(tmp_path / "job.sh")], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs").glob("*/r*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.3)
    job.send_signal(signal.SIGUSR1)  # as --signal=B:USR1@... does: to the batch shell alone
    err = job.communicate(timeout=120)[1]
    assert job.returncode == 138, err
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert list((tmp_path / "runs").glob("*/r*/state.safetensors"))

    again = subprocess.run(["bash", str(tmp_path / "job.sh")], cwd=tmp_path, env=env, capture_output=True, text=True,
                           timeout=300)  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"  # not once more
    assert_same_content(tmp_path / "runs", undisturbed(found, tmp_path / "whole"))
