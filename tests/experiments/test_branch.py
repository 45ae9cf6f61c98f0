"""Control runs: what each kind starts from against its definition, the steps it makes, and going on after a stop."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlth import running
from fastlth.data.sources import data_root, load
from fastlth.errors import RecipeError, RunLockedError, Stopped, TicketError
from fastlth.experiments.branch import branch
from fastlth.experiments.control import KINDS, METHODS, Control
from fastlth.experiments.trial import Trial, TrialStarted
from fastlth.experiments.workbench import NOISE, Workbench, draw_key
from fastlth.metrics import TIMING_FIELDS
from fastlth.models import build
from fastlth.models.init import normal
from fastlth.store.lock import Lock
from fastlth.tickets import load_ticket
from fastlth.training.engines.make import make_engine
from fastlth.training.schedule import lr_at
from tests.helpers import CPU, assert_same_bits, small_recipe

T = 40
LAYERS = {"fc1.weight": 0.2, "fc2.weight": 0.2, "output.weight": 0.1}


def recipe_of(**settings):
    return small_recipe(**{"prune__rounds": 3, "schedule__milestones": [30], **settings})


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A search of three rounds, never written to by a test that does not copy it."""
    recipe = recipe_of()
    return running.run(recipe, out=tmp_path_factory.mktemp("runs")).replicates[0].path


@pytest.fixture
def run(found, tmp_path):
    copied = tmp_path / "run" / "r0"
    shutil.copytree(found, copied)
    return copied


@pytest.fixture
def starts(monkeypatch):
    """Every training's start instead of the training: starts(run, control, ...) -> [(round, trial, Start)]."""

    def collect(run, control, **options):
        seen = []
        whole = Trial.run

        def spy(self, recipe, engine, start, **more):
            if "dense" in self.branch.name or ("lr-rewind" in self.branch.name and control.kind == "continued"):
                return whole(self, recipe, engine, start, **more)
            seen.append((self.round, self.number, start()))
            return {"round": self.round, "trial": self.number}

        with monkeypatch.context() as patch:
            patch.setattr(Trial, "run", spy)
            branch(run, control, **options)
        return seen

    return collect


def dense_by_hand(recipe, first=0, last=T, start=None, masks=None):
    """Plain steps of an engine: parameters and buffers after training."""
    engine = make_engine(recipe, load("digits", data_root()))
    engine.set_masks(masks or {n: torch.ones_like(engine.weights()[n], dtype=torch.bool) for n in LAYERS})
    engine.rewind(start or {n: t.clone() for n, t in build(recipe).state_dict().items()})
    for i in range(first, last):
        if i % 10 == 0:
            engine.interval()
        engine.run(i, i + 1)
    return {n: t.clone() for n, t in engine.weights().items()}


def pruned_by_hand(weights, masks, rates):
    """Sort magnitudes, remove floor(rate * kept): numpy, and no ties in trained weights."""
    new = {}
    for name, rate in rates.items():
        w, m = np.abs(weights[name].numpy()).reshape(-1), masks[name].numpy().reshape(-1).copy()
        kept = np.flatnonzero(m)
        gone = kept[np.argsort(w[kept], kind="stable")][: math.floor(rate * len(kept) + 1e-9)]
        m[gone] = False
        new[name] = torch.from_numpy(m.reshape(masks[name].shape))
    return new


def full():
    return {n: torch.ones(s, dtype=torch.bool) for n, s in zip(LAYERS, [(300, 64), (100, 300), (10, 100)], strict=True)}


def assert_same_masks(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def untimed(result):
    return {k: v for k, v in result.items() if k not in (*TIMING_FIELDS, "trial")}


# ---- what a kind starts from ---------------------------------------------------------------------------------------


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


def test_noise_is_added_to_the_rewind_values_in_units_of_the_layers_own_spread(run, starts):
    """Mean, spread and independence of what was added, against Glorot's formula; biases stay as they are."""
    ticket = load_ticket(run / "search.ticket")
    theta0, drawn = ticket.rewind(), {}
    for sigma in (0.5, 3.0):
        seen = starts(run, Control(kind="noise", sigma=sigma), rounds=[1, 3], trials=2)
        assert [(k, t) for k, t, _ in seen] == [(1, 0), (1, 1), (3, 0), (3, 1)]
        for k, t, start in seen:
            assert_same_masks(start.masks, ticket.mask(k))
            assert start.first == 0
            assert_same_bits({n: start.values[n] for n in theta0 if "bias" in n},
                             {n: theta0[n] for n in theta0 if "bias" in n})  # fmt: skip
            for name in LAYERS:
                noise = (start.values[name] - theta0[name]).double()
                std = sigma * math.sqrt(2 / sum(noise.shape))
                assert float(noise.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * noise.numel()))
                assert abs(float(noise.mean())) < 5 * std / math.sqrt(noise.numel())
            drawn[sigma, k, t] = (start.values["fc1.weight"] - theta0["fc1.weight"]).flatten()
    joined = torch.stack([*(d for (s, _, _), d in drawn.items() if s == 0.5), theta0["fc1.weight"].flatten()])
    assert float((torch.corrcoef(joined) - torch.eye(5)).abs().max()) < 0.05
    assert torch.allclose(drawn[3.0, 1, 0], 6 * drawn[0.5, 1, 0], atol=1e-5)  # one draw, at both sizes
    again = starts(run, Control(kind="noise", sigma=0.5), rounds=[3], trials=1)
    assert torch.equal((again[0][2].values["fc1.weight"] - theta0["fc1.weight"]).flatten(), drawn[0.5, 3, 0])


def test_noise_on_values_of_a_given_spread(tmp_path, starts):
    """model.weight_std 0.4 and noise of half of it: the sum has 0.4 * sqrt(1.25)."""
    recipe = recipe_of(model__weight_std=0.4, prune__rounds=1, train__iterations=2)
    path = running.run(recipe, out=tmp_path).replicates[0].path
    (_, _, start), *_ = starts(path, Control(kind="noise", sigma=0.5), rounds=[1], trials=1)
    assert float(start.values["fc1.weight"].std()) == pytest.approx(0.4 * math.sqrt(1.25), rel=0.03)
    (_, _, start), *_ = starts(path, Control(kind="random-reinit"), rounds=[1], trials=1)
    assert float(start.values["fc1.weight"].std()) == pytest.approx(0.4, rel=0.03)


def test_noise_on_an_own_nets_values_is_in_units_of_their_spread(tmp_path, starts):
    """nn.Linear draws uniformly from +-1/sqrt(inputs); Glorot's spread would be more than twice as wide."""
    recipe = small_recipe("tests.training.ranks:own_of_one_dimension", prune__rounds=1, train__iterations=2)
    path = running.run(recipe, out=tmp_path).replicates[0].path
    theta0 = load_ticket(path / "search.ticket").rewind()["2.weight"]
    (_, _, start), *_ = starts(path, Control(kind="noise", sigma=0.5), rounds=[1], trials=1)
    noise = (start.values["2.weight"] - theta0).double()
    drawn = normal(0, 640, draw_key(recipe.seeds, NOISE, 1, 0)).reshape(10, 64)
    assert np.allclose(noise.numpy(), 0.5 * np.std(theta0.double().numpy()) * drawn, atol=1e-6)
    assert float(noise.std()) == pytest.approx(0.5 * (1 / 8) / math.sqrt(3), rel=0.15)


def test_noise_trains(run):
    found = branch(run, Control(kind="noise", sigma=1.0), rounds=[2], trials=2)
    assert [t["density"] for t in found.trials] == [found.trials[0]["density"]] * 2
    assert found.trials[0]["early_stop_validation_loss"] != found.trials[1]["early_stop_validation_loss"]
    assert found.to_json()["sigma"] == 1.0 and found.folder.name.startswith("noise-")


@pytest.mark.parametrize(("kind", "options", "said"), [
    ("noise", {}, "noise needs --sigma, a number greater than 0 such as 0.5"),
    ("noise", {"sigma": 0.0}, "noise needs --sigma, a number greater than 0 such as 0.5, got 0.0"),
    ("noise", {"sigma": float("nan")}, "noise needs --sigma, a number greater than 0 such as 0.5, got nan"),
    ("noise", {"sigma": 1.0, "reinit": True}, "--reinit goes with random-prune, one-shot, not with noise"),
    ("one-shot", {"sigma": 1.0}, "--sigma goes with noise, not with one-shot; leave it out"),
])  # fmt: skip
def test_noise_is_refused_where_it_makes_no_sense(kind, options, said):
    with pytest.raises(RecipeError) as caught:
        Control(kind=kind, **options)
    assert str(caught.value).startswith(said)


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


def test_what_cannot_be_cut_or_made_again_is_refused(tmp_path):
    by_sign = recipe_of(prune__criterion="large_final_same_sign_single", prune__rounds=1)
    found = running.run(by_sign, out=tmp_path).replicates[0].path
    for options in ({"kind": "one-shot", "density": 0.3}, {"kind": "one-shot"}, {"kind": "finetune", "density": 0.3}):
        with pytest.raises(RecipeError, match="decides itself"):
            branch(found, Control(**options))
    assert not (found / "branches").exists()
    recipe = recipe_of(prune__early_bird=0.1, prune__rounds=1, train__batch_size=256)
    bird = running.run(recipe, out=tmp_path).replicates[0].path
    with pytest.raises(RecipeError, match="early bird"):
        branch(bird, Control(kind="one-shot", density=0.3))


@pytest.mark.parametrize("options", [
    {"kind": "one-shot"}, {"kind": "finetune"}, {"kind": "lr-rewind"}, {"kind": "random-prune"},
    {"kind": "prune-at-init", "method": "magnitude", "scope": "layer"},
])  # fmt: skip
def test_a_density_out_of_reach_is_refused_before_anything_is_trained_or_written(found, monkeypatch, options):
    monkeypatch.setattr(Trial, "run", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(RecipeError, match="cannot be reached in one step"):
        branch(found, Control(**options, density=0.0001))
    assert not (found / "branches").exists()


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


# ---- files, stopping, going on -------------------------------------------------------------------------------------


def lines(folder):
    text = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMING_FIELDS} for x in text]


@pytest.mark.parametrize("after", [1, 7, 18])
def test_a_stopped_branch_goes_on_to_the_same_bits(run, tmp_path, monkeypatch, after):
    monkeypatch.setattr("fastlth.training.trainer.CHUNK_SECONDS", 1e-9)  # one step a chunk
    other = tmp_path / "other" / "r0"
    shutil.copytree(run, other)
    control = Control(kind="lr-rewind", density=0.3)
    whole = branch(other, control)
    left = [after]

    def stopped():
        left[0] -= 1
        return 15 if left[0] == 0 else None

    branch(run, Control(kind="one-shot", density=0.3))  # the dense net is there
    with pytest.raises(Stopped) as caught:
        branch(run, control, stopped=stopped)
    assert caught.value.exit_code == 143
    [folder] = (run / "branches").glob("lr-rewind-*/round-1/trial-0")
    assert (folder / "state.safetensors").exists() and not (folder / "result.json").exists()
    torch.manual_seed(5)
    again = branch(run, control)
    assert untimed(again.trials[0]) == untimed(whole.trials[0])
    [expected] = (other / "branches").glob("lr-rewind-*/round-1/trial-0")
    assert lines(folder) == lines(expected) and not (folder / "state.safetensors").exists()


def test_a_finished_branch_is_read_and_trains_nothing(run, monkeypatch):
    first = branch(run, Control(kind="random-reinit"), rounds="all", trials=2)
    assert [(t["round"], t["trial"]) for t in first.trials] == [(k, t) for k in (1, 2, 3) for t in (0, 1)]
    monkeypatch.setattr(Trial, "run", None)
    second = branch(run, Control(kind="random-reinit"), rounds=[3, 1], trials=2)
    assert [t for t in first.trials if t["round"] != 2] == list(second.trials)
    means = second.rounds
    assert [m["round"] for m in means] == [1, 3] and means[0]["trials"] == 2
    assert means[1]["test_accuracy"] == pytest.approx(sum(t["test_accuracy"] for t in second.trials[2:]) / 2)
    document = json.loads(json.dumps(second.to_json()))
    assert document["kind"] == "random-reinit" and document["trials"] == list(second.trials)


def test_settings_change_the_folder_but_not_the_search(run):
    a = branch(run, Control(kind="random-reinit"), rounds=[1], trials=1)
    b = branch(run, Control(kind="random-reinit"), rounds=[1], trials=1, settings={"train.lr": 0.01})
    assert a.folder != b.folder and b.recipe.train.lr == 0.01
    for name in ("model.batch_norm", "data.augment", "prune.rate", "seeds.init", "seeds.split"):
        with pytest.raises(RecipeError, match="controls share it"):
            branch(run, Control(kind="random-reinit"), rounds=[1], settings={name: 1})
    other = branch(run, Control(kind="random-reinit"), rounds=[1], trials=1, settings={"seeds.branch": 9})
    assert other.folder != a.folder and untimed(other.trials[0]) != untimed(a.trials[0])


def test_the_default_round_is_the_winning_ticket_or_the_last(run, starts, monkeypatch):
    monkeypatch.setattr("fastlth.search.winning_round", lambda _: 2)
    assert starts(run, Control(kind="random-reinit"), trials=1)[0][0] == 2
    monkeypatch.setattr("fastlth.search.winning_round", lambda _: None)
    assert starts(run, Control(kind="random-reinit"), trials=1)[0][0] == 3


def test_one_writer_per_training(run):
    result = branch(run, Control(kind="random-reinit"), rounds=[1], trials=1)
    folder = result.folder / "round-1" / "trial-0"
    (folder / "result.json").unlink()
    lock = Lock(folder / "lock")
    try:
        with pytest.raises(RunLockedError):
            branch(run, Control(kind="random-reinit"), rounds=[1], trials=1)
    finally:
        lock.release()
    (folder / "result.json").write_text("{")
    with pytest.raises(TicketError, match="cannot be read"):
        branch(run, Control(kind="random-reinit"), rounds=[1], trials=1)


def test_a_chain_whose_trained_net_was_removed_says_so(run):
    found = branch(run, Control(kind="finetune", iterations=10), rounds=[1])
    shutil.rmtree(found.folder / "round-1" / "trial-0" / "weights")
    with pytest.raises(TicketError, match="no trained net any more"):
        branch(run, Control(kind="finetune", iterations=10), rounds=[2])


# ---- what is refused -----------------------------------------------------------------------------------------------

CONTRADICTIONS = [
    ({"kind": "reinit"}, "did you mean 'random-reinit'"),
    ({"kind": "random-reinit", "density": 0.1}, "--density goes with"),
    ({"kind": "random-reinit", "strategy": "even"}, "--strategy goes with random-prune"),
    ({"kind": "random-reinit", "reinit": True}, "--reinit goes with"),
    ({"kind": "continued", "density": 0.1}, "--density goes with"),
    ({"kind": "one-shot", "iterations": 5}, "--iterations goes with finetune, lr-rewind"),
    ({"kind": "one-shot", "method": "snip"}, "--method goes with prune-at-init"),
    ({"kind": "random-prune", "density": 1}, "in (0, 1)"),
    ({"kind": "one-shot", "density": 0.0}, "in (0, 1)"),
    ({"kind": "random-prune", "strategy": "evn"}, "did you mean 'even'"),
    ({"kind": "random-reinit", "sigma": 0.0}, "--sigma goes with noise"),
    ({"kind": "random-reinit", "images": 0}, "--images goes with prune-at-init"),
    ({"kind": "prune-at-init"}, "prune-at-init needs --method: "),
    ({"kind": "prune-at-init", "method": "erk", "scope": "layer"}, "has none"),
    ({"kind": "prune-at-init", "method": "snip", "scope": "net"}, "unknown scope"),
    ({"kind": "prune-at-init", "method": "synflow", "images": 5}, "looks at no image"),
    ({"kind": "prune-at-init", "method": "snip", "images": 0}, "at least 1"),
    ({"kind": "finetune", "iterations": 0}, "at least 1"),
]


@pytest.mark.parametrize(("options", "says"), CONTRADICTIONS)
def test_contradictions_are_refused_with_the_reason(options, says):
    with pytest.raises(RecipeError) as caught:
        Control(**options)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_only_the_run_can_refuse(run, tmp_path):
    reinit = Control(kind="random-reinit")
    for rounds, says in (([0], "choose from 1 to 3"), ([4], "choose from 1 to 3"), ("some", "numbers or all")):
        with pytest.raises(RecipeError, match=says):
            branch(run, reinit, rounds=rounds)
    with pytest.raises(RecipeError, match="draws nothing"):
        branch(run, Control(kind="finetune"), trials=2)
    with pytest.raises(RecipeError, match="at least 1"):
        branch(run, reinit, trials=0)
    with pytest.raises(RecipeError, match="at most the schedule's 40"):
        branch(run, Control(kind="lr-rewind", iterations=41))
    with pytest.raises(TicketError, match="is not one run"):
        branch(tmp_path / "nothing", reinit)
    empty = running.prepare(recipe_of(train__lr=0.5), out=tmp_path / "out")
    with pytest.raises(TicketError, match="no finished round yet"):
        branch(empty, reinit)


# ---- the commands --------------------------------------------------------------------------------------------------


def test_commands(command, monkeypatch, tmp_path, run):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("branch", run, "random-prune", "--rounds", "1,2", "--trials", "2", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert [r["round"] for r in document["rounds"]] == [1, 2] and len(document["trials"]) == 4
    code, out, err = command("branch", run, "random-prune", "--round", "1", "--rounds", "2")
    assert (code, out) == (2, "") and "give one" in err
    code, out, err = command("branch", run, "random-prune", "--rounds", "first")
    assert (code, out) == (2, "") and "1,7,9" in err
    short = [a for k, v in {**CPU, "evaluate.every": 10}.items() for a in ("--set", f"{k}={v}")]
    arguments = ["prune-at-init", "lenet-300-100", "digits", "--method", "snip", "--density", "0.1", "-i", "20", *short]
    code, out, err = command(*arguments, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["rounds"][0]["kept"] == 5_020 and Path(document["run"]).name == "r0"
    assert (Path(document["run"]) / "recipe.toml").exists()
    again = command(*arguments, "--json")
    assert again[0] == 0 and json.loads(again[1]) == document
    code, out, err = command("find-ticket", "lenet-300-100", "digits", "-i", "20", "--rounds", "1", *short, "--json")
    assert code == 0 and json.loads(out)["run"] == document["run"]  # the search goes where the baseline lies
    code, _, err = command("branch", document["run"], "prune-at-init", "--method", "synflow", "--round", "1")
    assert code == 0, err


def test_prune_at_init_refuses_settings_that_it_does_not_look_at(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = ["prune-at-init", "lenet-300-100", "digits", "--method", "snip", "--density", "0.1", "--trials", "2"]
    for setting in ("prune.criterion=random", "prune.rounds=3", "prune.to_density=0.1", "prune.rewind_to=5",
                    "prune.mask_1=signed_constant", "prune.mask_0=freeze_init", "prune.early_bird=0.1",
                    "prune.scope=global", "store.keep_weights=all"):  # fmt: skip
        code, out, err = command(*arguments, "--set", setting)
        refused = f"fastlth: {setting.partition('=')[0]} is for searches"
        assert (code, out, list(tmp_path.iterdir())) == (2, "", []) and err.startswith(refused), err
    for more in (["--set", "prune.scale.output=0"], ["--scope", "layer", "--set", "prune.scope=layer"]):
        assert "draws nothing" in command(*arguments, *more)[2], "the setting is taken, the trials are refused"


def test_the_page_names_every_kind_method_and_strategy(command):
    page = (Path(__file__).resolve().parents[2] / "docs" / "branches.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| `")]
    assert [name.strip("`") for name in rows[: len(KINDS)]] == list(KINDS)
    assert [name for row in rows[len(KINDS) :] for name in re.findall(r"`(\w+)`", row)] == list(METHODS)
    assert all(f"`{name}`" in page for name in ("layer", "global", "even", "erk"))
    words = " ".join(re.sub(r"[^\w-]", " ", command("branch", "--help")[1]).split())
    assert all(name in words for name in (*KINDS, *METHODS))


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
