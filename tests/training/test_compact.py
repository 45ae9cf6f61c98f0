"""The smaller net of a round trains to the values of the whole net, those of the units left out included."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlth.data.order import Order, split
from fastlth.models import conv
from fastlth.models.channels import decay_keeps_signs, links, removable
from fastlth.search import RoundFinished, find_tickets
from fastlth.training import worth
from fastlth.training.engines import compact
from fastlth.training.engines.arena import Arena
from fastlth.training.engines.compact import Compact
from fastlth.training.engines.graph import GraphEngine
from fastlth.training.engines.make import make_engine, make_splits
from tests.helpers import (  # fmt: skip
    assert_close_by_norm,
    assert_masked,
    assert_same_bits,
    compute,
    random_source,
    small_recipe,
)

OPTIMIZERS = {
    "adam": {"train__optimizer": "adam", "train__weight_decay": 1e-2},
    "adamw": {"train__optimizer": "adamw", "train__weight_decay": 0.05},
    "momentum": {"train__optimizer": "sgd", "train__lr": 0.05, "train__momentum": 0.9, "train__weight_decay": 1e-2},
    "nesterov": {"train__optimizer": "sgd", "train__lr": 0.02, "train__momentum": 0.875, "train__nesterov": True,
                 "train__weight_decay": 2e-2},
}  # fmt: skip
DIGITS = {"compute__engine": "graph", "compute__compact": 1.0, "train__batch_size": 24, "train__drop_last": False,
          "schedule__warmup": 3, "evaluate__every": 100, "train__iterations": 100}  # fmt: skip


def recipe_of(**settings):
    return small_recipe("conv-2", "digits", **{**DIGITS, **settings})


def engine_of(recipe, source, dtype=torch.float64, **changes) -> GraphEngine:
    recipe = dataclasses.replace(recipe, compute=compute(recipe, **changes))
    kept, _ = split(len(source.train.labels), recipe.data.validation, recipe.seeds.key("split"))
    order = Order(len(kept), recipe.train.batch_size, recipe.train.drop_last, recipe.seeds.key("order"))
    return GraphEngine(recipe, order, make_splits(recipe, source), dtype=dtype)


def some_channels(weights, density: float = 0.3, units: float = 0.4, seed: int = 3) -> dict[str, torch.Tensor]:
    """Masks that keep few weights of some units and none of the others', in or out; of the logits' all units some."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, w in weights.items():
        mask = torch.rand(w.shape, generator=generator) < density
        silent = torch.rand(w.shape[0], generator=generator) > units
        unread = torch.rand(w.shape[1], generator=generator) > units
        if "output" not in name:
            mask[silent] = False
        if w.shape[1] > 3:
            mask[:, unread] = False
        masks[name] = mask
    return masks


def any_start(weights, seed: int = 5) -> dict[str, torch.Tensor]:
    """Shifts, scales and statistics of both signs, a third of them 0, as a late rewind would give them."""
    torch.manual_seed(seed)
    start = {n: t.clone() for n, t in weights.items()}
    for name, t in start.items():
        if name.endswith(("bias", "running_mean")) or (name.startswith("bn") and name.endswith("weight")):
            t.copy_(0.3 * torch.randn_like(t) * (torch.rand_like(t) > 0.33))
        elif name.endswith("running_var"):
            t.copy_(torch.rand_like(t) + 0.1)
        if name.startswith("conv") and name.endswith("bias"):
            t.copy_(torch.where(torch.rand_like(t) > 0.3, 0.0, t))
    return start


@pytest.mark.parametrize(("name", "norm"), [("adam", False), ("adamw", True), ("momentum", True), ("nesterov", False)])
def test_thirty_steps_are_those_of_the_whole_net_in_float64(name, norm):
    """Over epochs' ends, with momentum and decay on what is left out."""
    recipe = recipe_of(model__batch_norm=norm, train__batch_size=16, **OPTIMIZERS[name])
    source = random_source("digits", train=120, test=32)
    whole, small = engine_of(recipe, source, compact=0.0), engine_of(recipe, source)
    masks = some_channels({n: whole.weights()[n] for n in whole.prunable})
    start = any_start(whole.weights())
    for engine in (whole, small):
        engine.set_masks(masks)
        engine.rewind(start)
    assert whole.small is None and small.small is not None
    widths = {n: len(m.weight) for n, m in small.net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert widths["output"] == 10 and any(widths[n] < len(whole.weights()[f"{n}.weight"]) for n in widths)
    assert {w % 32 for w in widths.values()} == {0, 10}
    for first, last in ((0, 1), (1, 30)):
        assert small.run(first, last) == whole.run(first, last)
    for kind in ("train", "validation", "test"):
        assert small.evaluate(kind).loss == pytest.approx(whole.evaluate(kind).loss, rel=1e-6)
    assert small.interval().loss == pytest.approx(whole.interval().loss, rel=1e-6)
    expected, found = whole.state(), small.state()
    moved = [n for n in expected if n.startswith(("model/", "optimizer/")) and "running" not in n]
    for n in moved:
        if expected[n].double().norm() > 0:
            assert_close_by_norm(found[n].double(), expected[n].double(), 1e-10)
        else:
            assert not found[n].any()
    assert all((found[f"model/{n}"][~m] == 0).all() for n, m in masks.items())
    for n in (n for n in expected if "running" in n):  # of the units that something reads and that may speak
        layer = n.removeprefix("model/bn").split(".")[0]
        stays = needed_of(recipe, masks, start, f"conv{layer}")
        assert_close_by_norm(found[n][stays], expected[n][stays], 1e-10)
        assert stays.any() and not stays.all()


def needed_of(recipe, masks, start, layer):
    from fastlth.models import skeleton

    values = {n: t.numpy() for n, t in start.items()}
    found = removable(links(skeleton(recipe)), {n: m.numpy() for n, m in masks.items()}, values,
                      signs_stay=decay_keeps_signs(recipe.train))  # fmt: skip
    return torch.from_numpy(~found[layer].either)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_few_steps_in_the_precisions_of_a_gpu(precision):
    recipe, source = recipe_of(model__batch_norm=True, **OPTIMIZERS["momentum"]), random_source("digits", train=160)
    engines = [engine_of(recipe, source, torch.float32, precision=precision, compact=c) for c in (0.0, 1.0)]
    masks = some_channels({n: engines[0].weights()[n] for n in engines[0].prunable})
    start = any_start(engines[0].weights())
    for engine in engines:
        engine.set_masks(masks)
        engine.rewind(start)
        engine.run(0, 5)
        assert_masked(engine.weights(), masks)
    assert engines[1].small is not None
    whole, small = (torch.cat([t.double().reshape(-1) for n, t in e.weights().items() if "weight" in n])
                    for e in engines)  # fmt: skip
    assert_close_by_norm(small, whole, 1e-5 if precision == "fp32" else 2e-3)


def vgg() -> nn.Sequential:
    torch.manual_seed(0)
    return conv.vgg(((48,), (64,)), (3, 4, 4), 10).double()


def test_a_vgg_is_plain_pytorch_with_the_smaller_net_moved_to_other_units_between():
    """Of torch.optim on masked gradients, in two rounds of the same widths; where pooling is global."""
    train = small_recipe(**OPTIMIZERS["momentum"]).train
    theirs, ours = vgg(), vgg()
    arena = Arena(ours, [n for n, p in ours.named_parameters() if p.dim() > 1], train, dtype=torch.float64)
    small = None
    for round in range(2):
        masks = some_channels({n: p for n, p in theirs.named_parameters() if p.dim() > 1}, seed=round)
        start = any_start(vgg().state_dict(), seed=round)
        theirs.load_state_dict(start)
        optimizer = torch.optim.SGD(theirs.parameters(), train.lr, 0.9, weight_decay=train.weight_decay)
        arena.set_masks(masks)
        arena.restore(start)
        for n, b in ours.named_buffers():
            b.copy_(start[n])
        found = removable(links(theirs), *({n: t.numpy() for n, t in some.items()} for some in (masks, start)))
        stays = {n: compact.rounded_up(~f.either) for n, f in found.items()}
        assert [int(s.sum()) for s in stays.values()] == [32, 32, 10]  # as many in both rounds
        if small is None:
            small = Compact(ours, arena, stays)
            before = addresses(small)
        assert small.fits(stays)
        small.point(stays)
        with torch.no_grad():
            for n, m in masks.items():
                theirs.get_parameter(n).mul_(m)
        for _ in range(12):
            x, labels = torch.randn(8, 3, 4, 4, dtype=torch.float64), torch.randint(0, 10, (8,))
            optimizer.zero_grad()
            F.cross_entropy(theirs(x), labels).backward()
            for n, m in masks.items():
                theirs.get_parameter(n).grad.mul_(m)
            optimizer.step()
            gradients = small.gradients(F.cross_entropy(small.net(x), labels))
            arena.step(gradients, arena.table(gradients))
            small.gather()
        for n, p in theirs.named_parameters():
            assert_close_by_norm(arena.weights[n], p.detach(), 1e-10)
        assert addresses(small) == before
        logits = [net.eval()(x) for net in (theirs, small.net)]
        assert torch.allclose(*logits, rtol=1e-9, atol=1e-9)
        assert {id(m.num_batches_tracked) for m in small.net.modules() if isinstance(m, nn.BatchNorm2d)} == {
            id(m.num_batches_tracked) for m in ours.modules() if isinstance(m, nn.BatchNorm2d)
        }
        for net in (theirs, small.net):
            net.train()


def addresses(small: Compact) -> list[int]:
    named = small.net.state_dict(keep_vars=True)
    return [t.data_ptr() for t in named.values()] + [g.data_ptr() for g in small._gradients]


def test_widths_are_rounded_up_by_units_that_could_go():
    flags = np.zeros(100, bool)
    flags[[3, 50, 98]] = True
    wide = compact.rounded_up(flags)
    assert wide.sum() == 32 and (wide & flags).sum() == 3
    assert compact.rounded_up(np.zeros(64, bool)).sum() == 32  # a layer of no units would be none
    assert compact.rounded_up(np.ones(100, bool)).all()
    assert compact.rounded_up(np.arange(100) < 97).all()
    assert compact.rounded_up(np.arange(64) < 32).sum() == 32


def test_a_search_prunes_the_same_weights_in_every_round():
    """Three rounds at a rate at which units fall silent, from a late rewind point."""
    recipe = recipe_of(model__batch_norm=True, **{**OPTIMIZERS["momentum"], "train__iterations": 8}, prune__rounds=3,
                       prune__rate=0.9, prune__rewind_to=2, prune__scope="global", prune__scale={})  # fmt: skip
    source, tickets, smaller = random_source("digits", train=160), [], []
    for limit in (0.0, 1.0):
        engine = engine_of(recipe, source, compact=limit)
        settled = compute(recipe, compact=limit)
        for event in find_tickets(recipe, source, settled, engine=engine):
            if isinstance(event, RoundFinished):
                smaller.append(engine.small is not None)
                last = event
        tickets.append(last.ticket)
    assert not any(smaller[:4]) and not smaller[4] and smaller[-1]  # round 0 is whole
    for n, at in tickets[0].pruned_at.items():
        assert (at == tickets[1].pruned_at[n]).all(), n
    for a, b in zip(*(t.rounds for t in tickets), strict=True):
        for field in ("early_stop_iteration", "early_stop_validation_accuracy", "test_accuracy", "train_accuracy"):
            assert a[field] == b[field]


def begun(recipe, source, seed=3, **changes) -> GraphEngine:
    engine = make_engine(dataclasses.replace(recipe, compute=compute(recipe, **changes)), source)
    assert isinstance(engine, GraphEngine)
    masks = some_channels({n: engine.weights()[n] for n in engine.prunable}, seed=seed)
    start = any_start(engine.weights())
    engine.set_masks(masks)
    engine.rewind(start)
    return engine


def test_a_resumed_round_has_the_same_bits():
    recipe, source = recipe_of(model__batch_norm=True, **OPTIMIZERS["adamw"]), random_source("digits", train=160)
    whole, part, later = (begun(recipe, source) for _ in range(3))
    assert later.small is not None
    whole.run(0, 12)
    part.run(0, 5)
    later.load_state({n: t.clone() for n, t in part.state().items()})
    for engine in (part, later):
        engine.run(5, 12)
        assert_same_bits(whole.state(), engine.state())
        assert engine.evaluate("test") == whole.evaluate("test")


def test_graphs_are_captured_for_new_widths_alone(monkeypatch):
    captures = []
    monkeypatch.setattr(GraphEngine, "_captured", lambda self: captures.append(self.net) or {})
    engine = make_engine(recipe_of(), random_source("digits", train=160))
    theta = {n: t.clone() for n, t in engine.weights().items()}
    masks = worth.half_of_the_units(engine)
    engine.set_masks(masks)
    engine.rewind(theta)
    assert len(captures) == 2
    first, net = engine.small, engine.net
    engine.set_masks({n: m.flip(0, 1) for n, m in masks.items()})
    assert engine.small is None and engine.net is engine.model
    engine.rewind(theta)
    assert engine.small is first and engine.net is net and len(captures) == 2
    masks["fc2.weight"][64:] = False
    masks["output.weight"][:, 64:] = False
    engine.set_masks(masks)
    engine.rewind(theta)
    assert engine.small is not first and len(captures) == 3
    engine.set_masks({n: torch.ones_like(m) for n, m in masks.items()})
    engine.rewind(theta)
    assert engine.small is None and engine._last is None and len(captures) == 3


@pytest.mark.parametrize("where", ["graphs", "net"])
def test_where_a_smaller_net_finds_no_memory_the_whole_one_is_trained(where, monkeypatch):
    def captured(self):
        return {} if self.small is None else full()

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    recipe, source = recipe_of(**OPTIMIZERS["momentum"]), random_source("digits", train=160)
    plain = begun(recipe, source, compact=0.0)
    if where == "graphs":
        monkeypatch.setattr(GraphEngine, "_captured", captured)
    else:
        monkeypatch.setattr(compact, "Compact", full)
    engine = begun(recipe, source)
    assert engine.said == ["cpu has not memory enough for the graphs of a smaller net: this round trains the whole one"]
    for one in (plain, engine):
        one.run(0, 5)
    assert_same_bits(plain.state(), engine.state())


@pytest.mark.parametrize(("settings", "says"), [
    ({"compute__compact": 0.0}, None), ({"compute__compact": -1.0}, None), ({"compute__compact": 0.01}, None),
    ({"model__dropout": 0.5}, "dropout"), ({"compute__compile": "on"}, "compiled"),
])  # fmt: skip
def test_who_trains_the_whole_net(settings, says):
    recipe = recipe_of(**settings)
    weights = engine_of(recipe_of(), random_source("digits", train=160)).weights()
    masks, start = some_channels({n: p for n, p in weights.items() if p.dim() > 1}), any_start(weights)
    assert compact.needed(recipe_of(), masks, start) is not None
    found = compact.unsupported(recipe)
    assert found is None if says is None else says in str(found)
    assert compact.needed(recipe, masks, start) is None
    assert "chain" in str(compact.unsupported(small_recipe("resnet-8", "cifar-10")))


GRID = [
    {"train__optimizer": o, "train__lr": lr, "train__weight_decay": d, "train__momentum": m, "train__nesterov": n}
    for o in ("sgd", "adam", "adamw") for lr in (0.1,) for d in (0.0, 1e-3, 0.02, 0.03, 0.5, 3.0, 12.0)
    for m in ((0.0, 0.5, 0.9) if o == "sgd" else (0.0,)) for n in ((False, True) if m else (False,))
]  # fmt: skip


def test_decay_keeps_signs_is_what_torchs_optimizers_do():
    """A parameter whose gradient is 0, for 800 steps of a warmed-up rate: said to keep its sign, it does; and where
    it crosses, that was said."""
    kept = crossed = 0
    for settings in GRID:
        train = small_recipe(**settings).train
        p = torch.tensor([-1e-3, 1e-3, -0.5], dtype=torch.float64, requires_grad=True)
        signs = p.detach().sign()
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[train.optimizer]
        more = {"momentum": train.momentum, "nesterov": train.nesterov} if train.optimizer == "sgd" else {}
        optimizer = kind([p], lr=train.lr, weight_decay=train.weight_decay, **more)
        crosses = False
        for i in range(800):
            optimizer.param_groups[0]["lr"] = train.lr * min(1.0, i / 20)
            p.grad = torch.zeros_like(p)
            optimizer.step()
            crosses |= bool((p.detach() * signs < 0).any())
        assert not (crosses and decay_keeps_signs(train)), settings
        kept, crossed = kept + decay_keeps_signs(train), crossed + crosses
        if not crosses and train.optimizer == "sgd":
            assert decay_keeps_signs(train), settings
    assert kept > 15 and crossed > 10


def test_adam_with_decay_wakes_a_channel_of_negative_shift():
    """Its decay is the whole gradient and a step as long as the learning rate: the unit speaks after a few steps."""
    recipe = recipe_of(model__batch_norm=True, train__optimizer="adam", train__lr=1e-2, train__weight_decay=1e-2)
    engine = engine_of(recipe, random_source("digits", train=160), compact=0.0)
    masks = {n: torch.ones_like(engine.weights()[n], dtype=torch.bool) for n in engine.prunable}
    masks["conv1.weight"][:3] = False
    start = {n: t.clone() for n, t in engine.weights().items()}
    start["bn1.bias"][:3] = torch.tensor([-1e-3, 0.0, 0.0])
    start["bn1.running_mean"][2] = 0.1
    assert needed_of(recipe, masks, start, "conv1")[:3].tolist() == [True, False, True]
    slow = dataclasses.replace(recipe, train=small_recipe(**OPTIMIZERS["momentum"]).train)
    assert needed_of(slow, masks, start, "conv1")[:3].tolist() == [False, False, False]
    engine.set_masks(masks)
    engine.rewind(start)
    engine.run(0, 12)
    assert engine.weights()["bn1.bias"][0] > 0 and (engine.weights()["bn1.bias"][1:3] == 0).all()
