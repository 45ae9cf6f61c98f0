"""Layers from their kept weights alone in a training step: the dense engine's results, its promises, the choice."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlth import running
from fastlth.errors import RecipeError
from fastlth.happenings import Started
from fastlth.running import Stopped
from fastlth.search import RoundFinished, find_tickets
from fastlth.training import break_even, kept, resolve
from fastlth.training.engines.make import make_engine
from fastlth.training.kept import KeptLayers
from tests.helpers import (
    assert_close_by_norm,
    assert_masked,
    assert_same_bits,
    compute,
    half_masks,
    random_source,
    small_recipe,
)  # fmt: skip

ALL = {"conv2": 1.0, "fc1": 1.0, "fc2": 1.0}
OPTIMIZERS = {
    "adam": {"train__weight_decay": 1e-3},
    "adamw": {"train__optimizer": "adamw", "train__weight_decay": 0.1},
    "sgd": {"train__optimizer": "sgd", "train__lr": 0.05, "train__momentum": 0.9, "train__nesterov": True},
}


def engine_for(limits, density=0.2, model="conv-2", precision="fp32", threads=1, **settings):
    """An engine with random masks, ready to train, and its masks."""
    recipe = small_recipe(model, "digits", **settings)
    changed = compute(recipe, kept=limits, precision=precision, channels_last="on", threads=threads)
    engine = make_engine(dataclasses.replace(recipe, compute=changed), random_source("digits"))
    start = {n: t.clone() for n, t in engine.weights().items()}
    masks = half_masks({n: start[n] for n in engine.weight_names}, density)
    engine.set_masks(masks)
    engine.rewind(start)
    return engine, masks


def copies(tensors):
    return {n: t.clone() for n, t in tensors.items()}


SETTINGS = {**OPTIMIZERS, "dropout": {"train__optimizer": "sgd", "train__lr": 0.05, "model__dropout": 0.5}}


@pytest.mark.parametrize("settings", SETTINGS)
def test_ten_steps_equal_the_dense_engine(settings):
    (ours, masks), (theirs, _) = (engine_for(limits, **SETTINGS[settings]) for limits in (ALL, {}))
    assert ours.layers == {"conv1": "dense", "conv2": "kept", "fc1": "kept", "fc2": "kept", "output": "dense"}
    assert set(theirs.layers.values()) == {"dense"}
    for i in range(10):
        ours.run(i, i + 1)
        assert_masked(ours.weights(), masks)
    theirs.run(0, 10)
    for name, weight in theirs.weights().items():
        assert_close_by_norm(ours.weights()[name], weight, 1e-4)
    assert ours.interval().loss == pytest.approx(theirs.interval().loss, rel=1e-5)
    for split in ("validation", "test"):
        a, b = ours.evaluate(split), theirs.evaluate(split)
        assert (a.loss, a.accuracy) == (pytest.approx(b.loss, rel=1e-4), b.accuracy)


def test_bf16_rounds_less_than_the_library():
    """Both against float32; ours rounds activations only."""
    (exact, _), (ours, _), (theirs, _) = (
        engine_for(limits, precision=precision, train__optimizer="sgd", train__lr=0.05)
        for limits, precision in (({}, "fp32"), (ALL, "bf16"), ({}, "bf16"))
    )
    for engine in (exact, ours, theirs):
        engine.run(0, 3)
    for name in ("conv2.weight", "fc1.weight"):
        want = exact.weights()[name]
        assert_close_by_norm(ours.weights()[name], want, 1e-2)
        assert float((ours.weights()[name] - want).norm()) <= 1.2 * float((theirs.weights()[name] - want).norm())


class Plain:
    """conv, pool, linear in float64 by autograd, Adam written out, masks times gradients."""

    def __init__(self, net, masks):
        self.p = {n: t.detach().clone().requires_grad_() for n, t in net.named_parameters()}
        self.masks, self.m, self.v, self.t = masks, {}, {}, 0

    def step(self, x, labels, lr):
        h = F.conv2d(x, self.p["0.weight"], self.p["0.bias"], padding=1).relu()
        h = F.max_pool2d(h, 2).flatten(1)
        loss = F.cross_entropy(h @ self.p["4.weight"].t() + self.p["4.bias"], labels)
        gradients = torch.autograd.grad(loss, list(self.p.values()))
        self.t += 1
        for (n, p), g in zip(self.p.items(), gradients, strict=True):
            g = g * self.masks[n] if n in self.masks else g
            self.m[n] = 0.9 * self.m.get(n, 0) + 0.1 * g
            self.v[n] = 0.999 * self.v.get(n, 0) + 0.001 * g * g
            with torch.no_grad():
                p -= lr * self.m[n] / (1 - 0.9**self.t) / ((self.v[n] / (1 - 0.999**self.t)).sqrt() + 1e-8)


def test_a_hundred_steps_equal_the_definition_in_float64():
    from fastlth.training.optim import MaskedOptimizer

    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 16))
    net = net.double()
    masks = {n: torch.rand(p.shape, generator=generator) < 0.4 for n, p in net.named_parameters() if p.dim() > 1}
    with torch.no_grad():
        for name, mask in masks.items():
            net.get_parameter(name).mul_(mask)
    plain = Plain(net, masks)
    layers = KeptLayers(net, {"0": 1.0, "4": 1.0}, batch=7, threads=2)
    optimizer = MaskedOptimizer(dict(net.named_parameters()), small_recipe().train)
    assert layers.choose(masks)
    optimizer.move(layers.values)
    x = torch.randn(7, 16, 4, 4, generator=generator, dtype=torch.float64)
    labels = torch.arange(7)
    for i in range(100):
        lr = 1e-3 * (1 + i / 100)
        optimizer.lr.fill_(lr)
        F.cross_entropy(net(x), labels).backward()
        optimizer.step({n: ~m for n, m in masks.items()})
        plain.step(x, labels, float(optimizer.lr))
    layers.write_back()
    for name, p in plain.p.items():
        assert_close_by_norm(net.get_parameter(name).detach(), p.detach(), 1e-10)


def test_chunks_and_a_state_that_goes_on_change_no_bit():
    (whole, _), (parts, _), (other, _) = (engine_for(ALL, threads=2) for _ in range(3))
    whole.run(0, 10)
    for first, last in ((0, 1), (1, 7)):
        parts.run(first, last)
    other.load_state(copies(parts.state()))
    other.run(7, 10)
    assert_same_bits(whole.state(), other.state())
    assert whole.interval() == other.interval()


def test_a_state_is_the_dense_engines():
    (ours, _), (theirs, _) = engine_for(ALL), engine_for({})
    theirs.run(0, 7)
    assert list(ours.state()) == list(theirs.state())
    ours.load_state(copies(theirs.state()))
    assert_same_bits(ours.state(), theirs.state())


def test_rewinding_restores_weights_and_forgets_the_optimizer():
    engine, masks = engine_for(ALL)
    start = copies(engine.weights())
    engine.run(0, 5)
    first = copies(engine.weights())
    engine.rewind({n: t + (t == 0) for n, t in start.items()})  # what a start holds for pruned weights is not looked at
    assert_masked(engine.weights(), masks)
    engine.rewind(start)
    assert_same_bits(engine.weights(), start)
    engine.interval()
    engine.run(0, 5)
    assert_same_bits(engine.weights(), first)


def test_a_nan_where_a_weight_is_pruned_changes_nothing():
    """A dense gradient would be NaN at every weight of input 3, all of which are pruned; the output is not."""
    layer = nn.Linear(16, 16)
    mask = torch.ones(16, 16, dtype=torch.bool)
    mask[:, 3] = False
    layers = KeptLayers(nn.Sequential(layer), {"0": 1.0}, batch=4, threads=1)
    with torch.no_grad():
        layer.weight.mul_(mask)
    layers.choose({"0.weight": mask})
    x = torch.randn(4, 16)
    x[0, 3] = torch.nan
    layer(x).sum().backward()
    values = layers.values["0.weight"]
    assert values.grad is not None and values.grad.isfinite().all()
    assert torch.allclose(values.grad, x[:, mask[0]].sum(0).repeat(16), atol=1e-5)


def test_the_density_of_a_round_decides_layer_by_layer():
    engine, _ = engine_for({"conv2": 0.1, "fc1": 0.5}, density=0.3)
    assert {n: how for n, how in engine.layers.items() if how == "kept"} == {"fc1": "kept"}
    engine.run(0, 2)
    weights = copies(engine.weights())
    for density, expected in ((0.05, {"conv2", "fc1"}), (0.02, {"conv2", "fc1"}), (0.9, set())):
        new = half_masks({n: weights[n] for n in engine.weight_names}, density)
        engine.set_masks(new)
        assert {n for n, how in engine.layers.items() if how == "kept"} == expected
        engine.rewind(weights)
        engine.interval()
        engine.run(0, 2)
        assert_masked(engine.weights(), new)
    assert "forward" not in engine.model.fc1.__dict__


def test_masks_and_weights_come_back_when_masks_change_without_a_rewind():
    engine, masks = engine_for(ALL, density=0.5)
    engine.run(0, 3)
    before = copies(engine.weights())
    smaller = {n: m & half_masks({"": m}, 0.5, seed=9)[""] for n, m in masks.items()}
    engine.set_masks(smaller)
    for name, weight in engine.weights().items():
        want = before[name] * smaller[name] if name in smaller else before[name]
        assert torch.equal(weight, want), name


def test_a_second_backward_pass_is_refused():
    layer = nn.Linear(16, 16)
    layers = KeptLayers(nn.Sequential(layer), {"0": 1.0}, batch=4, threads=1)
    layers.choose({"0.weight": torch.ones(16, 16, dtype=torch.bool)})
    first = layer(torch.randn(4, 16)).sum()
    layer(torch.randn(4, 16))
    with pytest.raises(RuntimeError, match="one backward pass"):
        first.backward()


# ---- the recipe and the choice


@pytest.mark.parametrize(("settings", "message"), [
    ({"compute__kept": {"conv1": 0.3}}, r"compute.kept must name layers such as \['conv2', 'fc1'\], got 'conv1'"),
    ({"compute__kept": {"fc1": 0.3}, "compute__compile": "on"}, "must be empty, since compute.compile is on"),
    ({"compute__kept": {"fc1": 0.3}, "prune__mask_0": "freeze_init"}, "must be empty, since mask-0 action"),
])  # fmt: skip
def test_what_cannot_be_is_said_before_anything_starts(settings, message):
    with pytest.raises(RecipeError, match=message):
        running.check(small_recipe("conv-2", "digits", **settings))
    with pytest.raises(RecipeError, match=r"compute\.kept\.fc1 must be a density in 0 to 1, got 3"):
        small_recipe("conv-2", "digits", compute__kept={"fc1": 3.0})


def test_nets_without_such_layers_have_no_candidates():
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.Conv2d(16, 16, 2, padding=1), nn.Conv2d(16, 32, 3, padding=1, groups=2),
        nn.Conv2d(16, 16, 3, padding="same"),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"), nn.Conv2d(16, 16, 3, padding=2, dilation=2),
        nn.Linear(16, 10), nn.Linear(20, 16),
    )  # fmt: skip
    assert not kept.candidates(net)
    assert list(kept.candidates(nn.Sequential(nn.Conv2d(16, 32, 5, padding=2), nn.Linear(16, 32)))) == ["0", "1"]


@pytest.mark.parametrize(("times", "expected"), [
    ((1.1, 2.0, 0.5), 0.1), ((11.0, 2.0, 0.5), 0.5), ((0.11, 2.0, 0.6), 0.0), ((1.1, 0.5, 0.5), 0.2),
    ((0.3, 0.5, 0.5), 0.0),
])  # fmt: skip
def test_the_break_even_is_where_the_line_crosses_what_dense_takes_less_a_tenth(times, expected):
    assert break_even.crossing(*times) == pytest.approx(expected)


def test_each_distinct_layer_is_timed_once_with_its_real_steps():
    recipe, seen = small_recipe("conv-6", "digits"), []

    def time_all(steps):
        for step in steps:
            step()
        seen.append(len(steps))
        return [1.1, 2.0, 0.5] if len(seen) < 3 else [0.1, 2.0, 0.6]

    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1),
                          nn.Conv2d(16, 16, 3, padding=1), nn.Flatten(), nn.Linear(64, 16)).to("meta")  # fmt: skip
    found = break_even.break_evens(model, (16, 2, 2), recipe.train, "bf16", channels_last=True, threads=2,
                                   shifted=("1.weight",), time_all=time_all)  # fmt: skip
    assert seen == [3, 3, 3, 3]  # the first has no gradient of its input, the second shifted products
    assert found == {"0": 0.1, "1": 0.1}


def resolved_with(monkeypatch, **settings):
    monkeypatch.setattr(break_even, "break_evens", lambda *_, **__: {"fc1": 0.25})
    recipe = small_recipe("conv-2", "digits", **{"compute__engine": "auto", "train__iterations": 10**9, **settings})
    return resolve.resolve(recipe, lambda r: make_engine(r, random_source("digits"))).compute


def test_auto_measures_and_dense_is_dense(monkeypatch):
    assert resolved_with(monkeypatch).kept == {"fc1": 0.25}
    assert resolved_with(monkeypatch, compute__kept={"conv2": 0.5}).kept == {"conv2": 0.5}
    assert resolved_with(monkeypatch, compute__engine="dense").kept == {}
    assert resolved_with(monkeypatch, compute__engine="dense", compute__kept={"conv2": 0.5}).kept == {"conv2": 0.5}
    assert resolved_with(monkeypatch, compute__compile="on").kept == {}
    assert resolved_with(monkeypatch, train__iterations=10).kept == {}  # not worth the measuring
    assert resolved_with(monkeypatch, prune__mask_0="freeze_init").kept == {}


def test_compiling_is_compared_in_the_middle_of_the_search(monkeypatch):
    asked = []

    def measure(recipe, candidates, make_engine, *, calls=3, density=1.0):
        asked.append((candidates, density))
        return {c: 2.0 if c.compile == "on" else 1.0 for c in candidates}

    monkeypatch.setattr(resolve, "_measure", measure)
    chosen = resolved_with(monkeypatch, compute__compile="auto", prune__rounds=10)
    (first, second), density = asked[-1]
    assert (first.kept, second.kept, second.compile) == ({"fc1": 0.25}, {}, "on")
    assert density["fc1.weight"] == pytest.approx(0.8**5) and density["conv2.weight"] == pytest.approx(0.9**5)
    assert chosen.compile == "on" and chosen.kept == {}


def test_a_search_keeps_its_choice_and_its_bits_when_stopped(tmp_path, monkeypatch):
    source = random_source("digits")
    monkeypatch.setattr(running, "load_for", lambda *_: source)
    monkeypatch.setattr(resolve, "KEPT_WORTH_SECONDS", 0.0)
    monkeypatch.setattr(break_even, "break_evens", lambda *_, **__: {"conv2": 0.95, "fc1": 0.85})
    recipe = small_recipe(
        "conv-2", "digits", compute__engine="auto", prune__rounds=1, train__iterations=10, train__batch_size=16
    )
    seen = []
    whole = running.run(recipe, out=tmp_path / "whole")
    turns = iter([None, None, 15])  # a round's first chunk is one step: this is in round 1
    with pytest.raises(Stopped):
        running.run(recipe, out=tmp_path / "parts", show=seen.append, stopped=lambda: next(turns))
    monkeypatch.setattr(break_even, "break_evens", lambda *_, **__: pytest.fail("measured anew"))
    parts = running.run(recipe, out=tmp_path / "parts", show=seen.append)
    started = [e.compute.kept for e in seen if isinstance(e, Started)]
    assert started == [{"conv2": 0.95, "fc1": 0.85}] * 2
    timing = ("seconds", "images_per_second")
    first, second = ([{k: v for k, v in r.items() if k not in timing} for r in s.rounds] for s in (whole, parts))
    assert first == second
    assert [{n for n, how in r["layers"].items() if how == "kept"} for r in first] == [set(), {"conv2", "fc1"}]
    metrics = next((tmp_path / "parts").rglob("metrics.jsonl")).read_text()
    assert '"conv2": "kept"' in metrics or '"conv2":"kept"' in metrics


def test_tickets_of_kept_weights_are_nested_and_counted(monkeypatch):
    recipe = small_recipe("conv-2", "digits", prune__rounds=2, train__iterations=10, prune__rewind_to=5,
                          compute__kept=ALL, train__batch_size=16)  # fmt: skip
    rounds = [e for e in find_tickets(recipe, random_source("digits"), recipe.compute) if isinstance(e, RoundFinished)]
    at = rounds[-1].ticket.pruned_at["fc1.weight"]
    assert [int((at > k).sum() + (at == 0).sum()) for k in range(2)] == [at.size, at.size - int(0.2 * at.size)]
    assert all(set(r.result["layers"].values()) == {"dense", "kept"} for r in rounds)
    assert np.isfinite(rounds[-1].result["early_stop_validation_loss"])


def test_no_setting_moves_no_digest():
    recipe = small_recipe("conv-2", "digits")
    plain = {k: v for k, v in recipe.to_dict()["compute"].items() if k != "kept"}
    without = dataclasses.replace(recipe, compute=compute(recipe).__class__(**plain))
    assert without.digest == recipe.digest
    given = dataclasses.replace(recipe, compute=compute(recipe, kept={"fc1": 0.5}))
    assert given.digest != recipe.digest and hash(given.compute) == hash(recipe.compute)
