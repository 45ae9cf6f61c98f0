"""Peak memory of the ways to train: each goes a few steps in a fresh process, which says what it took at most.

    python -m fastlth.bench.memory '{"subject", "path", "model", "dataset", "round", "compute"}'
    774905856                                                                                        bytes, or null

On a CPU it is the resident memory of the whole process, libraries and data included (workers of a DataLoader are other
processes and not counted); on a GPU what PyTorch had allocated there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlth.errors import EnvironmentFailure
from fastlth.recipe import Recipe

STEPS = 3  # after them nothing new is allocated


def peak_bytes(recipe: Recipe, subject: str, paths: Sequence[str], round: int = 0) -> dict[str, int | None]:
    """Of each path of ``step`` or ``round`` with the masks of a round; the recipe's compute section is resolved.

    None where the system does not tell. Raises EnvironmentFailure if a path fails.
    """
    asked = {"subject": subject, "model": recipe.model.name, "dataset": recipe.data.name, "round": round,
             "compute": dataclasses.asdict(recipe.compute)}  # fmt: skip
    with contextlib.ExitStack() as stack:  # all at once: they mostly load libraries, and nothing is timed meanwhile
        processes = {path: stack.enter_context(_started({**asked, "path": path})) for path in paths}
        return {path: _answer(path, process) for path, process in processes.items()}


def resident_peak() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where the system does not tell (Windows)."""
    with contextlib.suppress(OSError):  # on Linux ru_maxrss begins with what the parent took
        if found := re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE):
            return 1024 * int(found[1])
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes there
    return None


def _started(asked: dict[str, Any]) -> subprocess.Popen[str]:
    # as `fastlth` itself sets it: threads that wait for each other sleep
    return subprocess.Popen([sys.executable, "-m", "fastlth.bench.memory", json.dumps(asked)], text=True,
                            env={"OMP_WAIT_POLICY": "passive", **os.environ},
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def _answer(path: str, process: subprocess.Popen[str]) -> int | None:
    out, err = process.communicate()
    if process.returncode:
        last = (err.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise EnvironmentFailure(f"the process that measures the memory of {path} failed: {last}")
    found: int | None = json.loads(out.splitlines()[-1])
    return found


def main() -> None:
    """The process that is measured: argv[1] says which path, stdout ends with its peak in bytes, or null."""
    import torch

    from fastlth.bench import rounds, step
    from fastlth.bench.subject import masks_of_round, random_source, recipe_for
    from fastlth.recipe import ComputeSection

    asked = json.loads(sys.argv[1])
    recipe = recipe_for(asked["model"], asked["dataset"])
    recipe = dataclasses.replace(recipe, compute=ComputeSection(**asked["compute"]))
    if asked["subject"] == "round":
        recipe = rounds.with_validation(recipe)
        rounds.work(recipe, rounds.source(recipe)[0], asked["path"], interval=STEPS)(1)
    else:
        masks, _ = masks_of_round(recipe, asked["round"])
        step.work(recipe, random_source(recipe.data.name), asked["path"], masks)(STEPS)
    device = recipe.compute.device
    print(json.dumps(torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else resident_peak()))


if __name__ == "__main__":
    main()
