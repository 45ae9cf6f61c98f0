"""``bench compare``: the decision rule on simulated and recorded timings, and the processes and folders around it."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import subprocess
import tempfile
from pathlib import Path

import pytest

from fastlth.bench import compare as module
from fastlth.bench.compare import (
    NOT_SLOWER,
    SLOWER,
    UNDECIDED,
    Tree,
    compare,
    compare_trees,
    looks_slower,
    verdict,
)
from fastlth.bench.paired import Paired, alternate
from fastlth.errors import EnvironmentFailure, RecipeError

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).with_name("recorded_timings.json")


@pytest.fixture(autouse=True)
def simulated_time_only(monkeypatch):
    monkeypatch.setattr("fastlth.bench.paired.REST_SECONDS", 0)


def found(low, high=None, control=(0.98, 1.02), strayed=False):
    ratio = None if strayed else math.sqrt(low * (high or low * 1.04))
    return Paired(0.001, 0.001, ratio, low, high or low * 1.04, *control, 100, (0.001, 0.001, 0.001))


@pytest.mark.parametrize(
    ("one", "slow"),
    [
        (found(1.08), True),
        (found(1.031), True),
        (found(1.03), False),  # not surely more than 3 %
        (found(1.02, 1.3), False),
        (found(0.9), False),
        (found(1.08, control=(0.95, 1.09)), False),  # base itself may be off by as much
        (found(1.08, control=(1.05, 1.07)), True),
        (found(1.08, strayed=True), False),
    ],
)
def test_one_run(one, slow):
    assert looks_slower(one) == slow


SLOW, SAME, STRAYED = found(1.08), found(0.99), found(1.3, strayed=True)


@pytest.mark.parametrize(
    ("runs", "decision"),
    [
        ([], UNDECIDED),
        ([SAME], NOT_SLOWER),
        ([SLOW], UNDECIDED),
        ([SLOW, SLOW], SLOWER),
        ([SLOW, SAME], NOT_SLOWER),
        ([STRAYED], UNDECIDED),
        ([STRAYED, SAME], NOT_SLOWER),
        ([STRAYED, SLOW], UNDECIDED),
        ([STRAYED, SLOW, SLOW], SLOWER),
        ([SLOW, STRAYED, SLOW], SLOWER),
        ([STRAYED, STRAYED, SLOW], UNDECIDED),
        ([STRAYED, STRAYED, STRAYED], UNDECIDED),
    ],
)
def test_two_clean_runs_must_agree(runs, decision):
    assert verdict(runs) == decision


def neighbour(rng, jitter):
    """Comes and goes, makes everything up to three times slower; and each block has a jitter of its own."""
    state = {"until": 0.0, "factor": 1.0}

    def noise(now):
        while now >= state["until"]:
            state["factor"] = 1.0 if state["factor"] > 1 else 1 + 2 * rng.random()
            state["until"] += rng.expovariate(1 / 0.3)
        return state["factor"] * math.exp(rng.gauss(0, jitter))

    return noise


def simulated(truth, rng, luck, jitter):
    """In place of ``_run``: three processes, each faster or slower by what its memory's place makes of it."""

    def run(base, head, model, budget, seed):
        clock, noise = [0.0], neighbour(rng, jitter)

        def process(factor):
            step = 0.0011 * factor * math.exp(rng.gauss(0, luck))

            def timed(calls):
                taken = step * calls * noise(clock[0])
                clock[0] += taken
                return taken

            return timed

        a, b, control = process(1.0), process(truth), process(1.0)
        return alternate(a, b, control, budget=budget, seed=seed, clock=lambda: clock[0])

    return run


HERE = Tree("base", ROOT), Tree("head", ROOT)


def verdicts(monkeypatch, truth, count, luck=0.0, jitter=0.05, budget=10.0):
    decisions = []
    for seed in range(count):
        monkeypatch.setattr(module, "_run", simulated(truth, random.Random(seed), luck, jitter))
        [subject] = compare_trees(*HERE, budget=budget, seed=seed).subjects
        decisions.append(subject.verdict)
    return decisions


def test_simulated_ten_percent_are_found_and_equal_code_is_left_alone(monkeypatch):
    assert verdicts(monkeypatch, 1.0, 40) == [NOT_SLOWER] * 40
    assert verdicts(monkeypatch, 1.1, 20).count(SLOWER) >= 19
    assert verdicts(monkeypatch, 0.9, 10) == [NOT_SLOWER] * 10


def test_noise_hides_slowdowns_before_it_makes_them_up(monkeypatch):
    assert SLOWER not in verdicts(monkeypatch, 1.0, 40, jitter=0.1)
    few, more = (verdicts(monkeypatch, 1.1, 15, jitter=0.1, budget=b).count(SLOWER) for b in (5.0, 30.0))
    assert few < more


def test_lucky_and_unlucky_processes_are_no_slowdown(monkeypatch):
    assert SLOWER not in verdicts(monkeypatch, 1.0, 40, luck=0.015)


def replayed(run):
    """What the timer makes of recorded microseconds per call."""
    blocks = [0, 0, 0]

    def timed(side):
        def seconds(calls):
            blocks[side] += 1
            return run[max(0, blocks[side] - 3)][side] * calls * 1e-6  # a warm-up and a block to size it go before

        return seconds

    return alternate(timed(0), timed(1), timed(2), budget=len(run) + 0.5, block=0.0, clock=lambda: blocks[0] - 2)


@pytest.mark.parametrize("kind", ["equal", "planted 10 %"])
def test_recorded_timings(kind):
    """Microseconds per step in base, head and control, as the self-test's processes met them on a shared machine."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[kind]
    runs = [replayed(run) for run in recorded]
    assert len(runs) == 4 and all(one.pairs > 20 for one in runs)
    pairs = [verdict(two) for two in itertools.combinations(runs, 2)]
    assert set(pairs) == ({SLOWER} if kind != "equal" else {NOT_SLOWER})


# The processes. A package of five small files stands in for fastlth: it starts at once.


def package(folder, run="pass", broken=()):
    files = {
        "fastlth/__init__.py": "",
        "fastlth/composition.py": "from types import SimpleNamespace\n"
                                  "def compose(model, dataset, settings): return SimpleNamespace(recipe=model)\n",
        "fastlth/data/__init__.py": "",
        "fastlth/data/sources.py": "def data_root(): return None\ndef load(name, root): return name\n",
        "fastlth/training/__init__.py": "",
        "fastlth/training/engines/__init__.py": "",
        "fastlth/training/engines/make.py": "import os, time\nclass Engine:\n"
                                            f"    def run(self, first, last):\n        {run}\n"
                                            "    def interval(self): pass\n"
                                            "def make_engine(recipe, source):\n"
                                            "    print('noise on stdout')\n    return Engine()\n",
    }  # fmt: skip
    for name, text in files.items():
        if name not in broken:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    (folder / "kernels").mkdir(exist_ok=True)
    return folder


SLEEP = "time.sleep((last - first) * 1e-3)"


def test_workers_answer_and_end(tmp_path, monkeypatch):
    workers = []
    start = subprocess.Popen

    def noting(*args, **kwargs):
        workers.append(start(*args, **kwargs))
        return workers[-1]

    monkeypatch.setattr(subprocess, "Popen", noting)
    base, head = (Tree(n, package(tmp_path / n, SLEEP)) for n in ("one", "two"))
    said = []
    result = compare_trees(base, head, budget=0.1, models=["m"], show=said.append)
    assert said[0] == "m: run 1, up to 0 seconds"
    [row] = json.loads(json.dumps(result.rows))
    assert (row["model"], row["base"], row["head"], row["verdict"]) == ("m", "one", "two", result.subjects[0].verdict)
    assert row["runs"][0].keys() >= {"time_ratio", "time_ratio_low", "time_ratio_high", "control_high", "pairs"}
    assert len(result.sentences) == 1 and result.slower == (row["verdict"] == SLOWER)
    assert len(workers) % 3 == 0 and all(w.poll() is not None for w in workers)


def test_a_tree_that_cannot_train_is_one_sentence(tmp_path):
    good = Tree("good", package(tmp_path / "good"))
    for broken in ("fastlth/composition.py", "fastlth/training/engines/make.py"):
        bad = Tree("abc123", package(tmp_path / broken.replace("/", "-"), broken=[broken]))
        with pytest.raises(RecipeError, match="abc123 cannot be measured"):
            compare_trees(good, bad, budget=0.1)
    raising = Tree("abc123", package(tmp_path / "raising", run="pass"))
    (raising.path / "fastlth" / "data" / "sources.py").write_text("raise ValueError('two\\nlines')")
    with pytest.raises(RecipeError, match=r"abc123 cannot be measured: ValueError: two lines$"):
        compare_trees(good, raising, budget=0.1)


def test_an_installed_copy_is_not_measured_in_its_place(tmp_path):
    """A commit without fastlth would otherwise be timed as the one that runs this test."""
    (tmp_path / "kernels").mkdir()
    with pytest.raises(RecipeError, match="empty cannot be measured"):
        compare_trees(Tree("empty", tmp_path), Tree("empty", tmp_path), budget=0.1)


def test_a_worker_that_dies_is_one_sentence(tmp_path):
    dead = Tree("abc123", package(tmp_path, run="os._exit(7)"))
    with pytest.raises(EnvironmentFailure, match="measured abc123 ended with exit code 7"):
        compare_trees(dead, dead, budget=0.1)


@pytest.mark.slow  # three imports of torch
def test_the_real_training_can_be_timed():
    here = Tree("here", ROOT)
    result = compare_trees(here, here, budget=0.1)
    assert 1e-5 < result.rows[0]["runs"][0]["base_seconds"] < 1.0


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of two commits, and a folder for temporary files of its own."""
    for name, value in {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a", "GIT_COMMITTER_NAME": "a",
                        "GIT_COMMITTER_EMAIL": "a", "GIT_CONFIG_GLOBAL": os.devnull}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    repo = tmp_path / "repo"

    def git(*arguments):
        subprocess.run(["git", "-C", str(repo), *arguments], check=True, capture_output=True)

    package(repo)
    git("init", "-q")
    (repo / ".gitignore").write_text("__pycache__\n")
    for text in ("first", "second"):
        (repo / "fastlth" / "text").write_text(text)
        git("add", "-A")
        git("commit", "-q", "-m", text)
    (repo / "fastlth" / "text").write_text("uncommitted")
    return repo


def texts(monkeypatch, act=lambda: None):
    """What lies in the two trees when they are measured."""
    seen = []

    def run(base, head, model, budget, seed):
        seen.extend((t.path / "fastlth" / "text").read_text() for t in (base, head))
        act()
        return found(0.99)

    monkeypatch.setattr(module, "_run", run)
    return seen


@pytest.mark.parametrize(("base", "head", "expected"), [("HEAD~1", "HEAD", ["first", "second"]),
                                                        ("HEAD", ".", ["second", "uncommitted"])])  # fmt: skip
def test_the_trees_are_those_of_the_commits(checkout, monkeypatch, base, head, expected):
    seen = texts(monkeypatch)
    result = compare(base, head, budget=1.0, repo=checkout / "fastlth")
    assert seen == expected and not result.slower
    assert not list(Path(tempfile.gettempdir()).iterdir())
    assert "worktrees" not in os.listdir(checkout / ".git")


def test_nothing_is_left_after_ctrl_c(checkout, monkeypatch):
    def interrupt():
        assert len(list(Path(tempfile.gettempdir()).iterdir())) == 2
        raise KeyboardInterrupt

    texts(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare("HEAD~1", "HEAD", budget=1.0, repo=checkout)
    assert not list(Path(tempfile.gettempdir()).iterdir())


@pytest.mark.parametrize("commit", ["nothing", "--help", "HEAD:fastlth", ""])
def test_an_unknown_commit_is_one_sentence(checkout, commit):
    with pytest.raises(RecipeError, match="unknown commit"):
        compare("HEAD", commit, budget=1.0, repo=checkout)
    assert not list(Path(tempfile.gettempdir()).iterdir())


def test_outside_a_checkout_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(RecipeError, match="needs git and a checkout") as error:
        compare("HEAD", "HEAD~1", budget=1.0, repo=tmp_path)
    assert error.value.exit_code == 2
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecipeError, match="needs git and a checkout"):
        compare("HEAD", "HEAD~1", budget=1.0, repo=ROOT)
