"""Scores before training, each against a tiny definition of its own: numeric derivatives and closed forms, float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlth.pruning import at_init, budget


def tiny(norm: bool = False, seed: int = 0) -> nn.Sequential:
    """5 inputs, 4 and 3 units, with values that no two weights share."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    if norm:
        conv = nn.Conv2d(1, 4, 3, bias=False)
        net = nn.Sequential(conv, nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    return net


NAMES = ["1.weight", "3.weight"]


def batch(shape=(1, 1, 5), count=7):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *shape, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def loss_of(net, images, labels, temperature=1.0):
    """Mean cross-entropy, written out, as a function of the weights in place."""
    logits = net(images.double()) / temperature
    return float((logits.logsumexp(1) - logits[torch.arange(len(labels)), labels]).mean().detach())


def shifted(net, name, index, by):
    weight = dict(net.named_parameters())[name]
    with torch.no_grad():
        weight.view(-1)[index] += by


def derivative(net, name, index, function, eps=1e-5):
    shifted(net, name, index, eps)
    above = function()
    shifted(net, name, index, -2 * eps)
    below = function()
    shifted(net, name, index, eps)
    return (above - below) / (2 * eps)


class Unused(nn.Module):
    """With a layer that no output depends on."""

    def __init__(self):
        super().__init__()
        self.spare, self.used = nn.Linear(5, 4), tiny()

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_a_layer_that_the_net_does_not_use_scores_nothing(method):
    torch.manual_seed(0)
    net, names = Unused(), ["spare.weight", *(f"used.{n}" for n in NAMES)]
    scores = getattr(at_init, method)(net, names, *batch())
    alone = getattr(at_init, method)(net.used, NAMES, *batch())
    assert not scores["spare.weight"].any()
    assert all(torch.equal(scores[f"used.{n}"], alone[n]) for n in NAMES)


def test_synflow_prunes_an_unused_layer_first():
    torch.manual_seed(0)
    names = ["spare.weight", *(f"used.{n}" for n in NAMES)]
    masks = at_init.synflow(Unused(), [(names, 30)], (1, 1, 5), numbers={n: i for i, n in enumerate(names)}, key=(0, 0))
    assert not masks["spare.weight"].any() and sum(int(m.sum()) for m in masks.values()) == 30


def test_no_part_of_the_images_is_too_small_for_batch_norm():
    """101 images are two parts of about as many, and not 100 and one."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    images, labels = batch(count=101)
    scores = at_init.snip(net, ["1.weight"], images, labels)["1.weight"]
    whole, weight = net.double().train(), net[1].weight
    parts = [(images[:51], labels[:51]), (images[51:], labels[51:])]
    loss = sum(F.cross_entropy(whole(x.double()), y, reduction="sum") for x, y in parts) / 101
    (slope,) = torch.autograd.grad(loss, [weight])
    torch.testing.assert_close(scores, (weight * slope).abs().detach())


def test_snip_is_the_reaction_of_the_loss_to_scaling_a_weight():
    net = tiny()
    images, labels = batch()
    scores = at_init.snip(net, NAMES, images, labels)
    exact = tiny().double()
    for name in NAMES:
        weight = dict(exact.named_parameters())[name].detach()
        for i in range(weight.numel()):
            slope = derivative(exact, name, i, lambda: loss_of(exact, images, labels))
            assert float(scores[name].view(-1)[i]) == pytest.approx(abs(float(weight.view(-1)[i]) * slope), rel=1e-5)


def test_snip_normalises_batches_and_leaves_the_net_alone():
    net = tiny(norm=True)
    images, labels = batch((1, 4, 4))
    before = {n: t.clone() for n, t in net.state_dict().items()}
    scores = at_init.snip(net.eval(), ["0.weight"], images, labels)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items()) and not net.training
    exact = tiny(norm=True).double().train()
    slope = derivative(exact, "0.weight", 0, lambda: loss_of(exact, images, labels))
    weight = float(exact[0].weight.detach().view(-1)[0])
    assert float(scores["0.weight"].view(-1)[0]) == pytest.approx(abs(weight * slope), rel=1e-5)


def test_scores_are_taken_without_dropout():
    images, labels = batch()
    plain = at_init.snip(tiny(), NAMES, images, labels)
    dropped = tiny()
    dropped.add_module("late", nn.Dropout(0.9))
    assert all(torch.equal(at_init.snip(dropped, NAMES, images, labels)[n], plain[n]) for n in NAMES)


class Dropping(nn.Module):
    """Drops by a function, which only the module's own mode tells not to."""

    def __init__(self):
        super().__init__()
        self.net = tiny()

    def forward(self, x):
        return F.dropout(self.net(x), 0.9, self.training)


@pytest.mark.parametrize("score", [at_init.snip, at_init.grasp])
def test_scores_are_taken_without_dropout_by_a_module_with_children_either(score):
    images, labels = batch()
    plain, dropped = score(tiny(), NAMES, images, labels), Dropping()
    dropped = score(dropped, [f"net.{n}" for n in NAMES], images, labels)
    assert all(torch.equal(dropped[f"net.{n}"], plain[n]) for n in NAMES)


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_grasp_is_weight_times_the_change_of_the_squared_gradient(temperature):
    """H g is half the gradient of |g|^2, here by differences of autograd's g; only the scored weights count in g."""
    images, labels = batch()
    scores = at_init.grasp(tiny(), NAMES, images, labels, temperature=temperature)
    exact = tiny().double()
    weights = [dict(exact.named_parameters())[n] for n in NAMES]

    def squared():
        slopes = torch.autograd.grad(F.cross_entropy(exact(images.double()) / temperature, labels), weights)
        return float(sum((g * g).sum() for g in slopes))

    for name, weight in zip(NAMES, weights, strict=True):
        for i in range(weight.numel()):
            expected = float(weight.detach().view(-1)[i]) * derivative(exact, name, i, squared) / 2
            assert float(scores[name].view(-1)[i]) == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_grasp_removes_what_its_paper_removes():
    """The paper's score is -w (H g); the highest go."""
    images, labels = batch()
    scores = at_init.grasp(tiny(), NAMES, images, labels)
    masks = budget.keep_highest(scores, [(NAMES, 9)], numbers={n: i for i, n in enumerate(NAMES)}, round=0, key=(0, 7))
    paper = torch.cat([-scores[n].flatten() for n in NAMES])
    removed = ~torch.cat([masks[n].flatten() for n in NAMES])
    assert int((~removed).sum()) == 9
    assert float(paper[removed].min()) > float(paper[~removed].max())


@pytest.mark.parametrize("score", [at_init.snip, at_init.grasp])
def test_images_in_parts_are_the_images_at_once(score, monkeypatch):
    images, labels = batch()
    whole = score(tiny(), NAMES, images, labels)
    monkeypatch.setattr(at_init, "PART", 3)
    calls = []
    parts = score(tiny(), NAMES, images, labels, between=lambda: calls.append(0))
    assert len(calls) == (3 if score is at_init.snip else 6)
    for name in NAMES:
        assert float(whole[name].abs().min()) > 0
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("score", [at_init.snip, at_init.grasp])
def test_batch_norm_sees_one_part_at_a_time(score, monkeypatch):
    images, labels = batch((1, 4, 4))
    monkeypatch.setattr(at_init, "PART", 4)
    more = {} if score is at_init.snip else {"temperature": 1.0}
    scores = score(tiny(norm=True), ["0.weight"], images, labels, **more)["0.weight"]
    exact = tiny(norm=True).double().train()
    weight = exact[0].weight

    def loss():
        first, second = (exact(images[a:b].double()) for a, b in ((0, 4), (4, 7)))
        return F.cross_entropy(torch.cat([first, second]), labels)

    def value():
        return float(loss().detach())

    def squared():
        return float(torch.autograd.grad(loss(), [weight])[0].square().sum())

    for i, w in enumerate(weight.detach().clone().view(-1).tolist()):
        if score is at_init.snip:
            expected = abs(w * derivative(exact, "0.weight", i, value))
        else:
            expected = w * derivative(exact, "0.weight", i, squared) / 2
        assert float(scores.view(-1)[i]) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def synflow_by_hand(first, second, kept, steps):
    """Two linear layers, all in numpy: the score of an edge is the sum of the products over the paths through it."""
    a, b = np.abs(first).astype(float), np.abs(second).astype(float)
    size = a.size + b.size
    for step in range(1, steps + 1):
        into, out = a.sum(1), b.sum(0)  # what reaches a hidden unit from ones, and what leaves it
        scores = np.concatenate([(a * out[:, None]).ravel(), (b * into[None, :]).ravel()])
        alive = np.concatenate([a.ravel(), b.ravel()]) != 0
        left = kept if step == steps else max(kept, round(size * (kept / size) ** (step / steps)))
        order = [i for i in np.argsort(scores, kind="stable") if alive[i]]
        for i in order[: alive.sum() - left]:
            if i < a.size:
                a.ravel()[i] = 0
            else:
                b.ravel()[i - a.size] = 0
    return a != 0, b != 0


@pytest.mark.parametrize(("kept", "steps"), [(16, 1), (16, 100), (8, 100), (31, 100), (3, 100)])
def test_synflow_is_paths_pruned_a_little_at_a_time(kept, steps):
    net = tiny()
    with torch.no_grad():
        net[1].bias.zero_()
        net[3].bias.zero_()
    linear = nn.Sequential(net[0], net[1], nn.ReLU(), net[3])
    masks = at_init.synflow(linear, [(NAMES, kept)], (1, 1, 5), numbers={n: i for i, n in enumerate(NAMES)},
                            key=(0, 7), steps=steps)  # fmt: skip
    first, second = synflow_by_hand(net[1].weight.detach().numpy(), net[3].weight.detach().numpy(), kept, steps)
    assert sum(int(m.sum()) for m in masks.values()) == kept
    assert (masks["1.weight"].numpy() == first).all() and (masks["3.weight"].numpy() == second).all()


def test_synflow_cuts_no_layer_off_where_one_step_does():
    """What the hundred steps are for (Tanaka et al. 2020, figure 1): a wide layer after a narrow one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(300, 10, bias=False), nn.ReLU(), nn.Linear(10, 300, bias=False),
                        nn.ReLU(), nn.Linear(300, 2, bias=False))  # fmt: skip
    names = ["1.weight", "3.weight", "5.weight"]
    numbers = {n: i for i, n in enumerate(names)}
    hundred = at_init.synflow(net, [(names, 12)], (1, 1, 300), numbers=numbers, key=(0, 7))
    assert all(m.any() for m in hundred.values())
    one = at_init.synflow(net, [(names, 12)], (1, 1, 300), numbers=numbers, key=(0, 7), steps=1)
    assert not all(m.any() for m in one.values())


def test_synflow_of_batch_norm_is_that_of_the_scaled_weights_it_amounts_to():
    """A negative scale counts like a positive one, and running statistics are used, not the batch's."""
    scale, variance = torch.tensor([-2.0, 1.0, 0.5, -1.0]), torch.tensor([1.0, 4.0, 1.0, 0.25])
    net, plain = tiny(norm=True), tiny(norm=True)
    with torch.no_grad():
        net[1].weight.copy_(scale)
        net[1].running_var.copy_(variance - net[1].eps)
        plain[0].weight.mul_((scale.abs() / variance.sqrt())[:, None, None, None])
        for model in (net, plain):
            model[4].bias.fill_(-0.3)  # biases count by their size too, but no score depends on the last one
    names, numbers = ["0.weight", "4.weight"], {"0.weight": 0, "4.weight": 1}
    with_norm = nn.Sequential(net[0], net[1], nn.ReLU(), net[3], net[4])
    without = nn.Sequential(plain[0], nn.Identity(), nn.ReLU(), plain[3], plain[4])
    for share in ([(names, 20)], [(["0.weight"], 9), (["4.weight"], 5)]):
        a = at_init.synflow(with_norm, share, (1, 4, 4), numbers=numbers, key=(0, 7))
        b = at_init.synflow(without, share, (1, 4, 4), numbers=numbers, key=(0, 7))
        assert all(torch.equal(a[n], b[n]) for n in names)
    assert [int(m.sum()) for m in a.values()] == [9, 5]


def test_magnitude():
    net = tiny()
    scores = at_init.magnitude(net, NAMES)
    assert all(torch.equal(scores[n], dict(net.named_parameters())[n].abs()) for n in NAMES)


def test_the_hundred_steps_are_an_exponential_schedule(monkeypatch):
    left = []
    inner = at_init.remove_lowest

    def counted(scores, masks, names, count, **more):
        new = inner(scores, masks, names, count, **more)
        left.append(sum(int(m.sum()) for m in new.values()))
        return new

    monkeypatch.setattr(at_init, "remove_lowest", counted)
    net = nn.Sequential(nn.Flatten(), nn.Linear(100, 50, bias=False), nn.ReLU(), nn.Linear(50, 10, bias=False))
    names = ["1.weight", "3.weight"]
    at_init.synflow(net, [(names, 55)], (1, 1, 100), numbers={n: i for i, n in enumerate(names)}, key=(0, 7))
    assert len(left) == 100 and left[-1] == 55
    assert left == [round(5_500 * math.pow(0.01, i / 100)) for i in range(1, 101)]
