"""Random problems for the masked kernels, their answers in float64, and how near to them a kernel must come.

A sum of n products in fp32 errs by at most n eps (|a| |b|), whatever the order (Higham 2002, section 3.1); a result
that is then rounded to its own type errs by half a unit more. Pruned places of w hold NaN, which must not show.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fastlth_kernels import masked_conv_kernels as conv_kernels
from fastlth_kernels import masked_linear_kernels as linear_kernels
from fastlth_kernels.bitmask import pack
from fastlth_kernels.masked_step import STEPS
from fastlth_kernels.tiles import Tiles
from torch import Tensor

SMALL_TILES = Tiles(32, 32, 32, 4, 2)  # several tiles in every direction, and few elements to interpret
EPS32 = torch.finfo(torch.float32).eps


def assert_near(found: Tensor, exact: Tensor, size: Tensor, terms: int) -> None:
    """``size`` is the sum of the terms' absolute values, ``terms`` their number; both of ``exact``'s definition."""
    assert found.shape == exact.shape
    half_unit = torch.finfo(found.dtype).eps / 2 if found.dtype != torch.float32 else 0.0
    tiny = torch.finfo(found.dtype).smallest_normal
    bound = half_unit * exact.abs() * 1.01 + 2 * (terms + 2) * EPS32 * size + tiny
    error = (found.double() - exact).abs()
    worst = (error - bound).argmax()
    assert bool((error <= bound).all()), (
        f"element {int(worst)}: found {found.flatten()[worst]}, exact {exact.flatten()[worst]}, "
        f"error {error.flatten()[worst]:.3g}, allowed {bound.flatten()[worst]:.3g}"
    )


def assert_no_worse(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The largest error is at most that of PyTorch's result in the same types, plus one unit of the largest value."""
    unit = torch.finfo(plain.dtype).eps * float(exact.abs().max())
    ours, theirs = (float((t.double() - exact).abs().max()) for t in (found, plain))
    assert ours <= theirs + unit, f"error {ours:.3g}, PyTorch's {theirs:.3g}"


def assert_zero_where_pruned(gradient: Tensor, mask: Tensor) -> None:
    pruned = gradient[~mask]
    assert not bool(pruned.any()) and not bool(pruned.signbit().any())


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


@dataclass
class Linear:
    """One problem of ``masked_linear``: sizes R, B, N, K; the masks keep a share ``density`` of the weights."""

    sizes: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    weights: torch.dtype = torch.float32
    density: float = 0.4
    bias: bool = True
    relu: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        (R, B, N, K), generator = self.sizes, torch.Generator().manual_seed(self.seed)
        self.mask = torch.rand(R, N, K, generator=generator) < self.density
        self.bits = pack(self.mask)
        self.w = torch.where(self.mask, _random(generator, R, N, K), torch.nan).to(self.weights)
        self.x, self.dy = _random(generator, R, B, K).to(self.dtype), _random(generator, R, B, N).to(self.dtype)
        self.b = _random(generator, R, N).to(self.weights) if self.bias else None
        # the weight as it enters a product: in x's type
        self.masked = torch.where(self.mask, self.w, 0.0).to(self.dtype).double()

    def forward(self, y: Tensor) -> None:
        x, b = self.x.double(), 0.0 if self.b is None else self.b.double()[:, None]
        exact, size = x @ self.masked.mT + b, x.abs() @ self.masked.abs().mT + abs(b)
        if self.relu:
            exact = exact.relu()
        assert y.dtype == self.dtype
        assert_near(y, exact, size, self.sizes[3] + 1)
        if self.dtype == self.weights != torch.float32:
            plain = self.x @ self.masked.to(self.dtype).mT + (0.0 if self.b is None else self.b[:, None])
            assert_no_worse(y, plain.relu() if self.relu else plain, exact)

    def g(self, y: Tensor) -> Tensor:
        """dy as it is before the ReLU."""
        return torch.where(y > 0, self.dy, 0.0).double() if self.relu else self.dy.double()

    def input_grad(self, dx: Tensor, y: Tensor) -> None:
        g = self.g(y)
        assert dx.dtype == self.dtype
        assert_near(dx, g @ self.masked, g.abs() @ self.masked.abs(), self.sizes[2])

    def weight_grad(self, dw: Tensor, db: Tensor, y: Tensor) -> None:
        g, x = self.g(y), self.x.double()
        assert dw.dtype == self.weights
        exact = torch.where(self.mask, g.mT @ x, 0.0)
        assert_near(dw, exact, g.abs().mT @ x.abs(), self.sizes[1])
        assert_zero_where_pruned(dw, self.mask)
        if self.bias:
            assert_near(db, g.sum(1), g.abs().sum(1), self.sizes[1])
        else:
            assert db.numel() == 0

    def judge_launchers(self, tiles: Tiles | None = SMALL_TILES) -> None:
        """Run the three kernels (under the interpreter, or on a device) and compare."""
        y = linear_kernels.forward(self.x, self.w, self.bits, self.b, self.relu, tiles)
        self.forward(y)
        after_relu = y if self.relu else None
        self.input_grad(linear_kernels.input_grad(self.dy, after_relu, self.w, self.bits, tiles), y)
        gradients = linear_kernels.weight_grad(self.dy, after_relu, self.x, self.w, self.bits, self.bias, tiles)
        self.weight_grad(*gradients, y)


@dataclass
class Conv:
    """One problem of ``masked_conv2d``: x is [B, IN, H, W]; OUT filters of ``taps`` rows and columns."""

    sizes: tuple[int, int, int, int, int]  # B, IN, H, W, OUT
    taps: int | tuple[int, int] = 3
    stride: int = 1
    padding: int = 1
    dtype: torch.dtype = torch.float32
    weights: torch.dtype = torch.float32
    density: float = 0.4
    bias: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        (B, IN, H, W, OUT), generator = self.sizes, torch.Generator().manual_seed(self.seed)
        kh, kw = (self.taps, self.taps) if isinstance(self.taps, int) else self.taps
        self.mask = torch.rand(OUT, IN, kh, kw, generator=generator) < self.density
        self.bits = pack(self.mask.permute(0, 2, 3, 1))
        self.w = torch.where(self.mask, _random(generator, OUT, IN, kh, kw), torch.nan).to(self.weights)
        self.x = _random(generator, B, IN, H, W).to(self.dtype)
        self.b = _random(generator, OUT).to(self.weights) if self.bias else None
        self.masked = torch.where(self.mask, self.w, 0.0).to(self.dtype).double()
        rows, columns = ((n + 2 * self.padding - k) // self.stride + 1 for n, k in ((H, kh), (W, kw)))
        self.dy = _random(generator, B, OUT, rows, columns).to(self.dtype)

    def _plain(self, x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, self.stride, self.padding)

    def _gradients(self, dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        dx, dw = torch.autograd.grad(self._plain(x, w), (x, w), dy)
        return dx, dw

    def forward(self, y: Tensor) -> None:
        x, b = self.x.double(), 0.0 if self.b is None else self.b.double()[:, None, None]
        exact = self._plain(x, self.masked) + b
        assert y.dtype == self.dtype and y.is_contiguous(memory_format=torch.channels_last)
        assert_near(y, exact, self._plain(x.abs(), self.masked.abs()) + abs(b), self.mask[0].numel() + 1)
        if self.dtype == self.weights != torch.float32:
            plain = self._plain(self.x, self.masked.to(self.dtype)) + (0.0 if self.b is None else self.b[:, None, None])
            assert_no_worse(y, plain, exact)

    def input_grad(self, dx: Tensor) -> None:
        exact, _ = self._gradients(self.dy.double(), self.x.double(), self.masked)
        size, _ = self._gradients(self.dy.double().abs(), self.x.double(), self.masked.abs())
        assert dx.dtype == self.dtype and dx.is_contiguous(memory_format=torch.channels_last)
        assert_near(dx, exact, size, self.mask[:, 0].numel())

    def weight_grad(self, dw: Tensor) -> None:
        _, exact = self._gradients(self.dy.double(), self.x.double(), self.masked)
        _, size = self._gradients(self.dy.double().abs(), self.x.double().abs(), self.masked)
        assert dw.dtype == self.weights
        assert_near(dw, torch.where(self.mask, exact, 0.0), size, self.dy[:, 0].numel())
        assert_zero_where_pruned(dw, self.mask)

    def judge_launchers(self, tiles: Tiles | None = SMALL_TILES, parts: int | None = 2) -> None:
        """Run the kernels (under the interpreter, or on a device) and compare."""
        at = (self.stride, self.padding)
        self.forward(conv_kernels.forward(self.x, self.w, self.bits, self.b, *at, tiles))
        self.input_grad(conv_kernels.input_grad(self.dy, self.w, self.bits, *self.x.shape[2:], *at, tiles))
        few = tiles and tiles._replace(inner=16)  # pixels at a time: a few of them already make several parts
        for deterministic in (True, False):
            dw = conv_kernels.weight_grad(self.dy, self.x, self.w, self.bits, *at,
                                          deterministic=deterministic, parts=parts, config=few)  # fmt: skip
            self.weight_grad(dw)


def batched_lenet_step(
    x: Tensor, labels: Tensor, w: list[Tensor], b: list[Tensor], bits: list[Tensor], moments: list[list[Tensor]],
    settings: Tensor,
) -> None:  # fmt: skip
    """Forward, backward and Adam of R nets of three layers, in eight launches; no gradient of a weight is stored.

    x [R, B, K], labels [R, B]; per layer w [R, N, K], b [R, N] and their moments (m, v, of b m, v) change in place."""
    activations = [x]
    for i in range(3):
        activations.append(linear_kernels.forward(activations[i], w[i], bits[i], b[i], i < 2))
    logits = activations[3].requires_grad_()
    loss = torch.stack([F.cross_entropy(own, target) for own, target in zip(logits, labels, strict=True)]).sum()
    (dy,) = torch.autograd.grad(loss, logits)
    settings[STEPS] += 1
    for i in (2, 1, 0):
        y = activations[i + 1] if i < 2 else None
        dx = linear_kernels.input_grad(dy, y, w[i], bits[i]) if i else dy  # from the weights before their update
        m, v, bias_m, bias_v = moments[i]
        linear_kernels.adam_step(dy, y, activations[i], bits[i], w[i], m, v, b[i], bias_m, bias_v, settings, False)
        dy = dx
