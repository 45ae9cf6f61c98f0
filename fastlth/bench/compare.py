"""``fastlth bench compare BASE HEAD``: has a change made training slower?

The files of both commits are written to temporary folders. A warm worker process per side, and a second one of
BASE as the control, train in turns, one at a time, under the paired timer. A process can be unlucky, for instance in
where its memory lies, so a slowdown must be found again by new ones.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlth.bench import worker
from fastlth.bench.paired import Paired, alternate
from fastlth.errors import EnvironmentFailure, RecipeError

SLOWDOWN = 1.03
MAX_RUNS = 3
SUBJECTS = ("lenet-300-100",)
SLOWER, NOT_SLOWER, UNDECIDED = "slower", "not slower", "undecided"
WORKING_TREE = "."


@dataclass(frozen=True)
class Tree:
    """The files of one commit, or of the working tree."""

    name: str
    path: Path


@dataclass(frozen=True)
class Subject:
    """What was found for the training steps of one model; the last clean run speaks for it."""

    model: str
    base: str
    head: str
    runs: tuple[Paired, ...]

    @property
    def verdict(self) -> str:
        """slower, not slower or undecided."""
        return verdict(self.runs)

    @property
    def row(self) -> dict[str, Any]:
        """For ``--json``. ``time_ratio`` is head's seconds to base's: above 1, head is slower."""
        return {
            "subject": "compare", "model": self.model, "dataset": "digits", "base": self.base, "head": self.head,
            "verdict": self.verdict, "runs": [_run_row(p) for p in self.runs],
        }  # fmt: skip

    @property
    def sentence(self) -> str:
        """The verdict for people: the ratio of seconds, its 95 % interval, the control's, and how many pairs."""
        clean = [p for p in self.runs if not p.strayed]
        if not clean:
            return f"{self.model}: undecided, the machine is too noisy (base against itself was off in every run)"
        p = clean[-1]
        return (
            f"{self.model}: {self.head} is {self.verdict} ({p.ratio:.3f} times the seconds of {self.base}, "
            f"95 % {p.low:.3f} to {p.high:.3f}; base against itself {p.control_low:.3f} to {p.control_high:.3f}; "
            f"{p.pairs} pairs, run {len(self.runs)})"
        )


@dataclass(frozen=True)
class Comparison:
    """All models of one ``compare``."""

    subjects: tuple[Subject, ...]

    @property
    def slower(self) -> bool:
        """Whether any subject is slower at HEAD: the command then ends with exit code 3."""
        return any(s.verdict == SLOWER for s in self.subjects)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each model, for ``--json``."""
        return [s.row for s in self.subjects]

    @property
    def sentences(self) -> list[str]:
        """One for each model."""
        return [s.sentence for s in self.subjects]


def looks_slower(one: Paired) -> bool:
    """Whether one run finds B slower: surely by more than 3 %, and surely by more than A is slower than itself."""
    return not one.strayed and one.low > SLOWDOWN and one.low > one.control_high


def verdict(runs: Sequence[Paired]) -> str:
    """The decision rule: two runs must agree on a slowdown; runs whose control strayed do not count."""
    clean = [p for p in runs if not p.strayed]
    if any(not looks_slower(p) for p in clean):
        return NOT_SLOWER
    return SLOWER if len(clean) >= 2 else UNDECIDED


def compare(
    base: str, head: str, *, budget: float, repo: Path, models: Sequence[str] = SUBJECTS,
    show: Callable[[str], None] = lambda _: None,
) -> Comparison:  # fmt: skip
    """Compare training at two commits of the checkout that ``repo`` is in; "." is the working tree as it is.

    ``budget`` is the seconds of timing per model and run; one run is made, and up to three where it finds a
    slowdown or is spoilt by noise. ``show`` is told what goes on. Raises RecipeError outside a checkout, for an unknown
    commit and for one that has no such training.
    """
    with contextlib.ExitStack() as stack:
        top = _toplevel(repo)
        trees = [stack.enter_context(_tree(top, name)) for name in (base, head)]
        return compare_trees(trees[0], trees[1], budget=budget, models=models, show=show)


def compare_trees(
    base: Tree, head: Tree, *, budget: float, models: Sequence[str] = SUBJECTS, seed: int = 0,
    show: Callable[[str], None] = lambda _: None,
) -> Comparison:  # fmt: skip
    """``compare`` for two folders that each hold ``fastlth/`` and ``kernels/``."""
    subjects = []
    for model in models:
        runs: list[Paired] = []
        while len(runs) < MAX_RUNS and verdict(runs) == UNDECIDED:
            show(f"{model}: run {len(runs) + 1}, up to {budget:.0f} seconds")
            runs.append(_run(base, head, model, budget, seed + len(runs)))
        subjects.append(Subject(model, base.name, head.name, tuple(runs)))
    return Comparison(tuple(subjects))


def _run(base: Tree, head: Tree, model: str, budget: float, seed: int) -> Paired:
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_Worker(tree, model)) for tree in (base, head, base)]
        for one in workers:
            one.wait()
        a, b, twin = workers
        return alternate(a.seconds, b.seconds, twin.seconds, budget=budget, seed=seed)


class _Worker:
    """A process of ``worker.py``. It sleeps until it is asked, and ends when it is left."""

    def __init__(self, tree: Tree, model: str) -> None:
        self._tree = tree
        path = os.pathsep.join([str(tree.path), str(tree.path / "kernels")])
        # as `fastlth` itself sets it: threads that wait for each other sleep
        environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONPATH": path}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(worker.__file__).resolve()), str(tree.path), model], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
        )  # fmt: skip

    def wait(self) -> None:
        """Until it is ready. Raises RecipeError if this tree has no such training."""
        word, _, reason = self._answer().partition(" ")
        if word == "error":
            raise RecipeError(f"{self._tree.name} cannot be measured: {reason}")

    def seconds(self, calls: int) -> float:
        assert self._process.stdin is not None
        try:
            print(calls, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # what is wrong shows in the missing answer
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise EnvironmentFailure(f"the process that measured {self._tree.name} ended with exit code {code}")
        return line.strip()

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def _tree(top: Path, name: str) -> Iterator[Tree]:
    """A commit's files in a temporary folder. (An archive leaves no trace in the repository, even when killed.)"""
    if name == WORKING_TREE:
        yield Tree("the working tree", top)
        return
    try:
        commit = _git(top, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    except subprocess.CalledProcessError:
        raise RecipeError(f"unknown commit '{name}'; give a commit, branch or tag, or . for the working tree") from None
    with tempfile.TemporaryDirectory(prefix="fastlth-compare-") as folder:
        archive = Path(folder) / "tree.zip"
        _git(top, "archive", "--format=zip", "-0", f"--output={archive}", commit)
        shutil.unpack_archive(archive, Path(folder) / "tree")
        yield Tree(name, Path(folder) / "tree")


def _toplevel(repo: Path) -> Path:
    try:
        return Path(_git(repo, "rev-parse", "--show-toplevel"))
    except (subprocess.CalledProcessError, OSError):  # OSError: git is not installed
        raise RecipeError(f"comparing commits needs git and a checkout of fastlth, and {repo} is in none") from None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _run_row(p: Paired) -> dict[str, Any]:
    return {
        "time_ratio": p.ratio, "time_ratio_low": p.low, "time_ratio_high": p.high,
        "control_low": p.control_low, "control_high": p.control_high, "pairs": p.pairs,
        "base_seconds": p.seconds_a, "head_seconds": p.seconds_b,
    }  # fmt: skip
