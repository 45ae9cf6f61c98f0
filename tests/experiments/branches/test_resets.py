"""Controls that start from early values: masks and values against their definitions."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from fastlth import running
from fastlth.errors import RecipeError
from fastlth.experiments.branch import branch
from fastlth.experiments.control import Control
from fastlth.experiments.trial import Trial, TrialStarted
from fastlth.experiments.workbench import Workbench
from fastlth.models import build
from fastlth.tickets import load_ticket
from tests.experiments.branches.by_hand import LAYERS, assert_same_masks, dense_by_hand, full, lines, recipe_of, untimed
from tests.helpers import assert_same_bits


def test_random_reinit_is_the_rounds_mask_with_a_fresh_draw_each_trial(run, starts):
    ticket = load_ticket(run / "search.ticket")
    seen = starts(run, Control(kind="random-reinit"), rounds=[1, 3])
    assert [(k, t) for k, t, _ in seen] == [(1, 0), (1, 1), (1, 2), (3, 0), (3, 1), (3, 2)]
    theta0, draws = ticket.rewind(), []
    for k, _, start in seen:
        assert_same_masks(start.masks, ticket.mask(k))
        assert start.first == 0
        for name in LAYERS:
            w = start.values[name]
            assert float(w.std()) == pytest.approx(math.sqrt(2 / sum(w.shape)), rel=0.1)  # Glorot
            assert not torch.equal(w, theta0[name])
        assert all(not start.values[n].any() for n in ("fc1.bias", "fc2.bias", "output.bias"))
        draws.append(start.values["fc1.weight"])
    joined = torch.stack([d.flatten() for d in [*draws, theta0["fc1.weight"]]])
    assert float((torch.corrcoef(joined) - torch.eye(7)).abs().max()) < 0.05  # all independent
    again = starts(run, Control(kind="random-reinit"), rounds=[3], trials=1)
    assert_same_bits(dict(again[0][2].values), dict(seen[3][2].values))


@pytest.mark.parametrize("strategy", [None, "layer", "global", "even", "erk"])
def test_random_prune_keeps_as_many_and_the_rewind_values(run, starts, strategy):
    ticket = load_ticket(run / "search.ticket")
    seen = starts(run, Control(kind="random-prune", strategy=strategy), rounds=[2], trials=2)
    wanted = {n: int(m.sum()) for n, m in ticket.mask(2).items()}
    for _, _, start in seen:
        counts = {n: int(m.sum()) for n, m in start.masks.items()}
        assert sum(counts.values()) == sum(wanted.values())
        assert (counts == wanted) == (strategy in (None, "layer"))
        if strategy == "even":
            densities = [counts[n] / start.masks[n].numel() for n in LAYERS]
            assert max(densities) - min(densities) < 1e-3
        assert_same_bits(dict(start.values), ticket.rewind())
    first, second = seen[0][2].masks["fc1.weight"], seen[1][2].masks["fc1.weight"]
    assert not torch.equal(first, second) and not torch.equal(first, ticket.mask(2)["fc1.weight"])
    fresh = starts(run, Control(kind="random-prune", strategy=strategy, reinit=True), rounds=[2], trials=1)[0][2]
    assert_same_masks(fresh.masks, seen[0][2].masks)
    assert not torch.equal(fresh.values["fc1.weight"], ticket.rewind()["fc1.weight"])


def test_random_prune_to_a_density(run, starts):
    for strategy in ("layer", "global", "even", "erk"):
        [(k, _, start)] = starts(run, Control(kind="random-prune", strategy=strategy, density=0.1), trials=1)
        kept = sum(int(m.sum()) for m in start.masks.values())
        assert k == 1 and kept == 5_020
    with pytest.raises(RecipeError, match="contradict"):
        branch(run, Control(kind="random-prune", density=0.1), rounds=[1])


def test_one_shot_is_the_dense_trained_net_pruned_once_and_reset(run, starts):
    trained = dense_by_hand(recipe_of())
    for density, p in ((0.5, 0.5 * 50_200 / (49_200 + 500)), (0.1, 0.9 * 50_200 / (49_200 + 500))):
        [(_, _, start)] = starts(run, Control(kind="one-shot", density=density))
        counts = {n: int(m.sum()) for n, m in start.masks.items()}
        assert sum(counts.values()) == density * 50_200
        for name, share in (("fc1.weight", p), ("fc2.weight", p), ("output.weight", p / 2)):
            assert abs(counts[name] - (1 - share) * full()[name].numel()) <= 1
            gone = full()[name].numel() - counts[name]
            expected = np.ones(full()[name].numel(), bool)
            expected[np.argsort(trained[name].abs().numpy().reshape(-1), kind="stable")[:gone]] = False
            assert (start.masks[name].numpy().reshape(-1) == expected).all()
        assert_same_bits(dict(start.values), load_ticket(run / "search.ticket").rewind())
        assert start.first == 0
    [(_, _, at_round)] = starts(run, Control(kind="one-shot"), rounds=[3])
    ticket = load_ticket(run / "search.ticket")
    assert sum(int(m.sum()) for m in at_round.masks.values()) == ticket.file.kept(3)
    drawn = starts(run, Control(kind="one-shot", density=0.1, reinit=True))
    assert len(drawn) == 3
    assert_same_masks(drawn[0][2].masks, start.masks)
    assert not torch.equal(drawn[0][2].values["fc1.weight"], start.values["fc1.weight"])


def test_kept_trained_weights_are_used_and_are_those_of_training_again(run, starts, tmp_path):
    recipe = dataclasses.replace(recipe_of(), store=dataclasses.replace(recipe_of().store, keep_weights="all"))
    kept = running.run(recipe, out=tmp_path / "kept").replicates[0].path
    a = starts(run, Control(kind="one-shot", density=0.3))
    b = starts(kept, Control(kind="one-shot", density=0.3))
    assert_same_masks(a[0][2].masks, b[0][2].masks)
    assert (run / "branches").exists() and not list((kept / "branches").glob("dense-*"))


def test_controls_of_a_search_with_mask_actions_are_plain(tmp_path, starts):
    recipe = recipe_of(prune__mask_0="freeze_init", prune__mask_1="signed_constant", prune__rounds=1)
    found = running.run(recipe, out=tmp_path).replicates[0].path
    result = branch(found, Control(kind="random-prune"), rounds=[1], trials=1)
    assert result.recipe.prune.rewinds and result.recipe.prune.constant is None
    [(_, _, start)] = starts(found, Control(kind="one-shot"), rounds=[1])
    assert_same_bits(dict(start.values), load_ticket(found / "search.ticket").rewind())


def test_late_rewinding(tmp_path, starts):
    recipe = recipe_of(prune__rewind_to=15, prune__rounds=1)
    late = running.run(recipe, out=tmp_path).replicates[0].path
    ticket = load_ticket(late / "search.ticket")
    for control, first, values in (
        (Control(kind="random-prune"), 15, ticket.rewind()),
        (Control(kind="one-shot"), 15, ticket.rewind()),
        (Control(kind="random-prune", reinit=True), 0, None),
        (Control(kind="random-reinit"), 0, None),
        (Control(kind="prune-at-init", method="magnitude"), 0, build(recipe).state_dict()),
    ):
        start = starts(late, control, rounds=[1], trials=1)[0][2]
        assert start.first == first, control.kind
        if values is not None:
            assert_same_bits(dict(start.values), dict(values))
    [dense] = (late / "branches").glob("dense-*/round-0/trial-0/result.json")
    assert untimed(json.loads(dense.read_text())) == untimed(ticket.rounds[0])


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_prune_at_init_keeps_as_many_as_the_round(run, starts, scope):
    ticket = load_ticket(run / "search.ticket")
    for method in ("snip", "grasp", "synflow", "magnitude"):
        [(_, _, start)] = starts(run, Control(kind="prune-at-init", method=method, scope=scope), rounds=[3])
        counts = {n: int(m.sum()) for n, m in start.masks.items()}
        assert sum(counts.values()) == ticket.file.kept(3)
        assert (counts == {n: int(m.sum()) for n, m in ticket.mask(3).items()}) == (scope == "layer")
        assert_same_bits(dict(start.values), ticket.rewind())
    for method in ("random", "even", "erk"):
        seen = starts(run, Control(kind="prune-at-init", method=method), rounds=[3], trials=2)
        assert [sum(int(m.sum()) for m in s.masks.values()) for _, _, s in seen] == [ticket.file.kept(3)] * 2


def test_what_begins_with_iteration_0_may_be_shorter_than_the_rewind_point(tmp_path):
    late = running.run(recipe_of(prune__rewind_to=15, prune__rounds=1), out=tmp_path).replicates[0].path
    short = {"train.iterations": 10}
    for control in (
        Control(kind="random-reinit"), Control(kind="random-prune", reinit=True),
        Control(kind="prune-at-init", method="magnitude"),
    ):  # fmt: skip
        found = branch(late, control, rounds=[1], trials=1, settings=short)
        assert found.recipe.train.iterations == 10
        evaluated = [x["iteration"] for x in lines(found.folder / "round-1" / "trial-0") if x["event"] == "evaluation"]
        assert evaluated[-1] == 10
        usual = branch(late, control, rounds=[1], trials=1)  # elsewhere recipe and folder are what they were
        digest = control.digest(load_ticket(late / "search.ticket").recipe.digest)
        assert usual.recipe.prune.rewind_to == 15 and usual.folder.name == f"{control.kind}-{digest[:8]}"
    with pytest.raises(RecipeError, match=r"prune.rewind_to must be below train.iterations \(10\), got 15"):
        branch(late, Control(kind="random-prune"), rounds=[1], settings=short)


def test_a_milestone_that_is_not_reached_is_said(run):
    length = load_ticket(run / "search.ticket").recipe.train.iterations
    said = []
    branch(run, Control(kind="random-reinit"), rounds=[1], trials=1, settings={"schedule.milestones": [length]},
           show=lambda what: said.append(what) if isinstance(what, str) else None)  # fmt: skip
    assert said == [f"schedule.milestones [{length}] are not reached in {length} iterations"]


def test_masks_of_controls_are_analysed_and_a_collapse_is_said(run):
    """As in a search: a line per layer with counts and signs, a warning for a layer without weights."""
    seen = []
    control = Control(kind="prune-at-init", method="magnitude", density=0.0005)
    found = branch(run, control, show=seen.append)
    trial = found.folder / "round-1" / "trial-0"
    [started] = [e for e in seen if isinstance(e, TrialStarted)]
    masks = Trial(found.folder, "", 1).masks(Workbench(run, None, seen.append, lambda: None).prunable)
    empty = {n for n, m in masks.items() if not m.any()}
    assert empty and {n for n, what in started.collapsed.items() if what == "keeps no weight"} == empty
    told = [json.loads(x) for x in (trial / "metrics.jsonl").read_text().splitlines()]
    layers = {x["layer"]: x for x in told if x["event"] == "layer"}
    assert {n: x["kept"] for n, x in layers.items()} == {n: int(m.sum()) for n, m in masks.items()}
    assert all(x["jaccard_with_previous"] is None for x in layers.values())
    assert {x["layer"] for x in told if x["event"] == "warning"} == set(started.collapsed)
    assert [x["event"] for x in told if x["event"] not in ("evaluation", "layer", "warning")] == ["round", "work"]
