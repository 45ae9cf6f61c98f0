"""Controls that prune what they go on training: fine-tuning, learning-rate rewinding, resetting at the end."""

from __future__ import annotations

import json
import shutil

import pytest

from fastlth import running
from fastlth.composition import adjust
from fastlth.experiments.branch import branch, planned
from fastlth.experiments.control import Control
from fastlth.experiments.trial import Trial
from fastlth.tickets import load_ticket
from fastlth.training.schedule import lr_at
from tests.experiments.branches.by_hand import (
    LAYERS,
    T,
    assert_same_masks,
    dense_by_hand,
    full,
    pruned_by_hand,
    recipe_of,
    untimed,
)
from tests.helpers import assert_same_bits


def test_the_dense_net_trained_again_is_the_searchs_round_0(run):
    ticket = load_ticket(run / "search.ticket")
    branch(run, Control(kind="lr-rewind"), rounds=[1])
    [dense] = (run / "branches").glob("dense-*/round-0/trial-0/result.json")
    assert untimed(json.loads(dense.read_text())) == untimed(ticket.rounds[0])
    [folder] = (run / "branches").glob("lr-rewind-*")
    masks = Trial(folder, "", 1).masks({n: m.shape for n, m in full().items()})
    assert_same_masks(masks, ticket.mask(1))


@pytest.mark.parametrize("kind", ["finetune", "lr-rewind"])
def test_a_chain_prunes_and_goes_on_from_what_it_trained(run, kind):
    """Three rounds by hand: train, sort, remove, and train what is left from where it is."""
    long = recipe_of(train__iterations=2 * T)
    first, last = (T, 2 * T) if kind == "finetune" else (0, T)
    weights, masks = dense_by_hand(recipe_of()), full()
    for _ in range(3):
        masks = pruned_by_hand(weights, masks, LAYERS)
        weights = dense_by_hand(long, first, last, start=weights, masks=masks)
    result = branch(run, Control(kind=kind), rounds=[3])
    [folder] = (run / "branches").glob(f"{kind}-*")
    job = Trial(folder, Control(kind=kind).digest(result.recipe.digest), 3)
    shapes = {n: m.shape for n, m in full().items()}
    assert_same_masks(job.masks(shapes), masks)
    assert_same_bits(job.trained(job.masks(shapes)), weights)
    assert result.trials[0]["early_stop_iteration"] > first
    files = sorted(f.parent.parent.parent.name for f in folder.glob("*/*/weights/*"))
    assert files == ["round-3"]  # earlier trained nets are not kept


def rates(run, pattern):
    [file] = (run / "branches").glob(pattern)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {x["iteration"]: x["learning_rate"] for x in lines if x["event"] == "evaluation"}


def test_learning_rates_of_finetuning_and_of_a_rewound_schedule(run):
    schedule, lr = recipe_of().schedule, recipe_of().train.lr
    branch(run, Control(kind="finetune", iterations=20, density=0.3))
    assert rates(run, "finetune-*/round-1/trial-0/metrics.jsonl") == {50: lr / 10, 60: lr / 10}
    branch(run, Control(kind="lr-rewind", density=0.3))
    assert rates(run, "lr-rewind-*/round-1/trial-0/metrics.jsonl") == {10: lr, 20: lr, 30: lr, 40: lr / 10}
    assert lr_at(39, lr, schedule) == lr / 10
    shutil.rmtree(run / "branches")
    branch(run, Control(kind="lr-rewind", iterations=20, density=0.3))
    assert rates(run, "lr-rewind-*/round-1/trial-0/metrics.jsonl") == {30: lr, 40: lr / 10}


def test_continued_resets_only_at_the_end(run, starts):
    weights, masks = dense_by_hand(recipe_of()), full()
    for k in range(3):
        masks = pruned_by_hand(weights, masks, LAYERS)
        if k < 2:
            weights = dense_by_hand(recipe_of(), start=weights, masks=masks)
    [(_, _, start)] = starts(run, Control(kind="continued"), rounds=[3])
    assert_same_masks(start.masks, masks)
    assert_same_bits(dict(start.values), load_ticket(run / "search.ticket").rewind())
    assert start.first == 0
    branch(run, Control(kind="lr-rewind"), rounds=[3])  # a longer chain is there now: the same masks
    assert_same_masks(starts(run, Control(kind="continued"), rounds=[3])[0][2].masks, masks)


def test_continued_shares_the_chain_of_lr_rewind_whatever_auto_becomes(run):
    settings = {"compute.channels_last": "auto"}
    branch(run, Control(kind="continued"), rounds=[2], settings=settings)
    [chain] = (run / "branches").glob("lr-rewind-*")
    assert branch(run, Control(kind="lr-rewind"), rounds=[1], settings=settings).folder == chain


@pytest.mark.parametrize("criterion", ["movement", "snip"])
def test_criteria_that_look_at_initial_values_and_gradients(tmp_path, starts, criterion):
    """Their w_i is theta_k, as in the search's first pruning: the chain's first mask is the search's."""
    found = running.run(recipe_of(prune__criterion=criterion, prune__rounds=1), out=tmp_path).replicates[0].path
    [(_, _, start)] = starts(found, Control(kind="lr-rewind"), rounds=[1])
    assert_same_masks(start.masks, load_ticket(found / "search.ticket").mask(1))


@pytest.mark.parametrize(("settings", "rate"), [
    ({"schedule.milestones": [20, 45]}, 0.1),
    ({"schedule.milestones": [40]}, 1.0),
    ({"schedule.milestones": [5], "schedule.warmup": 80}, 39 / 80),
    ({"schedule.milestones": [], "schedule.warmup": 40}, 39 / 40),
    ({"schedule.milestones": [39], "schedule.warmup": 39}, 0.1),
])  # fmt: skip
def test_finetuning_stays_at_the_last_learning_rate(settings, rate):
    """Also where the schedule was to go on after the last iteration."""
    search = adjust(recipe_of(), settings)
    longer, first = planned(search, Control(kind="finetune", iterations=60))[0], search.train.iterations
    assert (first, longer.train.iterations) == (40, 100)
    (stays,) = {lr_at(i, longer.train.lr, longer.schedule) for i in range(first, 100)}
    assert stays == lr_at(39, search.train.lr, search.schedule) == pytest.approx(rate * search.train.lr)
