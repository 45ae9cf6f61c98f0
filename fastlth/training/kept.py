"""Layers that run from their kept weights alone, on a CPU, in rounds at or below a density of their own.

Such a layer's weight is a flat tensor of the kept values, in the mask's order: the loss has its gradient for these
alone, and the optimizer moves them and nothing else. So pruned weights cannot change, and forward pass, both gradients
and update cost what is kept. The products are made by ``fastlth_kernels.kept_cpu``, in the weights' precision: with
bf16 autocast from bf16 activations and unrounded float32 weights, summed in float32, rounded once at the layer's end.

The dense weight stays the model's parameter, with pruned weights at +0.0: ``write_back`` brings it up to date, and
``read_in`` takes over what was written there.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastlth.errors import RecipeError
from fastlth.models import skeleton
from fastlth.recipe import ComputeSection, Recipe

if TYPE_CHECKING:  # imports numba
    from fastlth_kernels.kept_layer import KeptLayer

Layer = nn.Conv2d | nn.Linear
Array = NDArray[Any]

GROUP = 16
"""channels that the kernels turn at a time"""
LANES = 64
"""images that the kernels take at a time"""


def candidates(model: nn.Module) -> dict[str, Layer]:
    """The layers that can run from kept weights, by name: linear ones and convolutions of stride 1 with odd square
    kernels and padding that keeps the size, if their channels are multiples of 16."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and _can(m)}


def _can(layer: Layer) -> bool:
    if layer.weight.shape[0] % GROUP or layer.weight.shape[1] % GROUP:
        return False
    if isinstance(layer, nn.Linear):
        return True
    size = layer.kernel_size[0]
    plain = layer.groups == 1 and layer.padding_mode == "zeros"
    centred = size % 2 == 1 and layer.kernel_size == (size, size) and layer.padding == (size // 2, size // 2)
    return plain and centred and layer.stride == (1, 1) and layer.dilation == (1, 1)


def unsupported(recipe: Recipe, compute: ComputeSection) -> str | None:
    """Why no layer can run from its kept weights in the dense engine, as a clause; None if some can."""
    if compute.device not in ("auto", "cpu"):
        return f"the device is {compute.device}"
    if compute.compile == "on":
        return "compute.compile is on"
    if recipe.model.own:
        return "one's own net may use a layer twice in a step"
    if recipe.prune.fills:
        return f"mask-0 action {recipe.prune.mask_0} keeps pruned weights at other values than 0"
    if find_spec("numba") is None:
        return "numba is not installed"
    return None


def check(recipe: Recipe) -> None:
    """Raises RecipeError where ``compute.kept`` names layers that cannot run from their kept weights."""
    if recipe.compute.kept and (reason := unsupported(recipe, recipe.compute)):
        raise RecipeError(f"compute.kept must be empty, since {reason}")
    _check_names(skeleton(recipe), recipe.compute.kept)


def _check_names(model: nn.Module, limits: Mapping[str, float]) -> None:
    able = list(candidates(model))
    for name in limits:
        if name not in able:
            raise RecipeError(f"compute.kept must name layers such as {able[:2]}, got {name!r}"
                              if able else f"compute.kept must be empty for this net, got {name!r}")  # fmt: skip


class KeptLayers:
    """Those layers of ``model`` that run from kept weights in this round; none at first.

    ``limits``: layer name -> density at or below which it does. ``batch``: the largest number of images of a training
    step. Raises RecipeError for a layer that cannot, or that ``model`` has not.
    """

    def __init__(self, model: nn.Module, limits: Mapping[str, float], *, batch: int, threads: int) -> None:
        _check_names(model, limits)
        layers = candidates(model)
        self._layers = {f"{name}.weight": layers[name] for name in limits}
        self._limits = {f"{name}.weight": limit for name, limit in limits.items()}
        self._batch, self._threads = batch, threads
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="fastlth") if limits and threads > 1 else None
        self._running: dict[str, _Running] = {}

    def choose(self, masks: Mapping[str, Tensor]) -> bool:
        """Take the layers whose masks are at or below their limits. Whether anything is kept now, or was before."""
        was = bool(self._running)
        for name in self._running:
            del self._layers[name].__dict__["forward"]
        self._running = {}
        for name, limit in self._limits.items():
            if name in masks and float(masks[name].float().mean()) <= limit:
                self._running[name] = _Running(self._layers[name], masks[name], self._batch, self._threads, self._pool)
                self._layers[name].__dict__["forward"] = self._running[name]  # until the next choice
        return was or bool(self._running)

    @property
    def values(self) -> dict[str, Tensor]:
        """Weight name -> the flat tensor of its kept values, with a gradient after a backward pass."""
        return {name: one.values for name, one in self._running.items()}

    def write_back(self) -> None:
        """Bring the dense weights up to date."""
        for one in self._running.values():
            one.layer.weight.data[one.mask] = one.values.detach()

    def read_in(self) -> None:
        """Take the kept values from the dense weights."""
        for one in self._running.values():
            one.values.data.copy_(one.layer.weight.detach()[one.mask])

    def whole(self, name: str, values: Tensor) -> Tensor:
        """A tensor of the optimizer's, of weight ``name``, in the weight's shape: pruned ones are 0."""
        if name not in self._running or values.dim() == 0:
            return values
        full = torch.zeros_like(self._running[name].layer.weight)
        full[self._running[name].mask] = values
        return full

    def part(self, name: str, full: Tensor) -> Tensor:
        """The inverse of ``whole``."""
        return full[self._running[name].mask] if name in self._running and full.dim() else full


class _Running:
    """What stands in for a layer's ``forward`` in a round."""

    def __init__(
        self, layer: Layer, mask: Tensor, batch: int, threads: int, pool: ThreadPoolExecutor | None
    ) -> None:  # fmt: skip
        self.layer, self.mask = layer, mask.clone()
        self.values = layer.weight.detach()[mask].requires_grad_()
        self._batch = -(-batch // LANES) * LANES
        self._threads, self._pool = threads, pool
        self._laid_out: KeptLayer | None = None
        self.turn = 0
        """number of forward passes, of which only the last one has a backward pass"""

    def __call__(self, x: Tensor) -> Tensor:
        """[B, C, H, W] or [B, C] -> the same with O instead of C, of autocast's type."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        pixels = x.permute(0, 2, 3, 1) if x.dim() == 4 else x[:, None, None, :]
        if torch.is_grad_enabled():
            y: Tensor = _Product.apply(pixels, self.values, self.layer.bias, self, dtype)
        else:
            y = torch.cat([self.forward(part, self.values, dtype) for part in torch.split(pixels, self._batch)])
        return y.permute(0, 3, 1, 2) if x.dim() == 4 else y[:, 0, 0]

    def forward(self, x: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.detach().contiguous()
        if self._laid_out is None:  # the first images say how large they are
            self._laid_out = self._lay_out(x.shape[1], x.shape[2])
        bias = self.layer.bias
        y = torch.empty(*x.shape[:3], self.layer.weight.shape[0], dtype=dtype)
        numbers = values.detach()[:0] if bias is None else bias.detach()
        self._laid_out.forward(_array(x), _array(values), _array(numbers), _array(y))
        self.turn += 1
        return y

    def backward(self, dy: Tensor, values: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of the kept values, and of x in ``dtype`` if there is one."""
        assert self._laid_out is not None
        g = torch.empty_like(values)
        dx = torch.empty(*dy.shape[:3], self.layer.weight.shape[1], dtype=dtype) if dtype else None
        there = _array(g)[:0] if dx is None else _array(dx)
        self._laid_out.backward(_array(dy.contiguous()), _array(values), _array(g), there)
        return g, dx

    def _lay_out(self, height: int, width: int) -> KeptLayer:
        from fastlth_kernels.kept_layer import KeptLayer

        mask = self.mask.contiguous().numpy()
        return KeptLayer(mask.reshape(*mask.shape, *(1,) * (4 - mask.ndim)), height, width, batch=self._batch,
                         threads=self._threads, pool=self._pool, dtype=_array(self.values).dtype)  # fmt: skip


def _array(tensor: Tensor) -> Array:
    """The tensor's memory as numpy knows it: bfloat16, which it does not know, as uint16."""
    tensor = tensor.detach()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


class _Product(torch.autograd.Function):
    """y [B, H, W, O] from x [B, H, W, C]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: _Running, dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        y = layer.forward(x, values, dtype)
        ctx.save_for_backward(values)
        ctx.layer, ctx.turn, ctx.x = layer, layer.turn, x.dtype
        ctx.bias = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (values,) = ctx.saved_tensors
        if ctx.turn != ctx.layer.turn:
            raise RuntimeError("a layer run from its kept weights has one backward pass, before its next forward pass")
        ctx.layer.turn += 1  # the backward pass uses up what the forward pass left
        g, dx = ctx.layer.backward(dy, values, ctx.x if ctx.needs_input_grad[0] else None)
        db = dy.sum((0, 1, 2), dtype=ctx.bias) if ctx.bias is not None else None
        return dx, g, db, None, None
