"""The sparse engine: the dense engine's results, whatever runs from kept weights alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fastlth.errors import DeviceError, RecipeError
from fastlth.search import InRound, RoundFinished, find_tickets
from fastlth.training import available, resolve
from fastlth.training.engines import sparse
from fastlth.training.engines.make import make_engine
from fastlth.training.lines import Line
from fastlth.training.trainer import ChunkDone
from tests.helpers import (
    assert_close_by_norm,
    assert_masked,
    assert_same_bits,
    compute,
    half_masks,
    random_source,
    small_recipe,
)  # fmt: skip

LIMITS = {"kept": 1.0, "dense": 0.0, "mixed": 0.45}


def sparse_recipe(kind="kept", model="lenet-300-100", **settings):
    given = {"compute__engine": "sparse", "compute__break_even": LIMITS[kind], "compute__threads": 2, **settings}
    return small_recipe(model, "digits", **given)


def pair(kind, density=0.5, **settings):
    """The sparse engine and the dense one, with the same masks, ready to train."""
    recipe, source = sparse_recipe(kind, **settings), random_source("digits")
    engines = []
    for choice in ("sparse", "dense"):
        engine = make_engine(dataclasses.replace(recipe, compute=compute(recipe, engine=choice)), source)
        start = {n: t.clone() for n, t in engine.weights().items()}
        masks = half_masks({n: start[n] for n in engine.weight_names}, density)
        if kind == "mixed":
            masks[engine.weight_names[1]] = half_masks({"": start[engine.weight_names[1]]}, 0.3)[""]
        engine.set_masks(masks)
        engine.rewind(start)
        engines.append(engine)
    return *engines, masks


def copies(tensors):
    return {n: t.clone() for n, t in tensors.items()}


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_ten_steps_equal_the_dense_engine(kind, optimizer):
    more = {"train__momentum": 0.9, "train__nesterov": True} if optimizer == "sgd" else {}
    ours, theirs, masks = pair(kind, train__optimizer=optimizer, train__weight_decay=1e-3, schedule__warmup=4, **more)
    assert set(ours.layers.values()) == ({"kept", "dense"} if kind == "mixed" else {kind})
    ours.run(0, 10)
    theirs.run(0, 10)
    assert_masked(ours.weights(), masks)
    for name, weight in theirs.weights().items():
        assert_close_by_norm(ours.weights()[name], weight, 1e-4)
    assert ours.interval().loss == pytest.approx(theirs.interval().loss, rel=1e-5)
    for split in ("train", "validation", "test"):
        a, b = ours.evaluate(split), theirs.evaluate(split)
        assert (a.loss, a.accuracy) == (pytest.approx(b.loss, rel=1e-4), b.accuracy)
    assert ours.evaluate("train", 33) == ours.evaluate("train", 33) != ours.evaluate("train", 34)


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("model", ["lenet-25-9", "lenet-50-17", "lenet-1-1"])
def test_nets_of_any_width_equal_the_dense_engine(kind, model):
    """Layers narrower than a vector, a tile and the number of threads; 1-1 may lose a whole layer."""
    ours, theirs, masks = pair(kind, model=model)
    ours.run(0, 10)
    theirs.run(0, 10)
    assert_masked(ours.weights(), masks)
    for name, weight in theirs.weights().items():
        assert torch.allclose(ours.weights()[name], weight, rtol=1e-3, atol=1e-5), name
    a, b = ours.evaluate("test"), theirs.evaluate("test")
    assert (a.loss, a.accuracy) == (pytest.approx(b.loss, rel=1e-4), b.accuracy)


@pytest.mark.parametrize("kind", LIMITS)
def test_chunks_change_no_bit(kind):
    (whole, *_), (parts, *_) = pair(kind), pair(kind)
    whole.run(0, 10)
    for first, last in ((0, 1), (1, 4), (4, 10)):
        parts.run(first, last)
    assert_same_bits(whole.state(), parts.state())
    assert whole.interval() == parts.interval()


@pytest.mark.parametrize("kind", LIMITS)
def test_a_state_goes_on_where_it_was_taken(kind):
    engine, _, _ = pair(kind)
    engine.run(0, 7)
    saved = copies(engine.state())
    engine.run(7, 10)
    other, _, _ = pair(kind)
    other.load_state(saved)
    other.run(7, 10)
    assert_same_bits(engine.state(), other.state())
    assert engine.interval() == other.interval()


def test_a_state_of_the_dense_engine_fits():
    ours, theirs, _ = pair("kept", train__optimizer="adam")
    theirs.run(0, 7)
    assert ours.state().keys() == theirs.state().keys()
    ours.load_state(copies(theirs.state()))
    assert_same_bits(ours.state(), theirs.state())
    ours.run(7, 10)
    theirs.run(7, 10)
    for name, weight in theirs.weights().items():
        assert_close_by_norm(ours.weights()[name], weight, 1e-4)


def test_rewinding_restores_weights_and_forgets_the_optimizer():
    engine, _, masks = pair("mixed")
    start = copies(engine.weights())
    fresh = copies(engine.state())
    engine.run(0, 10)
    engine.rewind(start)
    assert_same_bits(engine.state() | {"interval/losses": fresh["interval/losses"],
                                       "interval/hits": fresh["interval/hits"],
                                       "interval/images": fresh["interval/images"]}, fresh)  # fmt: skip
    assert_masked(engine.weights(), masks)


def test_partial_batches_and_epochs_are_those_of_the_order():
    settings = {"train__drop_last": False, "train__batch_size": 48}  # 256 images: the last batch has 16
    ours, theirs, _ = pair("kept", **settings)
    ours.run(3, 9)
    theirs.run(3, 9)
    assert ours._record.images[:6].tolist() == [48, 48, 16, 48, 48, 48] == theirs._record.images[:6].tolist()
    assert ours._record.hits[:6].tolist() == theirs._record.hits[:6].tolist()
    torch.testing.assert_close(ours._record.losses[:6], theirs._record.losses[:6], rtol=1e-4, atol=0)


@pytest.mark.parametrize("rewind_to", [0, 10])
def test_a_search_keeps_its_promises_and_goes_on_from_any_chunk(rewind_to):
    recipe, source = sparse_recipe("mixed", prune__rounds=3, prune__rewind_to=rewind_to), random_source("digits")
    states, rounds = [], []
    for event in find_tickets(recipe, source, recipe.compute):
        if isinstance(event, InRound) and isinstance(event.event, ChunkDone):
            states.append((len(rounds), event.state()))
        elif isinstance(event, RoundFinished):
            rounds.append(event)
    assert [r.result["layers"]["fc1"] for r in rounds] == ["dense", "dense", "dense", "dense"]
    assert rounds[-1].result["engine"] == "sparse"
    at = len(states) // 2 + 1
    finished, state = states[at]
    again = list(find_tickets(recipe, source, recipe.compute, ticket=rounds[finished - 1].ticket if finished else None,
                              state=state))  # fmt: skip
    last = [e for e in again if isinstance(e, RoundFinished)][-1]
    for name, at in rounds[-1].ticket.pruned_at.items():
        assert np.array_equal(at, last.ticket.pruned_at[name])
    timing = ("seconds", "images_per_second")
    assert [{k: v for k, v in r.items() if k not in timing} for r in rounds[-1].ticket.rounds] == [
        {k: v for k, v in r.items() if k not in timing} for r in last.ticket.rounds
    ]


@pytest.mark.parametrize(("settings", "reason"), [
    ({"model": "conv-2"}, "conv-2 is not a stack"),
    ({"model": "conv-2", "model__dropout": 0.5}, "conv-2 is not a stack"),  # dropout is not all that is in the way
    ({"model__dropout": 0.5}, "cannot train this: model.dropout is 0.5"),
    ({"compute__precision": "bf16"}, "compute.precision is bf16"),
    ({"compute__loader": "ffcv"}, "compute.loader is ffcv"),
    ({"data__augment": "flip-crop"}, "data.augment is flip-crop"),
])  # fmt: skip
def test_what_it_cannot_train_is_refused_with_the_reason(settings, reason):
    model = settings.pop("model", "lenet-300-100")
    recipe = small_recipe(model, "digits", compute__engine="sparse", **settings)
    with pytest.raises(RecipeError, match=reason):
        available.engine(recipe)
    auto = dataclasses.replace(recipe, compute=compute(recipe, engine="auto"))
    assert available.engine(auto) == "dense"


def test_colour_images_are_read_channel_by_channel():
    recipe = small_recipe("lenet-300-100", "cifar-10", compute__engine="sparse", compute__break_even=1.0)
    engines = [make_engine(dataclasses.replace(recipe, compute=compute(recipe, engine=choice)), random_source())
               for choice in ("sparse", "dense")]  # fmt: skip
    a, b = (engine.evaluate("test") for engine in engines)
    assert a.loss == pytest.approx(b.loss, rel=1e-5)


def test_numbers_of_every_normalisation_are_those_of_the_table():
    for mode in ("mean-std", "unit", "half"):
        recipe = sparse_recipe(data__normalise=mode)
        scale, shift = sparse._affine(recipe, 64)
        levels = np.arange(256, dtype=np.float32) * scale[:1].astype(np.float32) + shift[:1].astype(np.float32)
        table = sparse.table("digits", mode)[0].numpy()
        assert np.abs(levels - table).max() <= 2 * np.spacing(np.abs(table).max())


@pytest.mark.parametrize(("speeds", "expected"), [
    ({"sparse 2": 3.0, "sparse 1": 2.0, "dense": 1.0}, ("sparse", 2, 0.28)),
    ({"sparse 2": 1.0, "sparse 1": 2.0, "dense": 1.5}, ("sparse", 2, 0.28)),
    ({"sparse 2": 1.0, "sparse 1": 2.0, "dense": 3.0}, ("dense", 2, 0.0)),
])  # fmt: skip
def test_auto_takes_the_fastest(speeds, expected, monkeypatch):
    recipe = sparse_recipe(compute__engine="auto", compute__threads=0, compute__break_even=-1.0)

    def measure(recipe, candidates, make_engine, *, calls=3, density=1.0):
        return {c: speeds[f"sparse {c.threads}" if c.engine == "sparse" else "dense"] for c in candidates}

    found = {2: Line(2.57, (2.4, 3.0, 3.6)), 1: Line(9.0, (2.3, 3.5, 4.7))}
    monkeypatch.setattr(resolve, "_measure", measure)
    monkeypatch.setattr(resolve, "_lines", lambda *_: found)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    chosen = resolve.resolve(recipe, lambda _: None).compute
    assert (chosen.engine, chosen.threads, chosen.break_even) == expected


@pytest.mark.parametrize(("rounds", "threads"), [(1, 2), (12, 1)])
def test_threads_are_those_of_the_fastest_search(rounds, threads, monkeypatch):
    recipe = sparse_recipe(compute__engine="sparse", compute__threads=0, compute__break_even=-1.0, prune__rounds=rounds)
    monkeypatch.setattr(resolve, "_measure", lambda _, candidates, *__, **___: dict.fromkeys(candidates, 1.0))
    # two are faster while dense, one alone later on
    found = {2: Line(1.0, (0.6, 0.9, 1.2)), 1: Line(1.1, (0.3, 0.8, 1.3))}
    monkeypatch.setattr(resolve, "_lines", lambda *_: found)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    took = {t: sum(found[t].seconds(0.8**k) for k in range(rounds + 1)) for t in found}
    assert resolve.resolve(recipe, lambda _: None).compute.threads == threads == min(took, key=took.__getitem__)


@pytest.mark.parametrize(("asked", "expected"), [({"threads": 2}, (2, 0.2)), ({"break_even": 0.9}, (1, 0.9)),
                                                 ({"threads": 2, "break_even": 0.9}, (2, 0.9))])  # fmt: skip
def test_what_was_asked_for_is_taken(asked, expected, monkeypatch):
    settings = {"threads": 0, "break_even": -1.0, **asked}
    recipe = sparse_recipe(compute__engine="sparse", **{f"compute__{k}": v for k, v in settings.items()})
    monkeypatch.setattr(resolve, "_measure", lambda _, candidates, *__, **___: dict.fromkeys(candidates, 1.0))
    found = {2: Line(2.0, (2.0, 4.0, 6.0)), 1: Line(1.0, (1.0, 2.0, 3.0))}
    monkeypatch.setattr(resolve, "_lines", lambda _, __, counts, ___: {t: found[t] for t in counts})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    chosen = resolve.resolve(recipe, lambda _: None).compute
    assert (chosen.threads, chosen.break_even) == expected


def test_an_engine_is_timed_over_as_many_steps_as_take_ten_milliseconds(monkeypatch):
    """A call takes 2 ms before its first step: of one step, it says nothing."""
    now, calls = [0.0], []

    class Slow:
        def interval(self):
            pass

        def run(self, first, last):
            now[0] += 0.002 + 0.0001 * (last - first)
            calls.append(last - first)

    monkeypatch.setattr(resolve.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(resolve.time, "sleep", lambda _: None)
    recipe = small_recipe("lenet-300-100", "digits", evaluate__every=100, train__iterations=1000)
    rates = resolve._measure(recipe, [recipe.compute], lambda _: Slow())
    assert calls[-1] == 100 or 0.002 + 0.0001 * calls[-1] >= resolve.CALL_SECONDS
    assert rates[recipe.compute] > 0.7 * recipe.train.batch_size / 0.0001


def test_lines_are_of_the_steps_that_were_measured(monkeypatch):
    recipe = sparse_recipe()
    took = {(2, 0.0): 5.0, (1, 0.0): 8.0, (2, 1.0): 3.0, (1, 1.0): 2.0}

    def measure(recipe, candidates, make_engine, *, density):
        return {c: recipe.train.batch_size / (took[c.threads, c.break_even] * (density if c.break_even else 1))
                for c in candidates}  # fmt: skip

    monkeypatch.setattr(resolve, "_measure", measure)
    found = resolve._lines(recipe, recipe.compute, [2, 1], lambda _: None)
    assert found[2].dense == pytest.approx(5.0) and found[2].kept == pytest.approx((0.6, 1.5, 2.4))
    assert found[1].dense == pytest.approx(8.0) and found[1].kept == pytest.approx((0.4, 1.0, 1.6))


@pytest.mark.parametrize(("kept", "dense", "crossing"), [
    ((0.3, 0.6, 0.9), 0.505, 0.4), ((0.3, 0.6, 1.2), 0.805, 0.6), ((1.2, 3.0, 4.8), 9.0, 0.99),
    ((0.8, 0.9, 1.0), 0.1, 0.0),
    ((0.6, 0.5, 0.4), 0.7, 0.99),
])  # fmt: skip
def test_the_break_even_is_where_two_lines_cross(kept, dense, crossing):
    assert Line(dense, kept).break_even == pytest.approx(crossing)


def test_auto_on_a_gpu_that_is_not_there_is_a_device_error():
    with pytest.raises(DeviceError):
        available.engine(sparse_recipe(compute__engine="auto", compute__device="cuda:7"))


def test_a_resolved_choice_really_trains():
    recipe = sparse_recipe(compute__engine="auto", compute__break_even=-1.0)
    source = random_source("digits")
    resolved = resolve.resolve(recipe, lambda candidate: make_engine(candidate, source))
    assert resolved.compute.engine in ("sparse", "dense")
    open_yet = [name for name, value in dataclasses.asdict(resolved.compute).items() if value == "auto"]
    assert open_yet == ["together"]  # decided when there are replicates
    make_engine(dataclasses.replace(recipe, compute=resolved.compute), source).run(0, 2)
