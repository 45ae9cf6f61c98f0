"""The dense engine: state in and out, rewinding, recompilation, evaluation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastlth.data.normalise import normalise, table
from fastlth.models import build
from fastlth.search import RoundFinished, find_tickets
from fastlth.training import host
from fastlth.training.engines.make import make_engine
from tests.helpers import assert_masked, assert_same_bits, compute, half_masks, random_source, small_recipe


def copies(tensors):
    return {n: t.clone() for n, t in tensors.items()}


def conv_recipe(**settings):
    return small_recipe("conv-2", "digits", model__batch_norm=True, train__optimizer="sgd", train__momentum=0.9,
                        train__lr=0.05, **settings)  # fmt: skip


def test_chunks_change_no_bit():
    recipe, source = conv_recipe(), random_source("digits")
    whole, parts = make_engine(recipe, source), make_engine(recipe, source)
    whole.run(0, 10)
    for first, last in ((0, 1), (1, 4), (4, 10)):
        parts.run(first, last)
    assert_same_bits(whole.state(), parts.state())
    assert whole.interval() == parts.interval()


def test_a_state_goes_on_where_it_was_taken():
    recipe, source = conv_recipe(), random_source("digits")
    engine = make_engine(recipe, source)
    engine.run(0, 7)
    saved = copies(engine.state())
    engine.run(7, 10)
    other = make_engine(recipe, source)
    other.load_state(saved)
    other.run(7, 10)
    assert_same_bits(engine.state(), other.state())
    assert engine.interval() == other.interval()


def test_rewinding_restores_weights_biases_and_batch_norm_and_forgets_the_optimizer():
    engine = make_engine(conv_recipe(), random_source("digits"))
    masks = half_masks({n: engine.weights()[n] for n in engine.weight_names})
    theta0 = copies(engine.weights())
    names = {n.split(".")[-1] for n in theta0}
    assert {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"} <= names
    addresses = {n: t.data_ptr() for n, t in engine.state().items()}
    engine.run(0, 10)
    changed = [n for n, t in engine.weights().items() if not torch.equal(t, theta0[n])]
    assert any("running_var" in n for n in changed) and any("bias" in n for n in changed)
    engine.set_masks(masks)
    engine.rewind(theta0)
    expected = {n: torch.where(masks[n], t, 0.0) if n in masks else t for n, t in theta0.items()}
    assert_same_bits(engine.weights(), expected)
    assert all(not t.any() for n, t in engine.state().items() if n.startswith("optimizer/"))
    assert {n: t.data_ptr() for n, t in engine.state().items()} == addresses  # nothing is made anew


def test_evaluation_equals_a_plain_pass():
    recipe, source = conv_recipe(), random_source("digits", train=200, test=64)
    engine = make_engine(recipe, source)
    engine.run(0, 5)
    model = build(recipe)
    model.load_state_dict(engine.weights())
    model.eval().double()
    images = torch.from_numpy(source.test.pixels).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = model(normalise(images, table("digits", "mean-std")).double())
    labels = torch.from_numpy(source.test.labels)
    scores = engine.evaluate("test")
    assert scores.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert scores.accuracy == float((logits.argmax(1) == labels).double().mean())
    assert engine.model.training


def test_interval_is_the_mean_over_images_not_over_batches():
    recipe = conv_recipe(train__drop_last=False, train__batch_size=48)  # 256 images: the last batch has 16
    engine = make_engine(recipe, random_source("digits"))
    means, sizes = [], []
    with host.settings(recipe.compute.threads):
        for batch in engine._loader.batches(0, 6):
            loss, _ = engine._step(batch)
            means.append(float(loss))
            sizes.append(len(batch.labels))
    assert sizes == [48] * 5 + [16]
    other = make_engine(recipe, random_source("digits"))
    other.run(0, 6)
    assert other.interval().loss == pytest.approx(np.average(means, weights=sizes), rel=1e-12)


@pytest.mark.slow
def test_twenty_rounds_compile_once():
    """Masks, weights and learning rate change in place: one graph serves all rounds (two with a partial batch)."""
    from torch._dynamo.utils import counters

    recipe = small_recipe("conv-2", "digits", model__batch_norm=True, prune__rounds=20, train__iterations=12,
                          train__batch_size=48, train__drop_last=False, schedule__warmup=2,
                          data__augment="flip-crop")  # fmt: skip
    torch._dynamo.reset()
    counters.clear()
    events = find_tickets(recipe, random_source("digits"), compute(recipe, compile="on"))
    graphs = []
    previous = None
    for event in events:
        if isinstance(event, RoundFinished):
            graphs.append(counters["stats"]["unique_graphs"])
            masks = {n: torch.from_numpy(m) for n, m in event.ticket.mask(event.round).items()}
            if previous:
                assert all(not (masks[n] & ~previous[n]).any() for n in masks)
            previous = masks
            if event.round == 0:
                torch.compiler.set_stance("fail_on_recompile")
    torch.compiler.set_stance("default")
    assert len(graphs) == 21
    assert set(graphs) == {2}  # the whole batch and the last, smaller one
    assert counters["graph_break"] == {}


def test_compiled_steps_equal_eager_ones():
    recipe, source = conv_recipe(), random_source("digits")
    results = []
    for choice in ("off", "on"):
        torch._dynamo.reset()
        engine = make_engine(dataclasses.replace(recipe, compute=compute(recipe, compile=choice)), source)
        masks = half_masks({n: engine.weights()[n] for n in engine.weight_names})
        start = copies(engine.weights())
        engine.set_masks(masks)
        engine.rewind(start)
        engine.run(0, 10)
        assert_masked(engine.weights(), masks)
        results.append(torch.cat([t.double().reshape(-1) for n, t in engine.weights().items() if "weight" in n]))
    assert float((results[0] - results[1]).norm() / results[0].norm()) < 1e-4
