"""Shifted products: the gradients of a convolution in float64, whatever its shape; chosen once, layer by layer."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlth import running
from fastlth.errors import RecipeError, Stopped
from fastlth.happenings import Started
from fastlth.models import skeleton
from fastlth.recipe import ComputeSection
from fastlth.training import resolve, shifted
from fastlth.training.engines.make import make_engine
from tests.helpers import (
    assert_close_by_norm,
    assert_masked,
    compute,
    half_masks,
    random_source,
    small_recipe,
)  # fmt: skip

BOTH = ("conv1.weight", "conv2.weight", "conv2.input")
# kernel, stride, padding
GEOMETRIES = [(3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (3, 1, 0), ((2, 3), (2, 1), (0, 2)), (5, 3, 2)]
# batch, channels in, channels out, height, width
SHAPES = [(3, 5, 4, 4, 4), (1, 3, 7, 5, 3), (2, 1, 1, 6, 7), (4, 2, 3, 1, 1), (2, 6, 5, 2, 2), (1, 1, 1, 9, 2)]


def pair(kernel, stride, padding, channels, out, layout):
    """A convolution with both gradients shifted, and itself in float64."""
    torch.manual_seed(0)
    ours, exact = (nn.Sequential(nn.Conv2d(channels, out, kernel, stride, padding)) for _ in range(2))
    exact.load_state_dict(ours.state_dict())
    shifted.swap(ours, ["0.weight", "0.input"])
    return ours.to(memory_format=layout), exact.double()


def gradients(net, x, dy, **autocast):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", **(autocast or {"enabled": False})):
        y = net(x)
    y.backward(dy.to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gradients_are_those_of_a_convolution_in_float64(geometry, precision, layout):
    kernel, stride, padding = geometry
    tried = 0
    for batch, channels, out, height, width in SHAPES:
        ours, exact = pair(kernel, stride, padding, channels, out, layout)
        x = torch.randn(batch, channels, height, width).to(memory_format=layout)
        if any(n + 2 * p < k for n, k, p in zip((height, width), exact[0].kernel_size, exact[0].padding, strict=True)):
            continue  # no output at all: the library refuses it too
        tried += 1
        dy = torch.randn(exact(x.double()).shape).to(memory_format=layout)
        bf16 = {"dtype": torch.bfloat16} if precision == torch.bfloat16 else {}
        found, expected = gradients(ours, x, dy, **bf16), gradients(exact, x.double(), dy.double())
        # of absolute values: what an error is small against, where terms cancel
        scale = pair(kernel, stride, padding, channels, out, layout)[1]
        for p in scale.parameters():
            p.data.abs_()
            p.grad = None
        scales = gradients(scale, x.double().abs(), dy.double().abs())
        for a, b, size in zip(found[1:], expected[1:], scales[1:], strict=True):
            assert a.dtype == torch.float32
            assert float((a - b).norm()) <= (1e-6 if precision == torch.float32 else 1e-2) * float(size.norm())
        weight = ours[0].weight
        assert weight.grad.stride() == weight.stride()  # fused optimizers do not look at strides
    assert tried >= 3


def test_layouts_that_autograd_may_hand_on():
    """Gradients come as expanded or transposed views as well."""
    ours, exact = pair(3, 1, 1, 4, 6, torch.channels_last)
    x = torch.randn(2, 4, 5, 3)
    for dy in (torch.randn(1, 6, 1, 1).expand(2, 6, 5, 3), torch.randn(2, 6, 3, 5).transpose(2, 3)):
        for net in (ours, exact):
            net.zero_grad()
        for a, b in zip(gradients(ours, x, dy), gradients(exact, x.double(), dy.double()), strict=True):
            assert_close_by_norm(a.double(), b, 1e-6)


@pytest.mark.parametrize("names", [("0.weight",), ("0.input",)])
def test_the_other_gradient_stays_the_librarys(names, monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    shifted.swap(net, names)
    asked = []
    real = shifted.library

    def noted(*inputs):
        asked.append(inputs[5])
        return real(*inputs)

    monkeypatch.setattr(shifted, "library", noted)
    x, dy = torch.randn(2, 3, 4, 4), torch.randn(2, 4, 4, 4)
    gradients(net, x, dy)
    assert asked == [["0.input" not in names, "0.weight" not in names, False]]


def test_swapping_changes_no_name_and_no_evaluation():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False))
    before, x = dict(net.named_parameters()), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        expected = net(x)
    shifted.swap(net, ["0.weight", "2.weight", "2.input"])
    assert all(p is before[n] for n, p in net.named_parameters())
    with torch.no_grad():
        assert torch.equal(net(x), expected)
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("names", [["conv9.weight"], ["conv1.bias"], ["conv1"], ["fc1.weight"], ["conv1.weight", ""]])
def test_a_name_that_is_no_gradient_of_a_convolution_is_refused(names):
    recipe = small_recipe("conv-2", "digits", compute__shifted=names)
    with pytest.raises(RecipeError, match=r"compute\.shifted must hold gradients such as \['conv1\.weight'"):
        running.check(recipe)


def test_a_net_without_convolutions_has_nothing_to_shift():
    with pytest.raises(RecipeError, match="must be empty for this net"):
        running.check(small_recipe(compute__shifted=["fc1.weight"]))
    with pytest.raises(RecipeError, match="auto alone"):
        small_recipe(compute__shifted=["auto", "conv1.weight"])


def test_kinds_of_convolution_it_does_not_know_are_left_alone():
    for layer in (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3, padding="same"),
                  nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")):  # fmt: skip
        with pytest.raises(RecipeError):
            shifted.swap(nn.Sequential(layer), ["0.weight"])


# ---- in training


def trained(precision, names, density=0.3, **settings):
    recipe = small_recipe("conv-2", "digits", model__batch_norm=True, **settings)
    changed = compute(recipe, precision=precision, channels_last="on", shifted=names)
    engine = make_engine(dataclasses.replace(recipe, compute=changed), random_source("digits"))
    start = {n: t.clone() for n, t in engine.weights().items()}
    masks = half_masks({n: start[n] for n in engine.weight_names}, density)
    engine.set_masks(masks)
    engine.rewind(start)
    for i in range(3):
        engine.run(i, i + 1)
        assert_masked(engine.weights(), masks)
    return engine


OPTIMIZERS = {
    "adam": {"train__weight_decay": 1e-3},
    "sgd": {"train__optimizer": "sgd", "train__lr": 0.05, "train__momentum": 0.9},
}


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_three_steps_equal_the_librarys(optimizer, precision, tolerance):
    theirs, ours = (trained(precision, names, **OPTIMIZERS[optimizer]) for names in ((), BOTH))
    assert isinstance(ours.model.conv2, shifted.ShiftedConv2d)
    assert not isinstance(theirs.model.conv2, shifted.ShiftedConv2d)
    assert list(ours.state()) == list(theirs.state())
    for name, weight in theirs.weights().items():
        if name.endswith("weight"):
            assert_close_by_norm(ours.weights()[name], weight, tolerance)
    assert ours.interval().loss == pytest.approx(theirs.interval().loss, rel=tolerance)


def test_nothing_in_the_step_is_read_by_the_host():
    engine = trained("bf16", BOTH)
    batch = next(iter(engine._loader.batches(0, 1)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        engine._step(batch)


# ---- the choice


def test_each_distinct_layer_is_timed_once_and_the_first_input_never():
    recipe = small_recipe("vgg19", "cifar-10")
    asked = []

    def ratio(which, layer, shape, dtype, layout):
        asked.append((which, shape, layer.out_channels))
        assert (dtype, layout) == (torch.bfloat16, torch.channels_last)
        return 1.2 if shape[2] == 2 or (which == "weight" and shape[2] == 4) else 1.05

    chosen = shifted.faster(skeleton(recipe), (3, 32, 32), 64, "bf16", channels_last=True, time_both=ratio)
    expected = [f"conv{i}.weight" for i in range(9, 13)]
    expected += [f"conv{i}.{which}" for i in range(13, 17) for which in ("weight", "input")]
    assert list(chosen) == expected
    assert len(asked) == len(set(asked)) == 10  # five shapes of maps of at most 8x8
    asked.clear()
    small = skeleton(small_recipe("conv-2", "digits"))
    shifted.faster(small, (1, 8, 8), 64, "bf16", channels_last=True, time_both=ratio)
    assert asked == [("weight", (64, 1, 8, 8), 64), ("weight", (64, 64, 8, 8), 64), ("input", (64, 64, 8, 8), 64)]


def test_a_ratio_is_the_librarys_time_by_ours(monkeypatch):
    layer = nn.Conv2d(4, 4, 3, padding=1)
    clock = itertools.chain([9.0, 3.0, 8.0, 2.0], itertools.cycle([3.0, 2.0]))  # two first calls of either, then pairs
    monkeypatch.setattr(shifted, "_seconds", lambda call: next(clock))
    monkeypatch.setattr(shifted, "PAIR_SECONDS", 0.0)
    ratio = shifted._ratio("weight", layer, (2, 4, 4, 4), torch.float32, torch.channels_last)
    assert ratio == pytest.approx(1.5)
    for first in ([9.0, 1.0, 4.0], [9.0, 1.0, 2.0, 4.0]):  # hopeless at the first or the second try
        hopeless = iter(first)
        monkeypatch.setattr(shifted, "_seconds", lambda call, left=hopeless: next(left))
        assert shifted._ratio("input", layer, (2, 4, 4, 4), torch.float32, torch.channels_last) == 0.25


def resolved_with(monkeypatch, names, **settings):
    monkeypatch.setattr(shifted, "faster", lambda *_, **__: names)
    recipe = small_recipe("conv-2", "digits", **{"compute__shifted": ["auto"], **settings})
    return resolve.resolve(recipe, lambda r: make_engine(r, random_source("digits"))).compute


def test_auto_is_measured_on_a_cpu_without_compilation(monkeypatch):
    assert resolved_with(monkeypatch, BOTH).shifted == BOTH
    assert resolved_with(monkeypatch, ()).shifted == ()
    assert resolved_with(monkeypatch, BOTH, compute__shifted=[]).shifted == ()
    assert resolved_with(monkeypatch, (), compute__shifted=list(BOTH)).shifted == BOTH
    assert resolved_with(monkeypatch, BOTH, compute__compile="on").shifted == ()


def test_a_resume_keeps_the_choice(tmp_path, monkeypatch):
    source = random_source("digits")
    monkeypatch.setattr(running, "load_for", lambda *_: source)
    monkeypatch.setattr(shifted, "faster", lambda *_, **__: BOTH)
    recipe = small_recipe("conv-2", "digits", compute__shifted=["auto"], prune__rounds=1, train__iterations=20)
    seen = []
    whole = running.run(recipe, out=tmp_path / "whole")
    with pytest.raises(Stopped):
        running.run(recipe, out=tmp_path / "parts", show=seen.append, stopped=lambda: 15)
    monkeypatch.setattr(shifted, "faster", lambda *_, **__: pytest.fail("chosen anew"))
    parts = running.run(recipe, out=tmp_path / "parts", show=seen.append)
    assert [e.compute.shifted for e in seen if isinstance(e, Started)] == [BOTH, BOTH]
    timing = ("seconds", "images_per_second")
    first, second = ([{k: v for k, v in r.items() if k not in timing} for r in s.rounds] for s in (whole, parts))
    assert first == second


def test_the_default_moves_no_digest_and_a_list_is_a_tuple():
    recipe = small_recipe("conv-2", "digits")
    assert recipe.compute.shifted == ("auto",)
    plain = {k: v for k, v in recipe.to_dict()["compute"].items() if k != "shifted"}
    without = dataclasses.replace(recipe, compute=ComputeSection(**plain))
    assert without.digest == recipe.digest
    listed = dataclasses.replace(recipe, compute=compute(recipe, shifted=["conv1.weight"]))
    assert listed.compute.shifted == ("conv1.weight",) and hash(listed.compute)
    assert listed.digest != recipe.digest
