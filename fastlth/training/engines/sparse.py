"""The sparse engine: a fully connected net on a CPU, each layer from its kept weights alone where that is faster.

A whole evaluation interval is one compiled call (`fastlth_kernels.interval_cpu`); a round's cost falls with its
density. Layers above the break-even density, which ``recipe.compute`` holds, run dense in register tiles.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastlth import specs
from fastlth.data.normalise import table
from fastlth.data.order import Order
from fastlth.data.sources import Images
from fastlth.models import build, skeleton, state, weight_names
from fastlth.models.dropout import DroppedLinear
from fastlth.pruning import layer_rates
from fastlth.recipe import Recipe
from fastlth.training.engines.base import Chunk, Tensors
from fastlth.training.engines.record import Record
from fastlth.training.evaluate import Scores
from fastlth.training.schedule import lr_at

Array = NDArray[Any]

PIXELS = 16
"""pixels that the kernels turn at a time"""
SEEN = 4096
"""images that say how often each pixel is black: the order in which they are summed, not what they are"""


def unsupported(recipe: Recipe) -> str | None:
    """Why this engine cannot train the recipe on a CPU, as a clause; None if it can."""
    net = skeleton(recipe)
    kinds = [nn.Linear if type(m) is DroppedLinear else type(m) for m in net.children()]
    linear = kinds.count(nn.Linear)
    expected = [nn.Flatten, *[nn.Linear, nn.ReLU] * (linear - 1), nn.Linear]
    chain = type(net) is nn.Sequential and len(weight_names(net)) == linear  # no weight twice
    if not chain or kinds != expected or any(m.bias is None for m in _linear(net)):
        return f"{recipe.model.name} is not a stack of fully connected layers with ReLU between them"
    if recipe.model.dropout:
        return f"model.dropout is {recipe.model.dropout:g}"
    if specs.folder(recipe.data.name) is not None:
        return "images of a folder are not kept in memory"
    if recipe.data.augment != "none":
        return f"data.augment is {recipe.data.augment}"
    channels = table(recipe.data.facts, recipe.data.normalise).shape[0]
    if _linear(net)[0].in_features // channels % PIXELS:
        return f"images of {_linear(net)[0].in_features} pixels do not divide by {PIXELS}"
    if recipe.prune.fills:
        return f"mask-0 action {recipe.prune.mask_0} keeps pruned weights at other values than 0"
    compute = recipe.compute
    for setting, value, good in (
        ("precision", compute.precision, ("auto", "fp32")), ("compile", compute.compile, ("auto", "off")),
        ("loader", compute.loader, ("auto", "resident")), ("kernels", compute.kernels, ("auto", "torch")),
    ):  # fmt: skip
        if value not in good:
            return f"compute.{setting} is {value}"
    if find_spec("numba") is None:
        return "numba is not installed"
    return None


def _linear(net: nn.Module) -> list[nn.Linear]:
    return [m for m in net.children() if isinstance(m, nn.Linear)]


class SparseEngine:
    """``recipe.compute`` is resolved: threads, and the density at or below which a layer runs from kept weights."""

    name = "sparse"

    def __init__(self, recipe: Recipe, order: Order, splits: dict[str, Images]) -> None:
        from fastlth_kernels import mlp_cpu  # imports numba

        self._recipe, self._order, self._mlp = recipe, order, mlp_cpu
        self.said: list[str] = []
        model = build(recipe)
        self.weight_names = weight_names(model)
        self.prunable = list(layer_rates(self.weight_names, recipe.prune))
        start = {name: t.detach().clone() for name, t in state(model).items()}
        self._biases = {w: f"{w.removesuffix('.weight')}.bias" for w in self.weight_names}
        threads = recipe.compute.threads
        self._pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="fastlth") if threads > 1 else None
        self._splits = {name: _flat(images) for name, images in splits.items()}
        self._scales, self._shifts = _affine(recipe, int(start[self.weight_names[0]].shape[1]))
        pixels = self._splits["train"][0].reshape(-1, len(self._scales) * PIXELS)
        self._lit = (pixels[:SEEN] != 0).mean(0)
        train = recipe.train
        self._optimizer = mlp_cpu.Optimizer(
            train.optimizer, train.momentum, train.nesterov, train.weight_decay, train.betas, train.eps
        )
        self._slots = {"momentum_buffer": "m"} if train.momentum else {}
        if train.optimizer != "sgd":
            self._slots = {"exp_avg": "m", "exp_avg_sq": "v"}
        self._steps = 0
        self._masks = {w: torch.ones_like(start[w], dtype=torch.bool) for w in self.weight_names}
        self._layout: dict[str, bool] = {}
        self._net = self._laid_out()
        self._write(start)
        self._record = Record.of(recipe.evaluate.every)

    @property
    def layers(self) -> dict[str, str]:
        """How each layer runs now: "dense", or "kept" (from its kept weights alone)."""
        return {name.removesuffix(".weight"): "dense" if dense else "kept" for name, dense in self._layout.items()}

    def _laid_out(self) -> Any:
        limit = self._recipe.compute.break_even
        self._layout = {w: float(m.float().mean()) > limit for w, m in self._masks.items()}
        return self._mlp.MaskedMlp(
            [m.numpy() for m in self._masks.values()], list(self._layout.values()), self._optimizer,
            self._scales, self._shifts, batch=self._recipe.train.batch_size, lit=self._lit,
            threads=self._recipe.compute.threads, pool=self._pool,
        )  # fmt: skip

    def set_masks(self, masks: Tensors) -> None:
        """Lays the net out anew: the only thing here that takes longer than a copy (20 ms for LeNet-300-100)."""
        weights = self.weights()
        for name, mask in masks.items():
            self._masks[name] = mask.clone()
        self._net = self._laid_out()
        self._write(weights)

    def rewind(self, start: Tensors) -> None:
        self._write(start)
        for slot in self._slots.values():
            self._net.clear(slot)
        self._steps = 0
        self._record.clear()

    def run(self, first: int, last: int) -> Chunk:
        train, schedule, record = self._recipe.train, self._recipe.schedule, self._record
        chosen, bounds = self._batches(first, last)
        rates = np.array([lr_at(i, train.lr, schedule) for i in range(first, last)])
        pixels, labels = self._splits["train"]
        losses, hits = self._net.train(self._mlp.Images(pixels, labels, chosen), bounds, rates, self._steps)
        self._steps += last - first
        rows = slice(record.rows, record.rows + last - first)
        record.losses[rows] = torch.from_numpy(losses)
        record.hits[rows] = torch.from_numpy(hits)
        record.images[rows] = torch.from_numpy(np.diff(bounds))
        record.advance(last - first)
        return record.chunk(first, last)

    def _batches(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Images of the iterations [first, last), and where each batch begins and ends among them."""
        parts: list[list[int]] = []
        bounds = [0]
        for iteration in range(first, last):
            epoch, begin, end = self._order.place(iteration)
            bounds.append(bounds[-1] + end - begin)
            if parts and parts[-1][0] == epoch:
                parts[-1][2] = end
            else:
                parts.append([epoch, begin, end])
        chosen = np.concatenate([self._order.epoch(epoch)[begin:end] for epoch, begin, end in parts])
        return chosen.astype(np.int64), np.array(bounds)

    def interval(self) -> Scores:
        return self._record.read()

    def evaluate(self, split: str, images: int | None = None) -> Scores:
        pixels, labels = self._splits[split]
        chosen = np.arange(len(labels[:images]))
        loss, hits = self._net.scores(self._mlp.Images(pixels, labels, chosen))
        return Scores(loss / len(chosen), hits / len(chosen))

    def weights(self) -> dict[str, Tensor]:
        return self._read("w")

    def state(self) -> dict[str, Tensor]:
        steps = torch.tensor(float(self._steps))
        moments = {slot: self._read(place) for slot, place in self._slots.items()}
        if self._recipe.train.optimizer != "sgd":
            moments["step"] = {name: steps.clone() for name in self.weights()}
        return {
            **{f"model/{n}": t for n, t in self.weights().items()},
            **{f"optimizer/{n}/{slot}": t for slot, tensors in moments.items() for n, t in tensors.items()},
            **self._record.state(),
        }  # fmt: skip

    def load_state(self, state: Tensors) -> None:
        names = list(self.weights())
        self._write({n: state[f"model/{n}"] for n in names})
        for slot, place in self._slots.items():
            self._write({n: state[f"optimizer/{n}/{slot}"] for n in names}, place)
        if self._recipe.train.optimizer != "sgd":
            self._steps = int(state[f"optimizer/{names[0]}/step"])
        for name, tensor in self._record.state().items():
            tensor.copy_(state[name])

    def _read(self, place: str) -> dict[str, Tensor]:
        tensors = {}
        for number, (weight, bias) in enumerate(self._biases.items()):
            values = self._net.read(number, place)
            tensors[weight], tensors[bias] = map(torch.from_numpy, values)
        return tensors

    def _write(self, tensors: Tensors, place: str = "w") -> None:
        for number, (weight, bias) in enumerate(self._biases.items()):
            self._net.write(number, tensors[weight].numpy(), tensors[bias].numpy(), place)


def _flat(images: Images) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All pixels in one row, channel by channel as nn.Flatten has them, and the labels."""
    channels_last = np.asarray(images.pixels)
    pixels = channels_last if channels_last.shape[3] == 1 else channels_last.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels).reshape(-1), np.ascontiguousarray(images.labels, np.int64)


def _affine(recipe: Recipe, features: int) -> tuple[Array, Array]:
    """Scale and shift of each group of pixels: every normalisation is affine, up to the table's own rounding."""
    values = table(recipe.data.facts, recipe.data.normalise).double().numpy()
    scale, shift = (values[:, 255] - values[:, 0]) / 255, values[:, 0]
    groups = features // PIXELS // len(values)
    return np.repeat(scale, groups), np.repeat(shift, groups)
