"""A masked convolution or linear layer, laid out for ``kept_cpu``. Nothing here is in the hot loop."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compiled import compile_for
from .kept_cpu import Kept, Map, Side, backward, forward
from .mlp_cpu import _aligned, _cut_by_weight, _up
from .shuffles import GROUP
from .simd import HAS_AVX512, LANES

Array = NDArray[Any]

PANEL_BYTES = 1 << 19
"""what a tile reads in one panel: half of a usual L2 cache"""
ROOM = 4096
"""entries whose partial gradients a thread keeps at a time: 256 KiB in float32"""
ROW_COST = 4
"""what a row costs beside its entries, in entries"""


def supported(outputs: int, inputs: int, kernel: tuple[int, ...]) -> bool:
    """Whether a layer's weights [outputs, inputs, *kernel] can be laid out; the kernel must be centred, stride 1."""
    square = len(set(kernel)) <= 1 and all(k % 2 for k in kernel)
    return square and outputs % GROUP == 0 and inputs % GROUP == 0


class KeptLayer:
    """Weights with mask bool [outputs, inputs, K, K] on maps of height x width pixels, stride 1, padding K // 2;
    K = 1 on one pixel is a linear layer. At most ``batch`` images at a time.

    Weights and their gradients are given as flat arrays of the kept ones, in the mask's order, of ``dtype``. ``pool``
    has threads - 1 free threads (None for one thread). Raises ValueError for a shape that is not ``supported``.
    """

    def __init__(
        self, mask: NDArray[np.bool_], height: int, width: int, *, batch: int, threads: int = 1,
        pool: ThreadPoolExecutor | None = None, dtype: Any = np.float32,
    ) -> None:  # fmt: skip
        outputs, inputs, size, _ = mask.shape
        if not supported(outputs, inputs, mask.shape[2:]):
            raise ValueError(f"channels must be multiples of {GROUP} and the kernel square and odd, got {mask.shape}")
        self.batch, self.threads, self._pool, self._inputs, self._outputs = batch, threads, pool, inputs, outputs
        reach, blocks = size // 2, -(-batch // LANES)
        tall, wide = (1, 1) if height * width == 1 or not HAS_AVX512 else (1, 4) if width > 2 else (2, 2)
        line = (_up(width, wide) + 2 * reach) * LANES
        channel = (_up(height, tall) + 2 * reach) * line
        self._map = Map(height, width, tall, wide, line, channel, reach * (line + LANES))
        touched = (tall + 2 * reach) * (wide + 2 * reach) * LANES * np.dtype(dtype).itemsize
        panel = max(GROUP, PANEL_BYTES // touched)
        o, c, i, j = np.nonzero(mask)
        ahead = self._side(o, c, i, j, outputs, inputs, panel)
        order = np.lexsort((j, i, o, c))
        back = self._side(c[order], o[order], size - 1 - i[order], size - 1 - j[order], inputs, outputs, panel)
        longest = int(np.diff(ahead.starts).max(initial=0))
        room = _up((max(ROOM, longest) + GROUP) * GROUP + GROUP, LANES)
        self._kept = Kept(
            ahead, back, order.astype(np.int32), self._map,
            _aligned(blocks * inputs * channel + threads * room, dtype), _aligned(blocks * outputs * channel, dtype),
            room, np.zeros(1, np.int64),
        )  # fmt: skip
        self._w_back = np.zeros(len(o), dtype)
        self._compiled: set[Any] = set()

    def _side(self, row: Array, c: Array, i: Array, j: Array, rows: int, channels: int, panel: int) -> Side:
        panels = -(-channels // panel)
        offsets = np.zeros(len(row) + GROUP, np.int32)
        offsets[: len(row)] = c * self._map.channel + i * self._map.line + j * LANES
        counts = np.bincount(row * panels + c // panel, minlength=rows * panels)
        starts = np.concatenate([[0], np.cumsum(counts)])
        cuts = _cut_by_weight(np.bincount(row, minlength=rows) + ROW_COST, self.threads)
        return Side(offsets, starts, cuts, rows, panels)

    def forward(self, x: Array, w: Array, bias: Array, y: Array) -> None:
        """y [images, height, width, outputs] from x [images, height, width, inputs], contiguous; ``bias`` [outputs] or
        [0]. x and y are of the layer's dtype or hold bfloat16 as uint16; sums are of the layer's dtype."""
        self._check(x, self._inputs)
        self._on_all(forward, self._kept, x.reshape(-1), len(x), self._inputs, w, bias, y.reshape(-1))

    def backward(self, dy: Array, w: Array, g: Array, dx: Array) -> None:
        """Gradients g, and dx unless it is empty, for the images of the last ``forward``, which are gone after it."""
        self._check(dy, self._outputs)
        self._on_all(backward, self._kept, dy.reshape(-1), len(dy), w, g, self._w_back, dx.reshape(-1))

    def _check(self, array: Array, channels: int) -> None:
        expected = (self._map.height, self._map.width, channels)
        if array.shape[1:] != expected or not 0 < len(array) <= self.batch or not array.flags.c_contiguous:
            raise ValueError(f"expected contiguous [1 to {self.batch}, {expected}], got {array.shape}")

    def _on_all(self, function: Any, *args: Any) -> None:
        kinds = (function, *(a.dtype for a in args if isinstance(a, np.ndarray)))
        if kinds not in self._compiled:
            compile_for(function, (0, self.threads, *args))
            self._compiled.add(kinds)
        self._kept.counter[0] = 0
        others = [self._pool.submit(function, t, self.threads, *args) for t in range(1, self.threads)] if (
            self._pool) else []  # fmt: skip
        function(0, self.threads, *args)
        for other in others:
            other.result()
