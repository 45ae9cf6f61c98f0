"""Convolutions and linear layers from their kept weights alone, against plain PyTorch in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastlth_kernels import kept_layer
from fastlth_kernels.kept_layer import KeptLayer

POOL = ThreadPoolExecutor(4)


class Case:
    """A masked convolution with random numbers, and its results by definition."""

    def __init__(self, inputs, outputs, height, width, size=3, density=0.3, images=5, seed=0):
        rng = np.random.default_rng(seed)
        self.mask = rng.random((outputs, inputs, size, size)) < density
        self.w, self.bias = rng.normal(size=self.mask.shape) * self.mask, rng.normal(size=outputs)
        self.x, self.dy = (rng.normal(size=(images, height, width, n)) for n in (inputs, outputs))
        self.height, self.width = height, width

    def layer(self, threads=1, batch=None, dtype=np.float64):
        return KeptLayer(self.mask, self.height, self.width, batch=batch or len(self.x), threads=threads, pool=POOL,
                         dtype=dtype)  # fmt: skip

    def ours(self, layer, dtype=np.float64):
        w = self.w[self.mask].astype(dtype)
        y, dx, g = np.full(self.dy.shape, 7.0, dtype), np.full(self.x.shape, 7.0, dtype), np.full(len(w), 7.0, dtype)
        layer.forward(self.x.astype(dtype), w, self.bias.astype(dtype), y)
        layer.backward(self.dy.astype(dtype), w, g, dx)
        return y, g, dx

    def plain(self):
        x = torch.tensor(self.x.transpose(0, 3, 1, 2), requires_grad=True)
        w = torch.tensor(self.w, requires_grad=True)
        y = F.conv2d(x, w, torch.tensor(self.bias), padding=self.mask.shape[2] // 2)
        y.backward(torch.tensor(self.dy.transpose(0, 3, 1, 2)))
        nhwc = (t.detach().numpy().transpose(0, 2, 3, 1) for t in (y, x.grad))
        y, dx = nhwc
        return y, w.grad.numpy()[self.mask], dx


def error(ours, theirs):
    return max(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300) for a, b in zip(ours, theirs, strict=True))


SHAPES = {
    "a map of tiles": (16, 32, 8, 8, 3), "odd maps": (48, 16, 5, 7, 3), "two by two": (32, 16, 2, 2, 3),
    "three by two": (16, 16, 3, 2, 3), "one column": (16, 16, 3, 1, 3), "one pixel": (32, 48, 1, 1, 3),
    "kernel of one": (16, 16, 4, 4, 1), "kernel of five": (16, 16, 6, 5, 5), "linear": (256, 48, 1, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.4])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_are_those_of_a_masked_convolution(shape, density, threads):
    case = Case(*SHAPES[shape], density=density)
    layer = case.layer(threads)
    for _ in range(2):  # what a step leaves in the buffers does not matter to the next
        assert error(case.ours(layer), case.plain()) < 1e-12


@pytest.mark.parametrize("images", [1, 64, 65])
@pytest.mark.parametrize("shape", ["odd maps", "linear"])
def test_any_number_of_images_up_to_the_batch(shape, images):
    case, full = Case(*SHAPES[shape], images=images), Case(*SHAPES[shape], images=130)
    layer = case.layer(threads=2, batch=130)
    assert error(full.ours(layer), full.plain()) < 1e-12
    assert error(case.ours(layer), case.plain()) < 1e-12


@pytest.mark.parametrize("shape", ["a map of tiles", "two by two", "linear"])
def test_panels_and_little_room_change_nothing(shape, monkeypatch):
    monkeypatch.setattr(kept_layer, "PANEL_BYTES", 1)
    monkeypatch.setattr(kept_layer, "ROOM", 20)
    case = Case(64, 48, *SHAPES[shape][2:], density=0.4)
    layer = case.layer(threads=2)
    assert layer._kept.ahead.panels == 4
    assert error(case.ours(layer), case.plain()) < 1e-12


@pytest.mark.parametrize("shape", ["a map of tiles", "odd maps", "linear"])
def test_float32(shape):
    case = Case(*SHAPES[shape], images=60)
    assert error(case.ours(case.layer(2, dtype=np.float32), np.float32), case.plain()) < 1e-6


def test_bfloat16_goes_in_and_comes_out_rounded_to_nearest_even():
    case = Case(*SHAPES["odd maps"], images=60)
    layer = case.layer(2, dtype=np.float32)
    x, dy = (torch.tensor(a).bfloat16() for a in (case.x, case.dy))
    w = case.w[case.mask].astype(np.float32)
    case.x, case.dy, case.w[case.mask] = x.double().numpy(), dy.double().numpy(), w
    expected = case.ours(layer, np.float32)
    y, dx, g = torch.empty(dy.shape, dtype=torch.bfloat16), torch.empty(x.shape, dtype=torch.bfloat16), np.zeros_like(w)
    words = [t.view(torch.int16).numpy().view(np.uint16) for t in (x, dy, y, dx)]
    layer.forward(words[0], w, case.bias.astype(np.float32), words[2])
    layer.backward(words[1], w, g, words[3])
    assert torch.equal(y, torch.tensor(expected[0]).bfloat16())
    assert torch.equal(dx, torch.tensor(expected[2]).bfloat16())
    assert np.array_equal(g, expected[1])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so_and_touches_its_own_image_only(value):
    case = Case(*SHAPES["a map of tiles"], images=5)
    layer = case.layer()
    clean, _, _ = case.ours(layer)
    case.x[2, 3, 3, 0] = value
    y, g, _ = case.ours(layer)
    others = [0, 1, 3, 4]
    assert not np.isfinite(y[2]).all() and not np.isfinite(g).all()
    assert np.array_equal(y[others], clean[others])


def test_no_gradient_of_the_input_is_made_where_none_is_asked_for():
    case = Case(*SHAPES["a map of tiles"])
    layer, w = case.layer(), case.w[case.mask]
    y, g = np.empty(case.dy.shape), np.empty(len(w))
    layer.forward(case.x, w, case.bias[:0], y)
    layer.backward(case.dy, w, g, np.empty(0))
    expected, gradient, _ = case.plain()
    assert error([y + case.bias, g], [expected, gradient]) < 1e-12


def test_the_same_bits_every_time():
    case = Case(*SHAPES["odd maps"], images=60)
    first, second = (case.ours(case.layer(2, dtype=np.float32), np.float32) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        KeptLayer(np.ones((16, 3, 3, 3), bool), 4, 4, batch=2)
    case = Case(*SHAPES["a map of tiles"])
    layer = case.layer()
    with pytest.raises(ValueError, match="expected contiguous"):
        layer.forward(case.x[:, :4], case.w[case.mask], case.bias, case.dy)
    with pytest.raises(ValueError, match="expected contiguous"):
        layer.forward(np.zeros((6, 8, 8, 16)), case.w[case.mask], case.bias, case.dy)


def test_halves_go_to_even_and_nan_and_infinity_stay():
    """A layer that copies float32 numbers into bfloat16, against torch's own rounding."""
    words = np.random.default_rng(0).integers(0, 2**32, 1600, dtype=np.uint32)
    words[: len(words) // 2] = words[: len(words) // 2] & 0xFFFF0000 | 0x8000  # halfway between two
    words[:6] = [0x7F800000, 0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0x7F7FFFFF, 0xFF7F8000]
    words[words & 0x7F800000 == 0] = 0  # the kernels flush denormals
    x = words.view(np.float32).reshape(100, 1, 1, 16)
    layer = KeptLayer(np.eye(16, dtype=bool).reshape(16, 16, 1, 1), 1, 1, batch=100)
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    layer.forward(x, np.ones(16, np.float32), np.zeros(0, np.float32), y.view(torch.int16).numpy().view(np.uint16))
    expected = torch.tensor(x).bfloat16()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(1.0), expected.nan_to_num(1.0))
