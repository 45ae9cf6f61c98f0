"""Dropout: what is dropped follows from the seed alone, in every model, stopped or not, compiled or not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fastlth_kernels.philox import philox
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastlth.catalogue import MODELS
from fastlth.models import build, skeleton
from fastlth.models.dropout import Dropout, DroppedLinear
from fastlth.search import InRound, RoundFinished, find_tickets
from fastlth.training.engines.make import make_engine
from fastlth.training.trainer import ChunkDone
from tests.helpers import assert_same_bits, compute, random_source, small_recipe

KEY = (3, 6)


def at(rate, epoch, position, layer=2, key=KEY):
    dropout = Dropout(rate, layer, key).train()
    dropout.keyed = True
    dropout.place.copy_(torch.tensor([epoch, position]))
    return dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("units", [1, 4, 7])
def test_every_unit_is_dropped_by_its_own_word(rate, units):
    """Against Philox on plain integers, one element at a time."""
    x = torch.arange(1.0, 5 * units + 1).view(5, units)
    out = at(rate, 4, 120)(x)
    for row in range(5):
        for unit in range(units):
            word = philox(120 + row, unit // 4, 4, 2, KEY)[unit % 4]
            expected = float(x[row, unit]) / (1 - rate) if word >= rate * 2**32 else 0.0
            assert float(out[row, unit]) == pytest.approx(expected, rel=1e-6)


def test_the_share_is_right_and_places_layers_epochs_and_seeds_differ():
    ones = torch.ones(400, 300)
    for rate in (0.2, 0.5, 0.75):
        out = at(rate, 0, 0)(ones)
        assert float((out == 0).double().mean()) == pytest.approx(rate, abs=0.01)
        assert float(out.mean()) == pytest.approx(1.0, abs=0.02)
    base = at(0.5, 0, 0)(ones)
    others = [at(0.5, 1, 0), at(0.5, 0, 400), at(0.5, 0, 0, layer=3), at(0.5, 0, 0, key=(4, 6))]
    for other in others:
        assert float((other(ones) == base).double().mean()) == pytest.approx(0.5, abs=0.01)
    # a batch is a stretch of the epoch's order: where it begins changes nothing
    assert torch.equal(at(0.5, 0, 100)(ones[100:]), base[100:])


def test_features_of_any_shape_are_dropped_as_a_row_of_them():
    x = torch.randn(6, 3, 5)
    assert torch.equal(at(0.5, 1, 7)(x), at(0.5, 1, 7)(x.flatten(1)).view(x.shape))


def test_gradients_pass_where_values_do():
    x = torch.ones(6, 8, requires_grad=True)
    out = at(0.5, 0, 0)(x)
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, out.detach())


def test_evaluation_drops_nothing_and_anothers_loop_gets_torchs_dropout():
    x = torch.randn(50, 40)
    assert torch.equal(at(0.5, 0, 0).eval()(x), x)
    own = Dropout(0.5, 1, KEY).train()
    torch.manual_seed(0)
    expected = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(own(x), expected) and not torch.equal(own(x), own(x))


WHERE = {
    "lenet-300-100": ["fc2", "output"],
    "lenet-5": ["fc2", "output"],
    "conv-2": ["fc2", "output"],
    "conv-4": ["fc2", "output"],
    "conv-6": ["fc2", "output"],
    **{name: ["output"] for name in MODELS if name.startswith(("vgg", "resnet"))},
}


def test_every_model_has_it_and_nothing_else_changes():
    assert WHERE.keys() == set(MODELS)
    for name in MODELS:
        settings = {"train__iterations": 9, "train__batch_size": 8, "train__lr": 0.1, "data__validation": 64}
        plain = skeleton(small_recipe(name, "cifar-10", **settings))
        net = skeleton(small_recipe(name, "cifar-10", **settings, model__dropout=0.5))
        assert [n for n, m in net.named_modules() if isinstance(m, DroppedLinear)] == WHERE[name]
        assert [n for n, _ in net.named_parameters()] == [n for n, _ in plain.named_parameters()]
        assert list(net.state_dict()) == list(plain.state_dict())
        assert len({m.layer for m in net.modules() if isinstance(m, Dropout)}) == len(WHERE[name])


def test_theta0_and_the_digest_without_dropout_are_as_before():
    plain, dropped = small_recipe("conv-2"), small_recipe("conv-2", model__dropout=0.5)
    assert_same_bits(dict(build(plain).state_dict()), dict(build(dropped).state_dict()))
    assert small_recipe("conv-2", model__dropout=0.0).digest == plain.digest != dropped.digest
    assert plain.digest == small_recipe("conv-2").digest


def trained(recipe, steps, **changes):
    engine = make_engine(dataclasses.replace(recipe, compute=compute(recipe, **changes)), random_source("digits"))
    engine.rewind({n: t.clone() for n, t in engine.weights().items()})
    for first, last in steps:
        engine.run(first, last)
    return engine


def test_a_step_is_keyed_by_its_place_in_the_data():
    """Two steps by hand with torch's autograd, dropping what Philox says."""
    recipe = small_recipe(model__dropout=0.5, train__optimizer="sgd", train__lr=0.1)
    engine = trained(recipe, [(0, 2)])
    net = build(recipe)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    from fastlth.data.normalise import normalise, table

    for batch in engine._loader.batches(0, 2):
        x = normalise(batch.images, table("digits", "mean-std")).flatten(1)
        x = torch.relu(torch.nn.functional.linear(x, net.fc1.weight, net.fc1.bias))
        for layer, linear in ((0, net.fc2), (1, net.output)):
            words = [
                [philox(batch.position + r, u // 4, batch.epoch, layer, (0, 6))[u % 4] for u in range(x.shape[1])]
                for r in range(len(x))
            ]
            x = x * (torch.tensor(words) >= 2**31) * 2
            x = torch.nn.functional.linear(x, linear.weight, linear.bias)
            x = torch.relu(x) if layer == 0 else x
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(x, batch.labels).backward()
        optimizer.step()
    for name, value in net.named_parameters():
        assert float((engine.weights()[name] - value).detach().norm() / value.detach().norm()) < 1e-5, name


def test_where_a_chunk_ends_and_torchs_own_generator_change_nothing():
    recipe = small_recipe(model__dropout=0.5)
    torch.manual_seed(1)
    a = trained(recipe, [(0, 9)]).weights()
    torch.manual_seed(2)
    b = trained(recipe, [(0, 1), (1, 5), (5, 9)]).weights()
    assert_same_bits(a, b)
    c = trained(small_recipe(model__dropout=0.5, seeds__dropout=9), [(0, 9)]).weights()
    assert not torch.equal(a["fc2.weight"], c["fc2.weight"])


def test_a_search_with_dropout_goes_on_bit_for_bit(monkeypatch):
    monkeypatch.setattr("fastlth.training.trainer.CHUNK_SECONDS", 1e-9)
    recipe = small_recipe(model__dropout=0.5, prune__rounds=1, train__iterations=12)
    source = random_source("digits")

    def search(**resume):
        return list(find_tickets(recipe, source, compute(recipe), **resume))

    whole = search()
    ticket = state = None
    for event in find_tickets(recipe, source, compute(recipe)):
        if isinstance(event, RoundFinished):
            ticket = event.ticket
        if isinstance(event, InRound) and event.round == 1 and event.event == ChunkDone(5):
            state = event.state()
            break
    tail = search(ticket=ticket, state=state)
    for name, at_ in whole[-1].ticket.pruned_at.items():
        assert (tail[-1].ticket.pruned_at[name] == at_).all()
    assert tail[-1].result["early_stop_validation_loss"] == whole[-1].result["early_stop_validation_loss"]


def test_the_host_reads_nothing():
    recipe = small_recipe("conv-2", "digits", model__dropout=0.5)
    engine = trained(recipe, [(0, 1)])
    batch = next(iter(engine._loader.batches(0, 1)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        engine._step(batch)
    inner = Dropout.forward
    try:
        Dropout.forward = lambda self, x: inner(self, x) * self.place[0].item()
        with pytest.raises(DataDependentOutputException), FakeTensorMode(allow_non_fake_inputs=True):
            engine._step(batch)
    finally:
        Dropout.forward = inner


@pytest.mark.slow
def test_compiled_steps_drop_the_same_units():
    """One graph (fullgraph), and the weights of eager steps."""
    recipe = small_recipe(model__dropout=0.5, train__optimizer="sgd", train__lr=0.05)
    eager = trained(recipe, [(0, 8)]).weights()
    engine = trained(recipe, [(0, 2)], compile="on")
    torch.compiler.set_stance("fail_on_recompile")
    try:
        engine.run(2, 8)
    finally:
        torch.compiler.set_stance("default")
    for name, value in engine.weights().items():
        assert float((value - eager[name]).norm() / eager[name].norm()) < 1e-5, name
