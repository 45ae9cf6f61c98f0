"""A fully connected net with masks, laid out for the CPU kernels: what `interval_cpu` trains.

Each layer is either dense (all weights, pruned ones held at 0 by a mask) or sparse (kept weights only).
Layout and threads are decided here, in numpy; nothing here is in the hot loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compiled import compile_for
from .dense_cpu import TILE
from .interval_cpu import Images as Images
from .interval_cpu import Net, fold_all, interval, scores
from .shuffles import GROUP
from .simd import LANES
from .update_cpu import KINDS

Array = NDArray[Any]

LAYER = np.dtype([(name, np.int64) for name in (
    "inputs", "outputs", "dense", "x", "d", "w", "m", "v", "g", "pitch", "xt", "mask",
    "shift", "start", "sums", "columns", "panels", "back_starts", "back_rows", "back_entries",
)])  # fmt: skip
PART = np.dtype([(name, np.int64) for name in (
    "low", "high", "g", "starts", "begin", "used", "end",
)])  # fmt: skip
PLAN = np.dtype([(name, np.int64) for name in (
    "threads", "pitch", "shared", "private", "block", "z", "lists", "active", "active_images",
)])  # fmt: skip

PANEL = 192
"""columns whose 64 images fit the L1 cache"""
PANEL_ENTRIES = 16
"""entries a row must have in a panel for panels to pay"""


@dataclass(frozen=True)
class Optimizer:
    """As in torch.optim; ``kind`` is sgd, adam or adamw."""

    kind: str
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


class _Arena:
    """Hands out places in one array that is made at the end; every place begins on a cache line."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, count: int) -> int:
        place, self.size = self.size, self.size + _up(count, LANES)
        return place


class MaskedMlp:
    """Linear layers with ReLU between them, trained by ``threads`` threads on batches of at most ``batch`` images.

    ``masks`` are bool [outputs, inputs] (True = kept); ``dense`` says how each layer runs. Weights, biases and
    moments start at 0. ``scales`` and ``shifts`` [inputs / 16] turn pixels into numbers; ``lit`` [inputs] says how
    often each pixel is not black, which costs less where such pixels stand together (None: they stand as they come).
    ``pool`` has threads - 1 free threads (None for one thread): while one is missing, the others wait for it.
    """

    def __init__(
        self, masks: Sequence[NDArray[np.bool_]], dense: Sequence[bool], optimizer: Optimizer, scales: Array,
        shifts: Array, *, batch: int, lit: Array | None = None, threads: int = 1,
        pool: ThreadPoolExecutor | None = None, dtype: Any = np.float32,
    ) -> None:  # fmt: skip
        if masks[0].shape[1] % GROUP:
            raise ValueError(f"the first layer must have a multiple of {GROUP} inputs, got {masks[0].shape[1]}")
        self.optimizer, self.threads, self.pitch, self._pool = optimizer, threads, _up(batch, LANES), pool
        self._compiled: set[Any] = set()
        self._floats, self._ints = _Arena(), _Arena()
        self._index_parts: list[tuple[int, Array]] = []
        self._bits: list[Array] = []
        self._ranks = np.arange(masks[0].shape[1])
        if lit is not None and dense[0]:
            self._ranks[np.argsort(-lit, kind="stable")] = np.arange(len(lit))
        layers, parts = np.zeros(len(masks), LAYER), np.zeros((len(masks), threads), PART)
        self._entries: list[tuple[Array, Array]] = []
        """per layer: where its entries stand in ``w``, and in a flattened [outputs, inputs + 1] (last column: bias)"""
        for layer, part, mask, whole in zip(layers, parts, masks, dense, strict=True):
            layer["outputs"], layer["inputs"] = mask.shape
            layer["dense"] = whole
            with_bias = np.column_stack([mask, np.ones(len(mask), bool)])
            self._entries.append((self._dense if whole else self._sparse)(layer, part, with_bias))
        plan = np.zeros(1, PLAN)
        self._activations(layers, plan)
        memory = _aligned(self._floats.size, dtype)
        indices = np.zeros(self._ints.size, np.int32)
        for place, values in self._index_parts:
            indices[place : place + len(values)] = values
        bits = np.concatenate([*self._bits, np.zeros(1, np.int64)])  # numba wants an array, dense layer or not
        self.net = Net(
            memory, indices, bits, layers.view(np.recarray), parts.view(np.recarray), plan.view(np.recarray),
            np.ascontiguousarray(scales, dtype), np.ascontiguousarray(shifts, dtype) * (not dense[0]),
            np.zeros(threads * self.pitch, np.int64), self._ranks, self._lists(layers, plan), np.zeros(1, np.int64),
        )  # fmt: skip
        self._write_constants(shifts)

    # ---- layout

    def _dense(self, layer: Any, parts: Array, kept: NDArray[np.bool_]) -> tuple[Array, Array]:
        outputs, inputs = int(layer["outputs"]), int(layer["inputs"])
        pitch = _up(inputs + 1, LANES)
        layer["pitch"] = pitch
        for name in ("w", "m", "v"):
            layer[name] = self._floats.take(outputs * pitch)
        layer["shift"], layer["start"], layer["sums"] = map(self._floats.take, (pitch, outputs, outputs))
        row, column = np.nonzero(kept)
        entry = row * pitch + (column if self._entries else np.append(self._ranks, inputs)[column])
        padded = np.zeros((outputs, pitch), bool)
        padded.reshape(-1)[entry] = True
        for part in parts:
            part["g"] = self._floats.take(TILE * LANES)
        layer["mask"] = sum(len(bits) for bits in self._bits)
        self._bits.append(np.packbits(padded, bitorder="little").view("<i8").astype(np.int64))
        cuts = _cut_evenly(outputs, self.threads, TILE)
        parts["low"], parts["high"] = cuts[:-1], cuts[1:]
        return entry, row * (inputs + 1) + column

    def _sparse(self, layer: Any, parts: Array, kept: NDArray[np.bool_]) -> tuple[Array, Array]:
        outputs, inputs = len(kept), kept.shape[1] - 1
        panels = -(-inputs // PANEL)
        if np.count_nonzero(kept) < PANEL_ENTRIES * outputs * panels:
            panels = 1
        row, column = np.nonzero(kept)
        panel = np.minimum(column * panels // inputs, panels - 1)
        cuts = _cut_by_weight(np.bincount(row, minlength=outputs), self.threads)
        thread = np.searchsorted(cuts, row, side="right") - 1
        order = np.lexsort((column, row, panel, thread))
        row, column, panel, thread = row[order], column[order], panel[order], thread[order]

        entry = np.zeros(len(row), np.int64)  # where each entry stands in w: blocks of threads have room between them
        end = 0
        starts: list[Array] = []
        for t in range(self.threads):
            mine = np.flatnonzero(thread == t)
            low, high = int(cuts[t]), int(cuts[t + 1])
            entry[mine] = end + np.arange(len(mine))
            key = panel[mine] * (high - low) + row[mine] - low
            counts = np.bincount(key, minlength=panels * (high - low)).reshape(panels, -1)
            ends = end + np.cumsum(counts.reshape(-1)).reshape(panels, -1)
            first = np.concatenate([[end], ends[:-1, -1]]) if high > low else np.full(panels, end)
            starts.append(np.column_stack([first, ends]).reshape(-1))
            parts[t]["low"], parts[t]["high"], parts[t]["begin"], parts[t]["used"] = low, high, end, end + len(mine)
            end = _up(end + len(mine) + GROUP, LANES)
            parts[t]["end"] = end
        for t, values in enumerate(starts):
            parts[t]["starts"] = self._take_indices(values)
        for name in ("w", "m", "v", "g"):
            layer[name] = self._floats.take(end)
        columns = np.zeros(end, np.int32)
        columns[entry] = np.where(column < inputs, column, _up(inputs, GROUP))
        layer["columns"], layer["panels"] = self._take_indices(columns), panels

        back = np.argsort(column, kind="stable")
        counts = np.bincount(column, minlength=inputs + 1)
        layer["back_starts"] = self._take_indices(np.concatenate([[0], np.cumsum(counts)]))
        layer["back_rows"], layer["back_entries"] = self._take_indices(row[back]), self._take_indices(entry[back])
        return entry, row * (inputs + 1) + column

    def _activations(self, layers: Array, plan: Array) -> None:
        """A block per thread and one shared: inputs of every layer (behind them a row of ones), logits, gradients."""
        block = _Arena()
        for layer in layers:
            layer["x"] = block.take((_up(int(layer["inputs"]), GROUP) + 1) * self.pitch)
            if layer["dense"]:
                layer["xt"] = block.take(self.pitch * int(layer["pitch"]))
        plan["z"] = block.take((int(layers[-1]["outputs"]) + 1) * self.pitch)
        for layer in layers[:-1]:
            layer["d"] = block.take(int(layer["outputs"]) * self.pitch)
        plan["threads"], plan["pitch"], plan["block"] = self.threads, self.pitch, block.size
        plan["shared"] = self._floats.take(block.size)
        plan["private"] = self._floats.take(block.size * self.threads)

    def _lists(self, layers: Array, plan: Array) -> Array:
        """Of each thread: everything (its length, 0, 1, 2 ...), then what is not black in the batch at hand."""
        longest = max(self.pitch, int(layers["inputs"].max()), int(layers["outputs"].max()))
        plan["active"] = 1 + longest
        plan["active_images"] = plan["active"] + self.pitch // LANES * (layers[0]["inputs"] + 1)
        size = _up(int(plan["active_images"][0] + layers[0]["pitch"] // LANES * (self.pitch + 1)), LANES)
        plan["lists"] = size
        lists = np.zeros((self.threads, size), np.int64)
        lists[:, 1 : 1 + longest] = np.arange(longest)
        return lists.reshape(-1)

    def _write_constants(self, shifts: Array) -> None:
        """Behind the inputs of every layer a row of ones, for biases among kept weights; of dense layers the shifts."""
        net, plan = self.net, self.net.plan[0]
        blocks = [plan.shared, *(plan.private + t * plan.block for t in range(self.threads))]
        for i, layer in enumerate(net.layers):
            for block in blocks:
                net.memory[block + layer.x + _up(layer.inputs, GROUP) * self.pitch :][: self.pitch] = 1
            if layer.dense:
                net.memory[layer.shift + layer.inputs] = 1
                if i == 0:
                    net.memory[layer.shift + self._ranks] = np.repeat(shifts, GROUP)

    def _take_indices(self, values: Array) -> int:
        place = self._ints.take(len(values))
        self._index_parts.append((place, values.astype(np.int32)))
        return place

    # ---- weights and moments

    def read(self, layer: int, what: str = "w") -> tuple[Array, Array]:
        """Weights [outputs, inputs] and biases [outputs] of a layer, pruned ones 0; ``what``: w, m or v."""
        outputs, inputs = int(self.net.layers[layer].outputs), int(self.net.layers[layer].inputs)
        entry, place = self._entries[layer]
        flat = np.zeros(outputs * (inputs + 1), self.net.memory.dtype)
        flat[place] = self.net.memory[int(self.net.layers[layer][what]) + entry]
        whole = flat.reshape(outputs, inputs + 1)
        return whole[:, :inputs].copy(), whole[:, inputs].copy()

    def write(self, layer: int, weight: Array, bias: Array, what: str = "w") -> None:
        """The inverse of ``read``; values of pruned weights are not looked at."""
        entry, place = self._entries[layer]
        whole = np.column_stack([weight, bias]).reshape(-1)
        self.net.memory[int(self.net.layers[layer][what]) + entry] = whole[place]

    def clear(self, what: str) -> None:
        """Set all moments of one kind to 0."""
        for layer in range(len(self.net.layers)):
            self.net.memory[int(self.net.layers[layer][what]) + self._entries[layer][0]] = 0

    # ---- running

    def train(self, data: Images, bounds: Array, rates: Array, step: int) -> tuple[Array, Array]:
        """Mean loss and hits of each step (float64, int64 [len(rates)]); see ``interval``."""
        o = self.optimizer
        losses, hits = np.zeros(len(rates)), np.zeros(len(rates), np.int64)
        numbers = np.array([o.weight_decay, o.momentum, *o.betas, o.eps])
        self.net.counter[0] = 0
        self._fold()
        self._on_all(
            interval, self.net, data, bounds, rates, step, KINDS[o.kind], int(o.nesterov), numbers, losses, hits
        )
        return losses, hits

    def scores(self, data: Images) -> tuple[float, int]:
        """Sum of the cross-entropy and number of hits over data.chosen."""
        results = np.zeros((self.threads, 2))
        self._fold()
        self._on_all(scores, self.net, data, results)
        return float(results[:, 0].sum()), int(results[:, 1].sum())

    def _compile(self, function: Any, *args: Any) -> None:
        if function not in self._compiled:
            compile_for(function, args)
            self._compiled.add(function)

    def _fold(self) -> None:
        self._compile(fold_all, self.net)
        fold_all(self.net)

    def _on_all(self, function: Any, *args: Any) -> None:
        self._compile(function, 0, *args)
        others = [self._pool.submit(function, t, *args) for t in range(1, self.threads)] if self._pool else []
        function(0, *args)
        for other in others:
            other.result()


def _aligned(count: int, dtype: Any) -> Array:
    size = np.dtype(dtype).itemsize
    raw = np.zeros(count * size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + count * size].view(dtype)


def _cut_evenly(count: int, parts: int, unit: int) -> NDArray[np.int64]:
    """``parts`` + 1 bounds between 0 and count, the inner ones multiples of ``unit``."""
    units = count // unit
    cuts = np.array([units * p // parts * unit for p in range(parts + 1)])
    cuts[-1] = count
    return cuts


def _cut_by_weight(weight: Array, parts: int) -> NDArray[np.int64]:
    """``parts`` + 1 bounds that divide a sequence into parts of about equal sums."""
    sums = np.concatenate([[0], np.cumsum(weight)])
    cuts: NDArray[np.int64] = np.searchsorted(sums, sums[-1] * np.arange(parts + 1) / parts)
    cuts[0], cuts[-1] = 0, len(weight)
    return cuts
