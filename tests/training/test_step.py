"""The step: pruned weights stay at zero, kept ones move as plain PyTorch moves them, the host reads nothing."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.utils import prune as torch_prune

from fastlth.catalogue import DATASETS
from fastlth.data.loader import Batch
from fastlth.data.normalise import normalise, table
from fastlth.models import build
from fastlth.training import host
from fastlth.training.engines.dense import DenseEngine
from fastlth.training.engines.make import make_engine
from fastlth.training.optim import MaskedOptimizer
from tests.helpers import (
    assert_close_by_norm,
    assert_masked,
    assert_same_bits,
    bits,
    compute,
    half_masks,
    random_source,
    small_recipe,
)  # fmt: skip

OPTIMIZERS = {
    "adam": {"train__optimizer": "adam"},
    "adam with decay": {"train__optimizer": "adam", "train__weight_decay": 0.1},
    "adamw": {"train__optimizer": "adamw", "train__weight_decay": 0.1},
    "sgd": {"train__optimizer": "sgd", "train__lr": 0.1},
    "momentum": {"train__optimizer": "sgd", "train__lr": 0.05, "train__momentum": 0.9, "train__weight_decay": 1e-2},
    "nesterov": {"train__optimizer": "sgd", "train__lr": 0.05, "train__momentum": 0.9, "train__nesterov": True},
}


def prunable(engine: DenseEngine) -> dict[str, torch.Tensor]:
    return {n: engine.weights()[n] for n in engine.weight_names}


def masked_engine(recipe, source, density=0.3, **changes) -> tuple[DenseEngine, dict[str, torch.Tensor]]:
    engine = make_engine(dataclasses.replace(recipe, compute=compute(recipe, **changes)), source)
    assert isinstance(engine, DenseEngine)
    masks = half_masks({n: t for n, t in prunable(engine).items() if n in engine._pruned}, density)
    start = {n: t.clone() for n, t in engine.weights().items()}
    engine.set_masks(masks)
    engine.rewind(start)
    return engine, masks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_are_zero_after_every_step(name, precision):
    recipe = small_recipe("conv-2", "digits", model__batch_norm=True, **OPTIMIZERS[name])
    engine, masks = masked_engine(recipe, random_source("digits"), precision=precision, channels_last="on")
    before = {n: t.clone() for n, t in prunable(engine).items()}
    assert_masked(engine.weights(), masks)
    for i in range(30):
        if i % 10 == 0:
            engine.interval()
        engine.run(i, i + 1)
        assert_masked(engine.weights(), masks)
    for n, mask in masks.items():  # and the kept ones are trained, in both directions
        moved = (engine.weights()[n] - before[n])[mask]
        # (units that are never active have no gradient)
        assert (moved > 0).any() and (moved < 0).any() and (moved != 0).double().mean() > 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_nan_gradient_at_a_pruned_weight_changes_nothing(name, held, dtype):
    recipe = small_recipe(**OPTIMIZERS[name])
    weight = torch.randn(8, 5, 3, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    weight = weight.to(memory_format=torch.channels_last)
    mask = half_masks({"w": weight})["w"]

    def train(poison: float, held: bool = held) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        start = torch.where(mask, weight, 0.0).to(memory_format=torch.channels_last)
        parameter = torch.nn.Parameter(start)
        optimizer = MaskedOptimizer({"w": parameter}, recipe.train)
        if held:
            optimizer.hold({"w": torch.zeros_like(mask)})  # those of the round before
            optimizer.hold({"w": ~mask})
        for step in range(5):
            gradient = torch.sin(weight * (step + 1)).to(memory_format=torch.channels_last)
            gradient[~mask] = poison
            parameter.grad = gradient
            optimizer.step({"w": ~mask})
        return parameter.detach(), optimizer.state

    clean, clean_state = train(0.0, held=False)
    for poison in (float("nan"), -float("inf"), -0.0):
        poisoned, poisoned_state = train(poison)
        assert_same_bits({"w": clean}, {"w": poisoned})
        assert_same_bits(clean_state, poisoned_state)
    assert (bits(clean[~mask]) == 0).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_equal_masked_pytorch(name):
    """The rival is plain: torch.nn.utils.prune multiplies weight by mask in every forward, torch.optim updates."""
    recipe = small_recipe(**OPTIMIZERS[name])
    source = random_source("digits")
    engine, masks = masked_engine(recipe, source, density=0.4)
    rival = build(recipe)
    for n, mask in masks.items():
        torch_prune.custom_from_mask(rival.get_submodule(n.removesuffix(".weight")), "weight", mask)
    t = recipe.train
    optimizer = {
        "adam": lambda p: torch.optim.Adam(p, lr=t.lr, weight_decay=t.weight_decay, foreach=False),
        "adamw": lambda p: torch.optim.AdamW(p, lr=t.lr, weight_decay=t.weight_decay, foreach=False),
        "sgd": lambda p: torch.optim.SGD(
            p, lr=t.lr, momentum=t.momentum, nesterov=t.nesterov, weight_decay=t.weight_decay, foreach=False
        ),
    }[t.optimizer](rival.parameters())
    pixels = table("digits", "mean-std")
    for batch in engine._loader.batches(0, 10):
        loss = F.cross_entropy(rival(normalise(batch.images, pixels)), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    engine.run(0, 10)
    for n, weight in prunable(engine).items():
        module = rival.get_submodule(n.removesuffix(".weight"))
        expected = module.weight_orig * module.weight_mask if n in masks else module.weight
        assert_close_by_norm(weight, expected.detach(), 2e-5)


def fake_step(engine: DenseEngine, batch: Batch) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        engine._step(batch)


@pytest.mark.parametrize("augment", ["none", "flip-crop", "lecode"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_in_the_step_is_read_by_the_host(augment, precision):
    recipe = small_recipe("conv-2", "cifar-10", data__augment=augment, model__batch_norm=True)
    engine, _ = masked_engine(recipe, random_source("cifar-10"), precision=precision, channels_last="on")
    batch = next(iter(engine._loader.batches(0, 1)))
    fake_step(engine, batch)
    inner = engine._step._loss_and_hits

    def reads(*inputs):
        loss, hits = inner(*inputs)
        return loss * loss.item(), hits

    engine._step._loss_and_hits = reads  # the check itself can fail: a planted read is found
    with pytest.raises(DataDependentOutputException):
        fake_step(engine, batch)


def test_learning_rate_is_a_device_scalar_with_one_address():
    recipe = small_recipe(schedule__warmup=4, schedule__milestones=[8], train__optimizer="sgd")
    engine, _ = masked_engine(recipe, random_source("digits"))
    lr = engine._optimizer.lr
    seen = []
    for i in range(10):
        engine.run(i, i + 1)
        seen.append(float(engine._optimizer.lr))
    assert engine._optimizer.lr is lr and lr.ndim == 0
    full = recipe.train.lr
    expected = [0, full / 4, full / 2, 3 * full / 4, *[full] * 4, *[full / 10] * 2]
    assert seen == pytest.approx(expected, rel=1e-6)


def test_denormals_are_flushed_by_every_thread_while_an_engine_computes():
    with host.settings(2):
        tiny = torch.full((1 << 20,), 1e-38)
        assert int(((tiny * 0.01) != 0).sum()) == 0


def test_training_flushes_denormals_and_gives_the_process_its_arithmetic_back():
    engine, _ = masked_engine(small_recipe(), random_source("digits"), threads=1)
    torch.set_num_threads(2)
    seen = []
    inner = engine._step._loss_and_hits

    def noted(*inputs):
        seen.append((host.flushes_denormals(), torch.get_num_threads()))
        return inner(*inputs)

    engine._step._loss_and_hits = noted
    assert not host.flushes_denormals()
    engine.run(0, 1)
    engine.evaluate("test")
    assert seen == [(True, 1)]
    assert not host.flushes_denormals() and torch.get_num_threads() == 2


def test_both_loaders_train_the_same_bits(tmp_path, monkeypatch):
    pytest.importorskip("ffcv", reason="FFCV is optional")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda _: str(tmp_path))
    recipe = small_recipe("conv-2", "cifar-10", data__augment="flip-crop", train__batch_size=16)
    weights = []
    for loader in ("resident", "ffcv"):
        engine, _ = masked_engine(recipe, random_source("cifar-10"), loader=loader)
        engine.run(0, 4)
        engine.run(4, 10)
        weights.append({n: t.clone() for n, t in engine.weights().items()})
        engine._loader.close()
    assert_same_bits(*weights)


def test_facts_about_digits_are_those_of_its_images():
    from fastlth.data.sources import data_root, load

    source = load("digits", data_root())
    facts = DATASETS["digits"]
    assert (len(source.train.labels), len(source.test.labels)) == (facts.train, facts.test)
    assert source.train.pixels.mean() / 255 == pytest.approx(facts.mean[0], abs=1e-4)
    assert source.train.pixels.std() / 255 == pytest.approx(facts.std[0], abs=1e-4)


@pytest.mark.parametrize("before", [(True, False), (True, True), (False, False)])
def test_writes_in_any_order_leave_the_choice_of_algorithms_as_it_was(before):
    deterministic, warn_only = before
    try:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        with contextlib.suppress(KeyError), host.any_order():
            assert not torch.are_deterministic_algorithms_enabled()
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)
