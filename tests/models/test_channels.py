"""Removable units: what is found is what a forward and backward pass show, and taking it out changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlth.models import conv
from fastlth.models.channels import links, removable, work_left
from fastlth.models.lenet import lenet
from tests.helpers import half_masks

SHAPE = (3, 8, 8)
NETS = {
    "vgg": lambda: conv.vgg(((8, 8), (16, 16), (16,)), SHAPE, 10),
    "conv with biases": lambda: conv.conv_n(((8, 8),), SHAPE, 10),
    "linear": lambda: lenet((300, 100), SHAPE, 10),
}


def masked_net(kind: str, seed: int, density: float) -> tuple[nn.Sequential, dict, dict]:
    """Random masks, and random shifts, scales and running statistics, so that both signs occur everywhere."""
    torch.manual_seed(seed)
    net = NETS[kind]().double()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if "bn" in name and "num" not in name:
                tensor.copy_(torch.rand_like(tensor) + 0.1 if "var" in name else torch.randn_like(tensor))
            elif name.endswith("bias"):
                tensor.copy_(torch.randn_like(tensor).round())
    masks = half_masks({n: p for n, p in net.named_parameters() if p.dim() > 1}, density, seed)
    zero_(net, masks)
    return net, masks, {n: t.numpy().copy() for n, t in net.state_dict().items()}


@torch.no_grad()
def zero_(net: nn.Module, masks: dict) -> None:
    for n, mask in masks.items():
        net.get_parameter(n).mul_(mask)


def found_in(net, masks, start):
    chain = links(net)
    assert chain is not None
    return removable(chain, {n: m.numpy() for n, m in masks.items()}, start)


def outputs(net: nn.Sequential, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each layer's units give behind batch norm and ReLU."""
    given, name = {}, ""
    for child, module in net.named_children():
        x = module(x)
        if isinstance(module, nn.Linear | nn.Conv2d):
            name = child
        if isinstance(module, nn.Linear | nn.Conv2d | nn.BatchNorm2d | nn.ReLU):
            given[name] = x
    return given


def units(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("density", [0.5, 0.05, 0.02, 0.0])
@pytest.mark.parametrize("kind", NETS)
def test_silent_is_zero_for_every_image_and_unread_has_no_path(kind, density):
    seen = 0
    for seed in range(4):
        net, masks, start = masked_net(kind, seed, density)
        found = found_in(net, masks, start)
        zeros = {name: torch.ones(len(f.silent), dtype=torch.bool) for name, f in found.items()}
        for _ in range(3):
            for training in (True, False):
                net.load_state_dict({n: torch.from_numpy(a) for n, a in start.items()})
                given = outputs(net.train(training), 3 * torch.randn(16, *SHAPE, dtype=torch.float64))
                for name in zeros:
                    zeros[name] &= (units(given[name]) == 0).all(1)
        for name, f in found.items():
            assert not (f.silent & ~zeros[name].numpy()).any()
            seen += int(f.either.sum())
        paths = reads(net, masks)
        for name, f in found.items():
            assert (f.unread == ~paths[name].numpy()).all()
    assert (seen > 0) == (density < 0.5)


@torch.no_grad()
def reads(net: nn.Sequential, masks: dict) -> dict[str, torch.Tensor]:
    """Units from which some way of kept weights leads to a logit, by products of matrices."""
    names = list(masks)
    counts = [m.reshape(*m.shape[:2], -1).sum(2).double() for m in masks.values()]
    ways, found = torch.ones(1, len(counts[-1]), dtype=torch.float64), {}
    for name, k in zip(reversed(names), reversed(counts), strict=True):
        found[name.removesuffix(".weight")] = ways.view(len(k), -1).sum(1) > 0
        ways = (ways.view(len(k), -1).sum(1) > 0).double()[None] @ k
    return found


@pytest.mark.parametrize("kind", NETS)
def test_training_without_them_is_training_with_them(kind):
    """30 steps of SGD with momentum and decay: logits in training and in evaluation, and every weight that is left."""
    taken = 0
    for seed in range(3):
        net, masks, start = masked_net(kind, seed, 0.03)
        gone = {n: torch.from_numpy(f.either) for n, f in found_in(net, masks, start).items()}
        taken += sum(int(g.sum()) for g in gone.values())
        small, held = smaller(net, masks, gone)
        optimizers = [torch.optim.SGD(n.parameters(), 0.05, 0.9, weight_decay=1e-2) for n in (net, small)]
        for _ in range(30):
            x, labels = torch.randn(8, *SHAPE, dtype=torch.float64), torch.randint(0, 10, (8,))
            logits = []
            for model, optimizer, own in zip((net, small), optimizers, (masks, held), strict=True):
                optimizer.zero_grad()
                logits.append(model(x))
                F.cross_entropy(logits[-1], labels).backward()
                for n, m in own.items():
                    model.get_parameter(n).grad.mul_(m)
                optimizer.step()
            assert torch.allclose(*logits, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            assert torch.allclose(net.eval()(x), small.eval()(x), rtol=1e-9, atol=1e-9)
    assert taken > 20


def smaller(net: nn.Sequential, masks: dict, gone: dict) -> tuple[nn.Sequential, dict]:
    """A net without the units ``gone``; at least one unit stays in each layer."""
    layers, held = nn.Sequential(), {}
    stays = torch.ones(SHAPE[0], dtype=torch.bool)
    out, name = stays, ""
    for child, module in net.named_children():
        if isinstance(module, nn.Linear | nn.Conv2d):
            name, out = child, ~gone[child]
            if not out.any():
                out = out.clone()
                out[0] = True
            inputs = stays.repeat_interleave(module.weight.shape[1] // len(stays))
            bias = module.bias is not None
            new = (nn.Linear(int(inputs.sum()), int(out.sum()), bias) if isinstance(module, nn.Linear) else
                   nn.Conv2d(int(inputs.sum()), int(out.sum()), 3, padding=1, bias=bias))  # fmt: skip
            new.weight = nn.Parameter(module.weight.detach()[out][:, inputs].clone())
            if bias:
                new.bias = nn.Parameter(module.bias.detach()[out].clone())
            held[f"{child}.weight"] = masks[f"{child}.weight"][out][:, inputs]
            stays = out
        elif isinstance(module, nn.BatchNorm2d):
            new = nn.BatchNorm2d(int(out.sum())).double()
            new.load_state_dict({n: t[out] if t.dim() else t for n, t in module.state_dict().items()})
        else:
            new = module
        layers.add_module(child, new)
    assert name
    return layers.double(), held


def test_work_left_by_hand():
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 10))
    whole = 64 * 27 * 16 + 10 * 1024
    gone = {"0": np.arange(64) < 40, "3": np.zeros(10, bool)}  # 24 stay
    assert work_left(net, (3, 4, 4), gone) == (24 * 27 * 16 + 10 * 24 * 16) / whole
    assert work_left(net, (3, 4, 4), gone, 32) == (32 * 27 * 16 + 10 * 32 * 16) / whole
    nothing = {n: np.zeros_like(g) for n, g in gone.items()}
    assert work_left(net, (3, 4, 4), nothing, 32) == 1.0


def test_a_late_rewound_channel_with_a_positive_shift_is_not_silent():
    net, masks, start = masked_net("vgg", 0, 0.0)
    start["bn1.bias"][:] = [-1, 0, 1, -1, -1, 0, 0, 2]
    start["bn1.running_mean"][:] = [0, 0, 0, -50, 50, -1e-3, 0, 0]
    start["bn1.weight"][:] = 1
    assert found_in(net, masks, start)["conv1"].silent.tolist() == [True, True, False, False, True, False, True, False]


def test_other_nets_are_left_alone():
    class Residual(nn.Module):
        def forward(self, x):
            return x

    assert links(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))) is None
    assert links(Residual()) is None
    assert links(nn.Sequential(nn.Conv2d(4, 4, 3), nn.PReLU())) is None
