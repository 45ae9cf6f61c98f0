"""LeNet-300-100 on MNIST: winning tickets, and what they must be compared with (Frankle & Carbin 2019).

The short lottery trains 3,000 iterations a round, so that all of it takes minutes; the dense net and, with
``-m nightly``, the whole lottery have the paper's 50,000.
"""

from __future__ import annotations

import os
import time
from statistics import fmean

import pytest

from fastlth import running
from fastlth.composition import compose
from fastlth.experiments.branch import branch
from fastlth.experiments.control import Control

pytestmark = pytest.mark.skipif(not os.environ.get("FASTLTH_DATA"), reason="no real MNIST")
EARLY = "early_stop_test_accuracy"
# Other threads or another break-even round otherwise, and a training that differs in one bit ends 0.1 points apart:
# what is asked of every single seed is asked of the same trainings each time.
SAME_BITS = {"compute.engine": "sparse", "compute.threads": 1, "compute.break_even": 0.6}


def search(out, preset, rounds, seeds, **more):
    """Seed -> its search: path and rounds."""
    settings = {"prune.rounds": rounds, "compute.device": "cpu", "seeds.base": seeds[0], **more}
    recipe = compose("lenet-300-100", "mnist", preset=preset, settings=settings).recipe
    return {r.seed: r for r in running.run(recipe, out=out, replicates=len(seeds)).replicates}


def control(path, rounds, **options):
    """Round -> mean over the trials of a branch."""
    return {r["round"]: r for r in branch(path, Control(**options), rounds=rounds).rounds}


def short_lottery(run):
    """The ticket beats the dense net, the same net drawn afresh, and a random one of its size."""
    dense, seven, nine = (run.rounds[k][EARLY] for k in (0, 7, 9))
    reinit = control(run.path, [7, 9], kind="random-reinit")
    sparse = control(run.path, [9], kind="random-prune", reinit=True)[9][EARLY]
    print(f"seed {run.seed}: dense {dense:.2%}; round 7 {seven:.2%}, reinit {reinit[7][EARLY]:.2%}; "
          f"round 9 {nine:.2%}, reinit {reinit[9][EARLY]:.2%}, random sparse {sparse:.2%}")  # fmt: skip
    assert seven >= dense + 0.002
    assert seven >= reinit[7][EARLY] + 0.002
    assert nine >= reinit[9][EARLY] + 0.004
    assert nine >= sparse + 0.006


@pytest.mark.science
def test_short_lottery_of_one_seed(tmp_path):
    short_lottery(search(tmp_path, "fast", 9, [0], **SAME_BITS)[0])


@pytest.mark.science
def test_short_lottery_of_more_seeds(tmp_path):
    for run in search(tmp_path, "fast", 9, [1, 2], **SAME_BITS).values():
        short_lottery(run)


@pytest.mark.science
def test_the_dense_net_of_the_paper(tmp_path):
    (dense,) = search(tmp_path, "paper", 0, [0], **SAME_BITS)[0].rounds
    print({k: dense[k] for k in ("test_accuracy", EARLY, "early_stop_iteration", "train_accuracy", "seconds")})
    assert 0.976 <= dense["test_accuracy"] <= 0.985
    assert 0.972 <= dense[EARLY] <= 0.983
    assert 2_000 <= dense["early_stop_iteration"] <= 8_000
    assert dense["train_accuracy"] >= 0.996


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    started = time.monotonic()
    found = search(tmp_path_factory.mktemp("paper"), "paper", 20, [0, 1, 2], **SAME_BITS)
    print(f"{len(found)} searches of 21 trainings: {time.monotonic() - started:.0f} s")
    return found


def mean(runs, round, field):
    return fmean(run.rounds[round][field] for run in runs.values())


@pytest.mark.nightly
def test_tickets_learn_sooner_and_reach_more(paper):
    stop, accuracy = "early_stop_iteration", "test_accuracy"
    for k in (0, 7, 9):
        print(f"round {k}: stop {mean(paper, k, stop):,.0f}, there {mean(paper, k, EARLY):.2%}, "
              f"at the end {mean(paper, k, accuracy):.2%}")  # fmt: skip
    assert mean(paper, 7, stop) <= 0.85 * mean(paper, 0, stop)
    for k in (7, 9):
        assert mean(paper, k, accuracy) >= mean(paper, 0, accuracy) + 0.001
        assert mean(paper, k, EARLY) >= mean(paper, 0, EARLY) + 0.002


@pytest.mark.nightly
def test_reinitialised_tickets_learn_later_and_reach_less(paper):
    reinit = [control(run.path, [7], kind="random-reinit")[7] for run in paper.values()]
    stop, there = fmean(r["early_stop_iteration"] for r in reinit), fmean(r[EARLY] for r in reinit)
    loss = fmean(r["early_stop_validation_loss"] for r in reinit)
    print(f"reinit of round 7: stop {stop:,.0f}, there {there:.2%}, loss {loss:.4f}; "
          f"ticket {mean(paper, 7, 'early_stop_validation_loss'):.4f}")  # fmt: skip
    assert stop >= 1.3 * mean(paper, 7, "early_stop_iteration")
    assert mean(paper, 7, EARLY) >= there + 0.002
    assert mean(paper, 7, "early_stop_validation_loss") <= loss - 0.008


@pytest.mark.nightly
def test_too_much_pruning_hurts(paper):
    accuracy = "test_accuracy"
    for k in (15, 20):
        print(f"round {k} against dense: {mean(paper, k, accuracy) - mean(paper, 0, accuracy):+.2%} at the end, "
              f"{mean(paper, k, EARLY) - mean(paper, 0, EARLY):+.2%} at early stop")  # fmt: skip
    assert abs(mean(paper, 15, accuracy) - mean(paper, 0, accuracy)) <= 0.004
    assert mean(paper, 20, accuracy) <= mean(paper, 0, accuracy) - 0.003


@pytest.fixture(scope="module")
def once(paper):
    """One-shot tickets of 10.8 % and their nets drawn afresh: accuracies at early stop, one of each per seed."""
    density = paper[0].rounds[10]["density"]
    found = [[branch(run.path, Control(kind="one-shot", density=density, reinit=reinit)).rounds[0][EARLY]
              for run in paper.values()] for reinit in (False, True)]  # fmt: skip
    print(f"at {density:.2%}: iterative {mean(paper, 10, EARLY):.2%}, one-shot {found[0]}, drawn afresh {found[1]}")
    return tuple(fmean(f) for f in found)


@pytest.mark.nightly
def test_one_shot_tickets_are_between(paper, once):
    dense = paper[0].rounds[0][EARLY]
    wide = [branch(paper[0].path, Control(kind="one-shot", density=d)).rounds[0][EARLY] for d in (0.6, 0.4, 0.2)]
    print(f"seed 0 dense {dense:.2%}, one-shot at 60, 40, 20 % {wide}")
    assert mean(paper, 10, EARLY) >= once[0] > once[1]
    assert mean(paper, 10, EARLY) >= once[1] + 0.003
    assert max(wide) > dense


@pytest.mark.nightly
@pytest.mark.xfail(strict=False, reason="0.28 points over twelve seeds, standard error 0.04: docs/results/lottery.md")
def test_one_shot_tickets_are_above_their_nets_drawn_afresh_by_as_much_as_in_the_paper(once):
    assert once[0] >= once[1] + 0.003
