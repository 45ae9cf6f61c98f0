"""A ResNet through all of it: search, ticket, control runs, a compiled step, and what is printed about its kernels."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from fastlth import running
from fastlth.bench import kernels
from fastlth.bench.counts import step
from fastlth.composition import compose
from fastlth.exchange import matching
from fastlth.exchange.foreign import Foreign
from fastlth.experiments.branch import branch
from fastlth.experiments.control import Control
from fastlth.models import build, skeleton, weight_names
from fastlth.pruning import layer_rates
from fastlth.tickets import load_ticket
from fastlth.training.engines.make import make_engine
from tests.helpers import CPU, assert_masked, assert_same_bits, compute, half_masks, random_source, small_recipe

SCALE = {"*shortcut": 0.0, "output": 0.0}
SETTINGS = {
    "train__iterations": 3, "train__batch_size": 16, "evaluate__every": 3, "train__optimizer": "sgd", "train__lr": 0.05,
    "train__momentum": 0.9, "train__weight_decay": 1e-4, "prune__scope": "global", "prune__scale": SCALE,
    "compute__shifted": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    recipe = small_recipe("resnet-20", "digits", store__keep_weights="all", **SETTINGS)
    return running.run(recipe, out=tmp_path_factory.mktemp("runs"))


def test_a_search_prunes_all_3x3_convolutions_together_and_rewinds_the_rest(found):
    ticket = load_ticket(found.ticket)
    theta0 = {n: t.detach() for n, t in build(found.recipe).state_dict().items()}
    assert_same_bits(ticket.rewind(), theta0)
    whole = sum(m.numel() for m in ticket.mask(0).values())
    assert whole == 267_696 - 2 * 16 * 9  # digits have one channel
    kept = whole
    for k in (1, 2):
        kept -= math.floor(0.2 * kept)
        masks = ticket.mask(k)
        assert sum(int(m.sum()) for m in masks.values()) == kept == found.rounds[k]["kept"]
        assert found.rounds[k]["density"] == pytest.approx((kept + 2_560 + 640) / (whole + 2_560 + 640))
        assert not any(n.endswith("shortcut.weight") or n == "output.weight" for n in masks)
        shares = [float(m.double().mean()) for m in masks.values()]
        assert max(shares) - min(shares) > 0.05  # one ranking, not one per layer
        assert all((m <= before).all() for m, before in zip(masks.values(), ticket.mask(k - 1).values(), strict=True))


def test_a_ticket_is_a_net_again(found):
    ticket = load_ticket(found.ticket)
    net, masks = ticket.model(round=2), ticket.mask(2)
    assert_masked(dict(net.named_parameters()), masks)
    for name, value in ticket.rewind().items():
        kept = masks.get(name, torch.ones(value.shape, dtype=torch.bool))
        assert torch.equal(net.state_dict()[name], torch.where(kept, value, torch.zeros_like(value))), name
    assert net.eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_control_runs_go_with_it(found):
    path = found.replicates[0].path
    for control in (Control(kind="noise", sigma=0.5), Control(kind="random-prune", strategy="erk")):
        done = branch(path, control, rounds=[2], trials=1)
        assert done.trials[0]["density"] == pytest.approx(found.rounds[2]["density"])


def test_a_step_by_hand():
    """Two steps against torch's autograd and SGD on a net of its own, batch norm's statistics included."""
    from fastlth.data.normalise import normalise, table

    recipe = small_recipe("resnet-8", "digits", **SETTINGS)
    engine = make_engine(recipe, random_source("digits"))
    net = build(recipe).train()
    engine.rewind({n: t.clone() for n, t in engine.weights().items()})
    engine.run(0, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for batch in engine._loader.batches(0, 2):
        x = normalise(batch.images, table("digits", "mean-std"))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), batch.labels).backward()
        optimizer.step()
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            assert float((engine.weights()[name] - value).norm() / value.norm()) < 1e-4, name


def test_the_step_reads_nothing_back_and_its_flops_are_those_of_its_layers():
    """Forward, input and weight gradients are a product each, but for the first layer's input."""
    settings = {**CPU, "data.validation": 64, "train.batch_size": 4}
    recipe = compose("resnet-20", "cifar-10", settings=settings).recipe
    counted = step(recipe)
    net = skeleton(recipe)
    products = 0
    for layer in kernels.layers(net, 4, (3, 32, 32)):
        w, (h, s) = layer.module.weight, (layer.images[2:3] or (1,), getattr(layer.module, "stride", (1,)))
        pixels = (h[0] // s[0]) ** 2 if w.dim() == 4 else 1
        products += 2 * 4 * pixels * w.numel() * (2 if layer.first else 3)
    assert (counted["host reads"], counted["FLOPs"]) == (0, products)


@pytest.mark.parametrize("model", ["resnet-20", "resnet-18", "vgg11", "lenet-900-300"])
def test_the_kernel_table_knows_the_layers_of_every_net(model):
    dataset = "mnist" if model.startswith("lenet") else "cifar-10"
    rows = list(kernels.rows(model, dataset, precision="bf16"))
    net = skeleton(compose(model, dataset, preset="fast").recipe)
    forward = sum(r["calls"] for r in rows if r["path"].endswith(" forward"))
    assert forward == len(weight_names(net))
    assert all(r["seconds_at_roofline"] > 0 for r in rows)


class TheirBlock(nn.Module):
    """A block as other programs name it: the shortcut is a sequence of convolution and batch norm."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class Theirs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(TheirBlock(16, 16, 1), TheirBlock(16, 32, 2), TheirBlock(32, 64, 2))
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(self.blocks(self.bn(self.conv(x)).relu()).mean((2, 3)))


def test_another_programs_residual_net_is_matched_by_place_and_computes_the_same():
    torch.manual_seed(0)
    theirs = Theirs().eval()
    for name, value in theirs.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        elif value.is_floating_point():
            value.normal_(0, 0.2)
    masks = {n: torch.rand(v.shape) < 0.5 for n, v in theirs.state_dict().items() if v.dim() > 1}
    foreign = Foreign(masks=(masks,), state=theirs.state_dict())
    ours = build(small_recipe("resnet-8", "digits", **SETTINGS)).eval()
    values = matching.rewind(foreign, ours)
    ours.load_state_dict({n: torch.from_numpy(v) for n, v in values.items()})
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    shortcut = matching.masks(foreign, ours)[-1]["block2.shortcut.weight"]
    assert torch.equal(shortcut, masks["blocks.1.shortcut.0.weight"])


@pytest.mark.endurance
def test_one_graph_does_for_a_residual_net():
    recipe = small_recipe("resnet-8", "digits", **SETTINGS)
    engines = []
    for mode in ("off", "on"):
        asked = dataclasses.replace(recipe, compute=compute(recipe, compile=mode))
        engine = make_engine(asked, random_source("digits"))
        engine.rewind({n: t.clone() for n, t in engine.weights().items()})
        engine.run(0, 2)
        torch.compiler.set_stance("fail_on_recompile")
        try:
            weights = {n: w for n, w in engine.weights().items() if n in layer_rates(engine.weight_names, recipe.prune)}
            engine.set_masks(half_masks(weights))
            engine.run(2, 3)
        finally:
            torch.compiler.set_stance("default")
        engines.append(engine.weights())
    for name, value in engines[0].items():
        if value.is_floating_point():
            assert float((engines[1][name] - value).norm() / value.norm()) < 1e-3, name
