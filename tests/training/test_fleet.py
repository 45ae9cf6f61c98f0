"""Replicates trained as one: each is the run of its seed alone."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import fastlth
from fastlth.data.order import Order, split
from fastlth.training.engines import fleet as fleets
from fastlth.training.engines.fleet import Fleet
from fastlth.training.engines.graph import GraphEngine
from fastlth.training.engines.make import make_engine, make_splits
from tests.helpers import (  # fmt: skip
    assert_close_by_norm,
    assert_masked,
    assert_same_bits,
    compute,
    half_masks,
    random_source,
    small_recipe,
)

SETTINGS = {"compute__engine": "graph", "train__batch_size": 48, "train__drop_last": False, "schedule__warmup": 3}


def recipes(count: int, model="lenet-300-100", **settings):
    one = small_recipe(model, "digits", **{**SETTINGS, **settings})
    return [dataclasses.replace(one, seeds=dataclasses.replace(one.seeds, base=r)) for r in range(count)]


def together(members, call):
    """``call`` of every member, each in a thread of its own."""
    results, threads = [None] * len(members), []
    for r, member in enumerate(members):
        threads.append(threading.Thread(target=lambda r=r, m=member: results.__setitem__(r, call(m)), daemon=True))
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
        assert not t.is_alive(), "replicates wait for each other"
    return results


def copies(engine):
    return {n: t.clone() for n, t in engine.state().items()}


def alone(recipe, source, dtype) -> GraphEngine:
    kept, _ = split(len(source.train.labels), recipe.data.validation, recipe.seeds.key("split"))
    order = Order(len(kept), recipe.train.batch_size, recipe.train.drop_last, recipe.seeds.key("order"))
    return GraphEngine(recipe, order, make_splits(recipe, source), dtype=dtype)


@pytest.mark.parametrize(
    "optimizer", [{"train__optimizer": "adam"}, {"train__optimizer": "sgd", "train__lr": 0.05, "train__momentum": 0.9}]
)
@pytest.mark.parametrize(("dtype", "steps", "tolerance"), [(torch.float64, 100, 1e-10), (torch.float32, 10, 1e-4)])
@pytest.mark.parametrize("model", ["lenet-300-100", "conv-2"])
def test_a_replicate_is_the_run_of_its_seed(model, optimizer, dtype, steps, tolerance):
    source = random_source("digits")
    batch = 48 if model == "lenet-300-100" else 12  # 256 images: the last batch of an epoch is smaller
    some = recipes(3, model, train__batch_size=batch, evaluate__every=100, train__iterations=200, **optimizer)
    fleet = Fleet(some, source, dtype=dtype)
    engines = [alone(r, source, dtype) for r in some]
    masks = [half_masks({n: e.weights()[n] for n in e.prunable}, 0.4, seed=r) for r, e in enumerate(engines)]
    starts = []
    for member, engine, mask in zip(fleet.members, engines, masks, strict=True):
        assert_same_bits(member.weights(), engine.weights())  # theta0 by its own seed
        starts.append({n: t.clone() for n, t in engine.weights().items()})
        for one in (member, engine):
            one.set_masks(mask)
            one.rewind(starts[-1])
    chunks = together(fleet.members, lambda m: m.run(0, steps))
    for member, engine, mask, chunk in zip(fleet.members, engines, masks, chunks, strict=True):
        assert chunk == engine.run(0, steps)
        if model == "lenet-300-100" or dtype == torch.float64:
            for n, weight in engine.weights().items():
                assert_close_by_norm(member.weights()[n], weight, tolerance)
        else:  # of all values: where a bias has hardly a gradient Adam's first steps follow its last bits
            assert_close_by_norm(*(torch.cat([t.reshape(-1) for t in e.weights().values()]) for e in (member, engine)),
                                 tolerance)  # fmt: skip
        if dtype == torch.float32:
            assert_masked(member.weights(), mask)
        for split_name, images in (("validation", None), ("test", None), ("train", 100)):
            ours, theirs = member.evaluate(split_name, images), engine.evaluate(split_name, images)
            assert (ours.loss, ours.accuracy) == pytest.approx((theirs.loss, theirs.accuracy), rel=max(tolerance, 1e-6))
        ours, theirs = member.interval(), engine.interval()
        assert (ours.loss, ours.accuracy) == pytest.approx((theirs.loss, theirs.accuracy), rel=max(tolerance, 1e-6))
    for first, second in zip(*(m.weights().values() for m in fleet.members[:2]), strict=True):
        assert not torch.equal(first, second)


def test_chunks_of_any_length_and_states_go_on():
    source = random_source("digits")
    some = recipes(2)
    whole, parts, later = (Fleet(some, source) for _ in range(3))
    together(whole.members, lambda m: m.run(0, 10))
    lengths = {parts.members[0]: (3, 10), parts.members[1]: (1, 7, 10)}  # they want to stop at different places

    def run(member):
        at, images = 0, 0
        for end in lengths[member]:
            images += member.run(at, end).images
            at = end
        return images

    assert together(parts.members, run) == [448, 448]  # 256 and four whole batches
    for a, b, c in zip(whole.members, parts.members, later.members, strict=True):
        c.load_state(copies(b))
        assert_same_bits(copies(a), copies(b))
        assert_same_bits(copies(a), copies(c))
        assert a.interval() == b.interval() == c.interval()
    state = copies(whole.members[1])
    single = make_engine(some[1], source)  # and the same state goes into an engine of one replicate
    single.load_state(state)
    assert_same_bits(single.state(), state)


def test_one_that_leaves_is_not_waited_for_and_an_error_reaches_all(monkeypatch):
    fleet = Fleet(recipes(3), random_source("digits"))
    with fleet.members[1]:
        pass
    others = [fleet.members[0], fleet.members[2]]
    assert [c.images for c in together(others, lambda m: m.run(0, 2))] == [96, 96]

    def fails(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: gone")

    monkeypatch.setattr(Fleet, "advance", fails)

    def run(member):
        with pytest.raises(torch.AcceleratorError), member:
            member.run(2, 4)
        return "told"

    assert together(others, run) == ["told", "told"]


def test_a_loss_that_is_not_finite_is_its_replicates_alone():
    fleet = Fleet(recipes(2), random_source("digits"))
    broken = {n: t.clone() for n, t in fleet.members[1].weights().items()}
    broken["fc1.bias"][0] = float("nan")
    fleet.members[1].rewind(broken)
    chunks = together(fleet.members, lambda m: m.run(0, 3))
    assert [c.first_bad for c in chunks] == [None, 0]


def test_a_search_of_replicates_is_that_of_its_seeds(tmp_path, monkeypatch):
    """Counts exactly, early stops and masks nearly: the command trains them as one and each file is its own."""
    made = []
    inner = fleets.Fleet.__init__

    def noted(self, some, *rest, **named):
        made.append(len(some))
        inner(self, some, *rest, **named)

    monkeypatch.setattr(fleets.Fleet, "__init__", noted)
    recipe = recipes(1)[0]
    search = fastlth.run(recipe, out=tmp_path / "together", replicates=3)
    assert made == [3]
    for r, replicate in enumerate(search.replicates):
        one = dataclasses.replace(recipe, seeds=dataclasses.replace(recipe.seeds, base=r))
        single = fastlth.run(one, out=tmp_path / "alone")
        assert made == [3]
        ours, theirs = (fastlth.load_ticket(s.ticket).file for s in (replicate, single))
        assert_same_bits(*({n: torch.from_numpy(a) for n, a in t.rewind.items()} for t in (ours, theirs)))
        for a, b in zip(ours.rounds, theirs.rounds, strict=True):
            assert (a["kept"], a["density"], a["engine"]) == (b["kept"], b["density"], b["engine"])
            assert a["early_stop_validation_loss"] == pytest.approx(b["early_stop_validation_loss"], rel=1e-2)
        masks = [torch.cat([torch.from_numpy(at).view(-1) for at in t.pruned_at.values()]) for t in (ours, theirs)]
        assert float((masks[0] != masks[1]).double().mean()) < 0.01
    again = fastlth.run(recipe, out=tmp_path / "together", replicates=3)
    assert again.rounds == search.rounds and made == [3]


def test_a_stop_saves_all_and_the_same_command_goes_on(tmp_path):
    recipe = recipes(1)[0]
    whole = fastlth.run(recipe, out=tmp_path / "whole", replicates=2)
    asked = []

    def stop():
        asked.append(1)
        return 15 if len(asked) > 5 else None

    with pytest.raises(fastlth.errors.Stopped):
        fastlth.run(recipe, out=tmp_path / "cut", replicates=2, stopped=stop)
    again = fastlth.run(recipe, out=tmp_path / "cut", replicates=2)
    timing = ("seconds", "images_per_second")
    assert [{k: v for k, v in r.items() if k not in timing} for r in again.rounds] == [
        {k: v for k, v in r.items() if k not in timing} for r in whole.rounds
    ]


@pytest.mark.parametrize("model", ["lenet-300-100", "conv-2"])
def test_nothing_in_a_step_or_an_evaluation_is_read_by_the_host(model):
    fleet = Fleet(recipes(2, model), random_source("digits"))

    def both():
        with FakeTensorMode(allow_non_fake_inputs=True):
            fleet.train_step(48)
            fleet.evaluation_step(64)

    both()
    inner = fleet._loss_and_hits
    fleet._loss_and_hits = lambda *inputs: ((r := inner(*inputs))[0] * r[0].sum().item(), r[1])
    with pytest.raises(DataDependentOutputException):
        both()


def test_who_is_trained_as_one():
    assert fleets.unsupported(recipes(1)[0]) is None
    assert fleets.unsupported(small_recipe("conv-2", "digits")) is None
    assert fleets.unsupported(small_recipe("lenet-5", "mnist")) is None
    assert "vgg11 is not a stack" in str(fleets.unsupported(small_recipe("vgg11", "cifar-10", data__augment="none")))
    normed = small_recipe("conv-2", "digits", model__batch_norm=True)
    assert "conv-2 is not a stack" in str(fleets.unsupported(normed))
    assert "not a stack" in str(fleets.unsupported(small_recipe(model__dropout=0.5)))
    masked = small_recipe("conv-2", "digits", compute__kernels="triton")
    assert "--kernels triton" in str(fleets.unsupported(masked))
    assert "augment" in str(fleets.unsupported(small_recipe(data__augment="flip-crop")))
    assert "early_bird" in str(fleets.unsupported(small_recipe(prune__early_bird=0.1, train__batch_size=256)))
    assert compute(recipes(1)[0]).engine == "graph"
