"""One side of ``fastlth bench compare``: a process that stays warm and trains when it is told to.

    python -P worker.py TREE MODEL      with TREE and TREE/kernels first in PYTHONPATH
    < ready                             or: error and one sentence
    > 40
    < 0.0437                            seconds that 40 training steps took

It is started as a file, not as a module, so that both sides run the same lines even where a commit has no worker; and
of fastlth it takes only what has been there since the first engine: compose, load, make_engine, run and interval.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

EVERY = 100  # steps between two reads of the loss, as in training
# Everything that a step's time depends on is said here: the two commits' presets and defaults may differ.
SETTINGS: dict[str, Any] = {
    "train.iterations": 1_000_000, "train.batch_size": 60, "train.lr": 1.2e-3, "train.optimizer": "adam",
    "evaluate.every": EVERY, "data.validation": 64, "data.augment": "none",
    "compute.device": "cpu", "compute.precision": "fp32", "compute.compile": "off", "compute.channels_last": "off",
    "compute.loader": "resident", "compute.engine": "dense", "compute.threads": 1,
}  # fmt: skip

SPARSE: dict[str, Any] = {"compute.engine": "sparse", "compute.break_even": 0.5}


class Steps:
    """Training steps of one model on the digits of scikit-learn."""

    def __init__(self, model: str) -> None:
        from fastlth.composition import compose
        from fastlth.data.sources import data_root, load
        from fastlth.training.engines.make import make_engine

        recipe = _recipe(compose, model)
        self._engine = make_engine(recipe, load("digits", data_root()))
        self._done = 0

    def __call__(self, count: int) -> None:
        end = self._done + count
        while self._done < end:
            until = min(end, (self._done // EVERY + 1) * EVERY)
            self._engine.run(self._done, until)
            if until % EVERY == 0:
                self._engine.interval()
            self._done = until


def _recipe(compose: Any, model: str) -> Any:
    """With the engine that a search would take: a commit from before the sparse engine knows only the dense one."""
    if model == "lenet-300-100":
        with contextlib.suppress(Exception):  # a real error comes again below
            return compose(model, "digits", settings={**SETTINGS, **SPARSE}).recipe
    return compose(model, "digits", settings=SETTINGS).recipe


def check(tree: Path) -> None:
    """Raises ImportError if a part of fastlth was loaded from elsewhere: an installed copy fills in what is missing."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("fastlth", "fastlth_kernels") and module.__file__:
            if not Path(module.__file__).resolve().is_relative_to(tree.resolve()):
                raise ImportError(f"it has no {name}")


def main() -> None:
    """Speaks as the module's docstring says, until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; the worker ends with its input
    tree, model = Path(sys.argv[1]), sys.argv[2]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print is no answer
    try:
        importlib.import_module("fastlth.composition")
        check(tree)  # before the rest is loaded, which takes seconds
        steps = Steps(model)
        check(tree)
    except Exception as error:  # any failure of an old commit is the parent's to report
        print("error", f"{type(error).__name__}: {error}".replace("\n", " "), file=answers)
        return
    print("ready", file=answers)
    for line in sys.stdin:
        count = int(line)
        steps(1)  # brings back what the other worker has driven out of the caches
        began = time.perf_counter()
        steps(count)
        print(time.perf_counter() - began, file=answers)


if __name__ == "__main__":
    main()
