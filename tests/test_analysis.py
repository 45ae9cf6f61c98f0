"""Mask analysis against definitions of a few lines, on random and on nasty masks."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from torch import nn

import fastlth
from fastlth.analysis import (
    chain,
    collapses,
    jaccard,
    kept_by_both,
    net_units,
    replicate_overlap,
    sign_agreement,
    unit_fields,
    units,
)
from fastlth.happenings import Notice
from fastlth.models import skeleton, weight_names
from fastlth.store.ticket import Ticket
from fastlth.ui import View
from tests.helpers import small_recipe

# outputs, inputs, kernel: two convolutions, flattened to 2 x 2 places per channel, two linear layers
SHAPES = {"conv1": (4, 3, 3, 3), "conv2": (5, 4, 3, 3), "fc1": (6, 20), "output": (3, 6)}


def nasty_nets():
    rng = np.random.default_rng(0)
    for density in (0.0, 0.02, 0.05, 0.1, 0.3, 0.9, 1.0):
        for _ in range(4):
            yield {n: rng.random(s) < density for n, s in SHAPES.items()}
    for empty in SHAPES:
        yield {n: np.full(s, n != empty) for n, s in SHAPES.items()}
    for name, shape in SHAPES.items():  # one weight alone in a layer, and one unit alone
        one = {n: np.ones(s, bool) for n, s in SHAPES.items()}
        one[name] = np.zeros(shape, bool)
        one[name][1, 2] = True
        yield one
    yield {"output": np.ones((1, 1), bool)}
    yield {"output": np.zeros((1, 1), bool)}


def paths_by_walking(masks):
    """Per layer the set of (unit, input) on a kept path from the image to the logits, by walking every path."""
    names = list(masks)
    found = {n: set() for n in names}
    reach = {n: set() for n in names}  # units of a layer that a path from the image reaches

    def walk(depth, unit, path):
        """Take every kept way on from ``unit`` of layer ``depth - 1`` (None: the image)."""
        if depth == len(names):
            for n, step in path:
                found[n].add(step)
            return
        mask = masks[names[depth]]
        per = 1 if depth == 0 else mask.shape[1] // masks[names[depth - 1]].shape[0]
        for i in range(mask.shape[1]):
            if unit is None or i // per == unit:
                for o in range(mask.shape[0]):
                    if mask[o, i].any():
                        reach[names[depth]].add(o)
                        walk(depth + 1, o, [*path, (names[depth], (o, i))])

    walk(0, None, [])
    return found, reach


@pytest.mark.parametrize("masks", list(nasty_nets()))
def test_paths_are_those_found_by_walking_every_one(masks):
    found, reach = paths_by_walking(masks)
    result = units(masks, chain=True)
    before = True
    for name, mask in masks.items():
        assert result[name].on_paths == sum(int(mask[o, i].sum()) for o, i in found[name])
        assert result[name].ends_here == (bool(before) and not reach[name])
        before = reach[name]


@pytest.mark.parametrize("masks", list(nasty_nets()))
def test_degrees_and_dead_units_by_their_definition(masks):
    result = units(masks, chain=True)
    names = list(masks)
    for k, name in enumerate(names):
        mask = masks[name]
        incoming = [int(mask[o].sum()) for o in range(mask.shape[0])]  # of a convolution: per channel, kernel included
        outgoing = [int(mask[:, i].sum()) for i in range(mask.shape[1])]
        assert result[name].in_degrees.tolist() == incoming
        assert result[name].out_degrees.tolist() == outgoing
        dead = []
        for o, count in enumerate(incoming):
            readers = 1
            if k + 1 < len(names):
                behind = masks[names[k + 1]]
                per = behind.shape[1] // mask.shape[0]
                readers = behind[:, o * per : (o + 1) * per].sum()
            dead.append(count == 0 or readers == 0)
        assert result[name].dead.tolist() == dead
        assert unit_fields(result[name]) == {
            "units": mask.shape[0], "dead_units": sum(dead), "unread_inputs": outgoing.count(0),
            "kept_on_paths": result[name].on_paths,
            "in_degree_min": min(incoming), "in_degree_median": float(np.median(incoming)),
            "in_degree_max": max(incoming), "out_degree_min": min(outgoing),
            "out_degree_median": float(np.median(outgoing)), "out_degree_max": max(outgoing),
        }  # fmt: skip


def test_a_whole_net_is_on_paths_and_a_net_without_a_chain_only_has_degrees():
    whole = {n: np.ones(s, bool) for n, s in SHAPES.items()}
    result = units(whole, chain=True)
    assert {n: u.on_paths for n, u in result.items()} == {n: m.size for n, m in whole.items()}
    assert not any(u.dead.any() or u.ends_here for u in result.values()) and collapses(result) == {}
    loose = units(whole, chain=False)
    assert all((u.dead, u.on_paths, u.ends_here) == (None, None, None) for u in loose.values())
    assert [u.in_degrees.tolist() for u in loose.values()] == [u.in_degrees.tolist() for u in result.values()]


def test_what_is_a_chain():
    for model in ("lenet-300-100", "lenet-5", "conv-2", "vgg19"):
        for dropout in (0.0, 0.5):
            recipe = small_recipe(model, "cifar-10", model__dropout=dropout)
            net = skeleton(recipe)
            assert [f"{link.name}.weight" for link in chain(recipe, net)] == weight_names(net)
    recipe = small_recipe("resnet-8")
    assert chain(recipe, skeleton(recipe)) is None
    assert chain(recipe, nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))) is None
    assert chain(recipe, nn.Linear(2, 2)) is None


def test_dropout_takes_part_in_no_path():
    plain, dropped = (units_of(small_recipe("conv-2", model__dropout=d)) for d in (0.0, 0.5))
    assert plain.keys() == dropped.keys()
    for name, u in plain.items():
        assert unit_fields(dropped[name]) == unit_fields(u)
        assert u.dead is not None and (dropped[name].dead == u.dead).all()


def test_a_layer_collapses_where_it_is_empty_or_where_the_last_path_ends():
    masks = {"a": np.ones((4, 2), bool), "b": np.zeros((4, 4), bool), "c": np.zeros((3, 4), bool)}
    masks["b"][0, 0] = masks["b"][1, 3] = masks["c"][2, 1] = True
    assert collapses(units(masks, chain=True)) == {}
    masks["c"][2, 1], masks["c"][2, 3] = False, True  # reads a unit of b that has no input
    assert list(collapses(units(masks, chain=True))) == ["c"]
    assert "every path" in collapses(units(masks, chain=True))["c"]
    masks["c"][:] = False
    assert collapses(units(masks, chain=True)) == {"c": "keeps no weight"}
    masks["a"][:] = False
    assert collapses(units(masks, chain=True)) == {"a": "keeps no weight", "c": "keeps no weight"}
    assert collapses(units(masks, chain=False)) == {"a": "keeps no weight", "c": "keeps no weight"}


def test_sign_agreement():
    rewind = np.array([1.0, -1.0, 2.0, 0.0, -0.0, 3.0, -3.0, 1.0, 0.0], np.float32)
    trained = np.array([0.5, 0.5, -1.0, 0.0, 0.0, np.nan, -1e-30, np.inf, 1.0], np.float32)
    agree = np.array([1, 0, 0, 1, 1, 0, 1, 1, 0], bool)
    for mask in itertools.product((False, True), repeat=9):
        chosen = np.array(mask)
        expected = agree[chosen].mean() if any(mask) else None
        assert sign_agreement(chosen, rewind, trained) == expected


@pytest.mark.parametrize("shape", [(7, 5, 3, 3), (40, 30), (1, 1), (0, 4)])
def test_overlap_of_all_rounds_in_one_pass(shape):
    rng = np.random.default_rng(2)
    a, b = (rng.integers(0, 255, shape).astype(np.uint8) * (rng.random(shape) < 0.8) for _ in range(2))
    for at in (a, b):
        at[rng.random(shape) < 0.3] = 1
    found = kept_by_both(a, b, 255)
    for k in range(255):
        x, y = ((at == 0) | (at > k) for at in (a, b))
        assert found[k] == (x.sum(), y.sum(), (x & y).sum())


def test_jaccard():
    assert jaccard(0, 0, 0) == 1.0 and jaccard(4, 0, 0) == 0.0 and jaccard(4, 4, 4) == 1.0 and jaccard(3, 2, 1) == 0.25


def ticket(recipe, seed, rounds=3):
    """A ticket whose weights were removed at random; what it keeps is nested as always."""
    rng, net = np.random.default_rng(seed), skeleton(recipe)
    arrays = {n: rng.normal(size=tuple(p.shape)).astype(np.float32) for n, p in net.state_dict().items()}
    pruned_at = {n: rng.integers(0, rounds, a.shape).astype(np.uint8) for n, a in arrays.items() if "weight" in n}
    pruned_at.pop("conv1.weight", None)  # one that is never pruned
    return Ticket(recipe=recipe, resolved={}, rewind=arrays, rewind_iteration=0, pruned_at=pruned_at,
                  rounds=tuple({"round": k} for k in range(rounds)), all_weights=10**6)  # fmt: skip


def test_overlap_between_replicates_is_the_mean_over_all_pairs():
    tickets = [ticket(small_recipe("conv-2"), seed) for seed in range(3)]
    names = ["conv2.weight", "fc1.weight", "fc2.weight", "output.weight"]  # the order of the net
    for found in replicate_overlap(tickets):
        k = found["round"]
        masks = [{n: t.mask(k)[n].reshape(-1) for n in names} for t in tickets]

        def mean(select, masks=masks):
            pairs = [(select(a), select(b)) for a, b in itertools.combinations(masks, 2)]
            return np.mean([(x & y).sum() / (x | y).sum() for x, y in pairs])

        assert found["jaccard"] == pytest.approx(mean(lambda m: np.concatenate(list(m.values()))))
        assert [layer["name"] for layer in found["layers"]] == names
        for layer in found["layers"]:
            assert layer["jaccard"] == pytest.approx(mean(lambda m, n=layer["name"]: m[n]))
        assert found["jaccard_by_chance"] == pytest.approx(found["jaccard"], abs=0.02)  # these masks are independent
    assert [f["round"] for f in replicate_overlap([tickets[0], ticket(small_recipe("conv-2"), 9, rounds=2)])] == [0, 1]
    assert replicate_overlap([tickets[0], tickets[0]])[2]["jaccard"] == 1.0


def units_of(recipe):
    return net_units(recipe, ticket(recipe, 0).mask(2))


def test_a_layer_that_is_never_pruned_is_whole():
    found = units_of(small_recipe("conv-2"))
    assert list(found) == ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight", "output.weight"]
    assert set(found["conv1.weight"].in_degrees.tolist()) == {9}


def test_nothing_is_said_about_paths_where_pruned_weights_are_not_zero():
    found = units_of(small_recipe("conv-2", prune__mask_0="freeze_init"))
    assert all(u.dead is None and u.on_paths is None for u in found.values())
    assert all(u.dead is not None for u in units_of(small_recipe("conv-2")).values())


def lines(search):
    return [json.loads(x) for x in (search.replicates[0].path / "metrics.jsonl").read_text().splitlines()]


def assert_documented(records):
    """Every field stands in docs/metrics.md; those of a round are the contract of find-ticket --json."""
    text = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    missing = {name for x in records if x["event"] != "round" for name in x if f"`{name}`" not in text}
    assert not missing and all(f"| `{x['event']}` |" in text for x in records)


def test_every_round_leaves_one_line_per_layer(tmp_path):
    """Checked against the ticket and the trained weights that the run kept."""
    recipe = small_recipe("conv-2", train__iterations=12, evaluate__every=12, store__keep_weights="all",
                          prune__scale={"conv1": 0})  # fmt: skip
    search = fastlth.run(recipe, out=tmp_path)
    loaded = fastlth.load_ticket(search.ticket)
    written = lines(search)
    assert [(x["event"], x["round"]) for x in written] == [
        (e, k) for k in range(3) for e in ("evaluation", "round", *["layer"] * 5, "work")
    ]
    assert_documented(written)
    for line in (x for x in written if x["event"] == "layer"):
        name, k = line["layer"], line["round"]
        weight = loaded.trained(k).get_parameter(name).detach().numpy()
        rewind = loaded.file.rewind[name]
        mask = loaded.file.mask(k).get(name, np.ones(weight.shape, bool))
        assert (line["weights"], line["kept"], line["density"]) == (mask.size, mask.sum(), mask.mean())
        assert line["sign_agreement"] == (np.sign(weight) == np.sign(rewind))[mask].mean()
        if k == 0:
            assert line["jaccard_with_previous"] is None and line["kept_of_previous"] is None
        else:
            previous = loaded.file.mask(k - 1).get(name, np.ones(weight.shape, bool))
            assert line["jaccard_with_previous"] == (mask & previous).sum() / (mask | previous).sum()
            assert line["kept_of_previous"] == (mask & previous).sum() / previous.sum()
        incoming = mask.reshape(mask.shape[0], -1).sum(1)
        assert (line["units"], line["in_degree_min"], line["in_degree_max"]) == (
            mask.shape[0], incoming.min(), incoming.max(),
        )  # fmt: skip
    signs = [x["sign_agreement"] for x in written if x["event"] == "layer"]
    assert 0.3 < min(signs) < 1.0  # training changed some signs, so the comparison above could fail


def test_a_planted_collapse_warns(tmp_path, monkeypatch):
    """Pruning is made to empty fc2 in round 1."""
    import fastlth.search as search_module

    honest = search_module.prune

    def emptying(*args, **kwargs):
        return {n: m & (n != "fc2.weight") for n, m in honest(*args, **kwargs).items()}

    monkeypatch.setattr(search_module, "prune", emptying)
    shown = []
    view = View(Console(file=(screen := io.StringIO()), width=200))

    def show(event):
        shown.append(event)
        view(event)

    search = fastlth.run(small_recipe(train__iterations=4, evaluate__every=4), out=tmp_path, show=show)
    assert screen.getvalue().count("warning: in round 1 fc2.weight keeps no weight") == 1
    assert [x.text for x in shown if isinstance(x, Notice)] == ["warning: in round 1 fc2.weight keeps no weight"]
    assert_documented(lines(search))
    warnings = [x for x in lines(search) if x["event"] == "warning"]
    assert warnings == [
        {"event": "warning", "round": k, "layer": "fc2.weight", "message": "fc2.weight keeps no weight"} for k in (1, 2)
    ]
    layers = {x["layer"]: x for x in lines(search) if x["event"] == "layer" and x["round"] == 1}
    assert layers["fc2.weight"]["dead_units"] == 100 and layers["fc1.weight"]["dead_units"] == 300
    assert layers["fc2.weight"]["sign_agreement"] is None and layers["output.weight"]["kept_on_paths"] == 0
