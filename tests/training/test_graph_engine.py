"""The graph engine: its step is plain PyTorch's on masked weights, its state the dense engine's, its tensors stay put.

Here it runs without a graph, by the same functions; what a graph adds is tried on a GPU (``gpu``).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastlth.data.normalise import normalise, table
from fastlth.errors import RecipeError
from fastlth.models import build, conv
from fastlth.search import RoundFinished, find_tickets
from fastlth.training import host
from fastlth.training.available import engine as engine_for
from fastlth.training.engines.arena import Arena
from fastlth.training.engines.fleet import Fleet
from fastlth.training.engines.graph import GraphEngine
from fastlth.training.engines.make import make_engine
from fastlth.training.resolve import resolve
from tests.helpers import (
    assert_close_by_norm,
    assert_masked,
    assert_same_bits,
    compute,
    half_masks,
    random_source,
    small_recipe,
)  # fmt: skip

OPTIMIZERS = {
    "adam": {"train__optimizer": "adam", "train__weight_decay": 2.0**-6},
    "adamw": {"train__optimizer": "adamw", "train__weight_decay": 2.0**-4},
    "sgd": {"train__optimizer": "sgd", "train__lr": 2.0**-4},
    "nesterov": {"train__optimizer": "sgd", "train__lr": 2.0**-5, "train__momentum": 0.875, "train__nesterov": True,
                 "train__weight_decay": 2.0**-7},
}  # fmt: skip
CONV = {"model__batch_norm": True, "data__augment": "flip-crop", "train__drop_last": False, "train__batch_size": 48,
        "schedule__warmup": 3, "compute__channels_last": "on"}  # fmt: skip


def engines(recipe, source, density=0.4, **changes):
    """The dense and the graph engine at the same masked start."""
    both = [make_engine(dataclasses.replace(recipe, compute=compute(recipe, engine=e, **changes)), source)
            for e in ("dense", "graph")]  # fmt: skip
    masks = half_masks({n: both[0].weights()[n] for n in both[0].prunable}, density)
    start = {n: t.clone() for n, t in both[0].weights().items()}
    for engine in both:
        engine.set_masks(masks)
        engine.rewind(start)
    return *both, masks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_the_dense_engines(name, precision):
    """Over an epoch's end with its smaller batch, augmented, with warm-up; bf16 copies are autocast's roundings.
    Five steps: later a last bit moves a maximum to another pixel."""
    recipe = small_recipe("conv-2", "digits", **OPTIMIZERS[name], **{**CONV, "train__batch_size": 96})
    dense, graph, masks = engines(recipe, random_source("digits"), precision=precision)
    for first, last in ((0, 2), (2, 5)):
        assert dense.run(first, last) == graph.run(first, last)
        assert_masked(graph.weights(), masks)
    ours, theirs = (torch.cat([t.double().reshape(-1) for n, t in engine.weights().items() if "weight" in n])
                    for engine in (graph, dense))  # fmt: skip
    # one bf16 rounding is 2e-3 of a weight: Adam's last bit decides which way some of them go
    assert_close_by_norm(ours, theirs, 1e-5 if precision == "fp32" else 1e-3)
    ours, theirs = graph.interval(), dense.interval()
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-4 if precision == "fp32" else 1e-2)
    for split, images in (("test", None), ("train", 100)):
        ours, theirs = graph.evaluate(split, images), dense.evaluate(split, images)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4 if precision == "fp32" else 2e-2)
    assert graph.state().keys() == dense.state().keys()


def small_vgg() -> nn.Module:
    torch.manual_seed(0)
    return conv.vgg(((8,), (16,), (16,)), (3, 8, 8), 10)


def batches(count: int):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
        yield x, torch.randint(0, 10, (8,), generator=generator)


def plain_steps(model: nn.Module, masks, name: str, steps: int) -> list[torch.Tensor]:
    """torch.optim on gradients times masks."""
    t = small_recipe(**OPTIMIZERS[name]).train
    with torch.no_grad():
        for n, mask in masks.items():
            model.get_parameter(n).mul_(mask)
    optimizer = {
        "adam": lambda p: torch.optim.Adam(p, t.lr, weight_decay=t.weight_decay, betas=t.betas),
        "adamw": lambda p: torch.optim.AdamW(p, t.lr, weight_decay=t.weight_decay, betas=t.betas),
        "sgd": lambda p: torch.optim.SGD(p, t.lr, t.momentum, weight_decay=t.weight_decay, nesterov=t.nesterov),
    }[t.optimizer](model.parameters())
    for x, labels in batches(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        for n, mask in masks.items():
            model.get_parameter(n).grad.mul_(mask)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def arena_steps(model: nn.Module, masks, name: str, steps: int, precision="fp32", dtype=torch.float64) -> Arena:
    arena = Arena(model, masks, small_recipe(**OPTIMIZERS[name]).train, precision, dtype)
    arena.set_masks(masks)
    for x, labels in batches(steps):
        logits = model(x.to(dtype if precision == "fp32" else torch.bfloat16))
        gradients = arena.gradients(F.cross_entropy(logits.to(dtype), labels))
        arena.step(gradients, arena.table(gradients))
    return arena


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_hundred_steps_in_float64_are_plain_pytorch(name):
    theirs, ours = small_vgg().double(), small_vgg().double()
    masks = half_masks({n: p for n, p in ours.named_parameters() if p.dim() > 1}, 0.4)
    expected = plain_steps(theirs, masks, name, 200)
    arena = arena_steps(ours, masks, name, 200)
    for weight, own in zip(expected, arena.weights.values(), strict=True):
        assert_close_by_norm(own, weight, 1e-10)
    assert all((arena.weights[n][~m] == 0).all() for n, m in masks.items())


def test_two_hundred_steps_in_bf16_keep_copies_and_masks():
    """The fp32 weights stay masked, the copies are their roundings, and training learns what plain fp32 learns."""
    model = small_vgg()
    masks = half_masks({n: p for n, p in model.named_parameters() if p.dim() > 1}, 0.4)
    arena = arena_steps(model, masks, "nesterov", 200, "bf16", torch.float32)
    assert_masked(arena.weights, masks)
    assert_same_bits({"all": arena.flat["copies"]}, {"all": arena.flat["weights"].bfloat16()})
    kinds = {n: p.dtype for n, p in model.named_parameters()}
    assert kinds["conv1.weight"] == kinds["output.bias"] == torch.bfloat16 and kinds["bn1.weight"] == torch.float32
    plain = small_vgg().double()
    expected = plain_steps(plain, masks, "nesterov", 200)
    x, labels = (torch.cat(parts) for parts in zip(*batches(20), strict=True))
    with torch.no_grad():
        losses = [float(F.cross_entropy(net(x.to(kind)).float(), labels))
                  for net, kind in ((model, torch.bfloat16), (plain, torch.float64))]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=0.15), losses
    assert len(expected) == len(arena.names)


def test_a_parameter_is_a_view_of_a_flat_buffer_and_aligned():
    model = small_vgg()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arena = Arena(model, [n for n in before if "conv" in n], small_recipe().train, "bf16")
    inside = {name: range(t.data_ptr(), t.data_ptr() + t.nbytes) for name, t in arena.flat.items()}
    for n, p in model.named_parameters():
        assert torch.equal(arena.weights[n], before[n])
        assert p.data_ptr() in inside["copies" if p.dtype == torch.bfloat16 else "weights"]
        begin = inside["copies" if p.dtype == torch.bfloat16 else "weights"].start
        assert (p.data_ptr() - begin) % 128 == 0
        if p.dim() == 4:
            assert p.is_contiguous(memory_format=torch.channels_last)
    assert set(arena.flat) == {"weights", "first", "second", "copies", "bits"}


def test_a_nan_gradient_at_a_pruned_weight_changes_nothing():
    results = []
    for poison in (0.0, float("nan")):
        model = small_vgg()
        masks = half_masks({"conv2.weight": model.get_parameter("conv2.weight")}, 0.5)
        arena = Arena(model, masks, small_recipe(**OPTIMIZERS["adam"]).train)
        arena.set_masks(masks)
        for _ in range(3):
            gradients = [torch.ones_like(w) for w in arena._weights]
            where = arena.names.index("conv2.weight")
            gradients[where][~masks["conv2.weight"].permute(0, 2, 3, 1)] = poison
            arena.step(gradients, arena.table(gradients))
        results.append({**arena.flat, "settings": arena.settings})
    assert_same_bits(*results)


def recipe_of(**settings):
    """Nesterov's momentum unless another optimizer is named."""
    settings = settings if "train__optimizer" in settings else {**OPTIMIZERS["nesterov"], **settings}
    return small_recipe("conv-2", "digits", compute__engine="graph", **{**CONV, **settings})


def test_data_of_others_train_as_the_catalogues_do_and_folders_are_left_to_the_dense_engine():
    """Their mean and std stand in the recipe, under whatever name."""
    recipe, source = recipe_of(), random_source("digits")
    facts = {n: getattr(recipe.data.facts, n) for n in ("shape", "classes", "train", "test", "mean", "std")}
    data = dataclasses.replace(recipe.data, name="mine.data:digits", content="", **facts)
    own = dataclasses.replace(recipe, data=data)
    ours, theirs = make_engine(recipe, source), make_engine(own, source)
    for engine in (ours, theirs):
        engine.run(0, 4)
    assert_same_bits(ours.state(), theirs.state())
    flat = dataclasses.replace(small_recipe(), data=dataclasses.replace(data, augment="none"))
    assert len(Fleet([flat, flat], source).members) == 2
    folder = dataclasses.replace(recipe, data=dataclasses.replace(data, name="imagefolder:/flowers"))
    with pytest.raises(RecipeError, match="--engine graph cannot train this: folders of images are streamed"):
        engine_for(folder)


def test_chunks_change_no_bit_and_states_go_on_in_either_engine():
    recipe, source = recipe_of(), random_source("digits")
    whole, parts, later = (make_engine(recipe, source) for _ in range(3))
    whole.run(0, 10)
    for first, last in ((0, 1), (1, 4), (4, 7)):
        parts.run(first, last)
    later.load_state({n: t.clone() for n, t in parts.state().items()})
    assert_same_bits(later.state(), parts.state())
    for engine in (parts, later):
        engine.run(7, 10)
        assert_same_bits(whole.state(), engine.state())
        assert engine.evaluate("validation") == whole.evaluate("validation")
    dense = make_engine(dataclasses.replace(recipe, compute=compute(recipe, engine="dense")), source)
    dense.load_state({n: t.clone() for n, t in whole.state().items()})
    assert_same_bits(dense.state(), whole.state())
    assert dense.interval() == whole.interval()


def addresses(engine: GraphEngine) -> dict[str, int]:
    inner = {f"changing {i}": t.data_ptr() for i, t in enumerate(engine.changing())}
    model = {n: p.data_ptr() for n, p in engine.model.state_dict(keep_vars=True).items()}
    return {n: t.data_ptr() for n, t in engine.state().items()} | inner | model


@pytest.mark.parametrize("name", ["adam", "nesterov"])
def test_nothing_moves_in_a_round_and_rewinding_restores_all_of_theta(name):
    engine = make_engine(recipe_of(**OPTIMIZERS[name]), random_source("digits"))
    theta0 = {n: t.clone() for n, t in engine.weights().items()}
    before = addresses(engine)
    engine.run(0, 10)
    masks = half_masks({n: engine.weights()[n] for n in engine.prunable})
    engine.interval()
    engine.evaluate("validation")
    engine.set_masks(masks)
    engine.rewind(theta0)
    expected = {n: torch.where(masks[n], t, 0.0) if n in masks else t for n, t in theta0.items()}
    assert_same_bits(engine.weights(), expected)
    assert all(not t.any() for n, t in engine.state().items() if n.startswith("optimizer/"))
    engine.run(0, 10)
    assert addresses(engine) == before


def test_few_slots_for_orders_give_the_same_bits(monkeypatch):
    recipe, source = recipe_of(train__batch_size=96), random_source("digits")  # 3 steps an epoch, 14 epochs
    roomy = make_engine(recipe, source)
    monkeypatch.setattr("fastlth.training.engines.graph.ORDER_BYTES", 1)
    narrow = make_engine(recipe, source)
    assert len(narrow._epoch_in) == 1 < len(roomy._epoch_in)
    for engine in (roomy, narrow):
        engine.run(0, 8)
        engine.run(8, 10)
    assert_same_bits(roomy.state(), narrow.state())


def test_evaluation_in_parts_equals_a_plain_pass(monkeypatch):
    monkeypatch.setattr("fastlth.training.engines.graph.EVALUATION_BATCH", 24)
    recipe, source = recipe_of(), random_source("digits", train=200, test=64)
    engine = make_engine(recipe, source)
    engine.run(0, 5)
    model = build(recipe)
    model.load_state_dict(engine.weights())
    model.eval().double()
    images = torch.from_numpy(source.test.pixels).permute(0, 3, 1, 2)
    labels = torch.from_numpy(source.test.labels)
    with torch.no_grad():
        logits = model(normalise(images, table("digits", "mean-std")).double())
    scores = engine.evaluate("test")
    assert scores.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert scores.accuracy == float((logits.argmax(1) == labels).double().mean())
    assert engine.model.training
    # a graph has one size: what is beyond the window's end must count nothing
    engine.model.eval()
    engine._window.copy_(torch.tensor([engine._begins["test"], engine._begins["test"] + 5]))
    engine._totals.zero_()
    engine.evaluation_step(24)
    engine.model.train()
    expected = float(F.cross_entropy(logits[:5], labels[:5], reduction="sum"))
    assert engine._totals.tolist() == [pytest.approx(expected, rel=1e-5), int((logits.argmax(1) == labels)[:5].sum())]


def test_dropout_and_lecodes_colours_follow_the_batch():
    recipe = small_recipe("conv-2", "cifar-10", model__dropout=0.3, data__augment="lecode", compute__channels_last="on",
                          train__batch_size=16)  # fmt: skip
    dense, graph, _ = engines(recipe, random_source("cifar-10", train=120))
    for engine in (dense, graph):
        engine.run(0, 5)
    for n, weight in dense.weights().items():
        if "weight" in n:
            assert_close_by_norm(graph.weights()[n], weight, 1e-4)


@pytest.mark.parametrize("augment", ["none", "flip-crop", "lecode"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_in_a_step_or_an_evaluation_is_read_by_the_host(augment, precision):
    recipe = small_recipe("conv-2", "cifar-10", data__augment=augment, model__batch_norm=True,
                          compute__engine="graph", compute__precision=precision)  # fmt: skip
    engine = make_engine(recipe, random_source("cifar-10"))

    def both():
        with FakeTensorMode(allow_non_fake_inputs=True):
            engine.train_step(32)
            engine.evaluation_step(64)

    both()
    inner = engine._loss_and_hits
    engine._loss_and_hits = lambda *inputs: ((r := inner(*inputs))[0] * r[0].item(), r[1])
    with pytest.raises(DataDependentOutputException):
        both()


@pytest.mark.endurance
def test_twenty_rounds_compile_once():
    """The whole batch, the last and the evaluation; masks, weights and learning rates change in place."""
    from torch._dynamo.utils import counters

    recipe = recipe_of(prune__rounds=20, train__iterations=12, compute__compile="on")
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for event in find_tickets(recipe, random_source("digits"), recipe.compute):
        if isinstance(event, RoundFinished):
            graphs.append(counters["stats"]["unique_graphs"])
            assert event.result["engine"] == "graph"
    assert len(graphs) == 21 and len(set(graphs)) == 1, graphs
    assert counters["graph_break"] == {}


def test_a_search_is_the_dense_engines(monkeypatch):
    """Masks of three short rounds: the same counts, and weights so close that few places differ."""
    recipe = recipe_of(train__iterations=4, train__batch_size=96, evaluate__every=4)
    source = random_source("digits")
    tickets = []
    for engine in ("graph", "dense"):
        settled = compute(recipe, engine=engine)
        *_, last = (e for e in find_tickets(recipe, source, settled) if isinstance(e, RoundFinished))
        tickets.append(last.ticket)
    ours, theirs = (torch.cat([torch.from_numpy(at).view(-1) for at in t.pruned_at.values()]) for t in tickets)
    assert torch.equal(ours.bincount(), theirs.bincount())
    assert float((ours != theirs).double().mean()) < 0.01


def test_who_may_ask_for_it():
    assert engine_for(recipe_of()) == "graph"
    frozen = small_recipe("conv-2", "digits", prune__mask_0="freeze_init")
    with pytest.raises(RecipeError, match="mask_0"):
        dataclasses.replace(frozen, compute=compute(frozen, engine="graph"))
    with pytest.raises(RecipeError, match=r"--engine graph cannot train this: compute.loader is ffcv"):
        engine_for(recipe_of(compute__loader="ffcv"))
    settled = resolve(recipe_of(compute__precision="auto"), lambda r: make_engine(r, random_source("digits"))).compute
    assert settled.engine == "graph" and settled.channels_last == "on" and settled.precision in ("fp32", "bf16")


@pytest.mark.gpu
def test_a_graph_replays_without_waiting_and_leaves_the_engine_as_it_was():
    recipe = recipe_of(compute__device="cuda:0", compute__precision="bf16", compute__deterministic=True)
    source = random_source("digits")
    one, two = make_engine(recipe, source), make_engine(recipe, source)
    start = build(recipe).state_dict()
    assert_same_bits({n: t.cpu() for n, t in one.weights().items()}, start)
    one.run(0, 1)
    one.rewind(start)
    try:
        torch.cuda.set_sync_debug_mode("error")
        with host.settings(1):
            one._go_to(0, 0, 0, 0)
            for _ in range(5):
                one._graphs["train 48"]()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    two.run(0, 5)
    assert_same_bits(dict(one.weights()), dict(two.weights()))
