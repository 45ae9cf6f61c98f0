"""A layer's kept weights alone: forward, backward and gradient, the batch being the vector.

    y[r] = sum_k w[k] x[column k]        over the entries k of row r
    below[i] = sum_k w[k] d[row k]       over the entries k of column i
    g[k] = sum_batch d[row k] x[column k]

x, y, d hold one row of images per feature. Cost is proportional to the number of entries: each takes four vector
multiplications per 64 images in each of the three. A bias is an entry whose column holds ones.

Entries are stored in the order (thread, panel, row, column). A thread owns whole rows, so that no two threads write
one place, and its block ends with room for 64 entries, so that gradients may be made 16 at a time past a row's end. A
panel is a range of columns whose part of x stays in the L1 cache while all rows are walked.
"""

from __future__ import annotations

from typing import Any

from .compiled import compiled
from .shuffles import DOTS, store_dots
from .simd import LANES, TWO_SUMS, at, fma, gate, larger, load, splat, store


@compiled
def forward(memory: Any, indices: Any, layer: Any, part: Any, x: int, y: int, pitch: int, relu: bool) -> None:
    """Rows part.low .. part.high of y, for the 64 images at x and y; rows are ``pitch`` numbers apart."""
    zero = splat(memory.dtype.type(0))
    rows = part.high - part.low
    for panel in range(layer.panels):
        starts = part.starts + panel * (rows + 1)
        end = at(indices, starts)
        for row in range(rows):
            begin, end = end, at(indices, starts + row + 1)
            place = y + (part.low + row) * pitch
            even, odd = zero, zero
            if panel > 0:
                even = load(memory, place)
            k = begin
            while k + 1 < end and TWO_SUMS:
                even = fma(at(memory, layer.w + k), load(memory, x + at(indices, layer.columns + k) * pitch), even)
                odd = fma(
                    at(memory, layer.w + k + 1), load(memory, x + at(indices, layer.columns + k + 1) * pitch), odd
                )
                k += 2
            while k < end:
                even = fma(at(memory, layer.w + k), load(memory, x + at(indices, layer.columns + k) * pitch), even)
                k = end if TWO_SUMS else k + 1  # of two sums at most one entry is left
            even = even + odd
            if relu and panel == layer.panels - 1:
                even = larger(even, zero)
            store(memory, place, even)


@compiled
def backward(
    memory: Any, indices: Any, layer: Any, low: int, high: int, x: int, d: int, below: int, pitch: int
) -> None:
    """Rows low .. high of ``below``, the gradient of the layer's inputs before their ReLU, for 64 images."""
    zero = splat(memory.dtype.type(0))
    for row in range(low, high):
        total = zero
        for j in range(at(indices, layer.back_starts + row), at(indices, layer.back_starts + row + 1)):
            weight = at(memory, layer.w + at(indices, layer.back_entries + j))
            total = fma(weight, load(memory, d + at(indices, layer.back_rows + j) * pitch), total)
        store(memory, below + row * pitch, gate(total, load(memory, x + row * pitch)))


@compiled
def gradient(memory: Any, indices: Any, layer: Any, part: Any, x: int, d: int, pitch: int) -> None:
    """The gradients of a part's entries, over all ``pitch`` images, at layer.g; its spare entries get 0."""
    rows = part.high - part.low
    for panel in range(layer.panels):
        starts = part.starts + panel * (rows + 1)
        end = at(indices, starts)
        for row in range(rows):
            begin, end = end, at(indices, starts + row + 1)
            place = d + (part.low + row) * pitch
            k = begin
            while k < end:
                count = DOTS if end - k > DOTS // 2 else 8 if end - k > 4 else 4
                for lane in range(0, pitch, LANES):
                    _dots(memory, indices, layer, k, load(memory, place + lane), x + lane, pitch, count, lane > 0)
                k += count
    for k in range(part.used, part.end):
        memory[layer.g + k] = 0


@compiled
def _dots(memory: Any, indices: Any, layer: Any, k: int, d: Any, x: int, pitch: int, count: int, add: bool) -> None:
    """Sums over many images of few entries share their last steps, so short rows take short sums."""
    if count == DOTS:
        store_dots(memory, layer.g + k, d, x, pitch, indices, layer.columns + k, DOTS, add)
    elif count == 8:
        store_dots(memory, layer.g + k, d, x, pitch, indices, layer.columns + k, 8, add)
    else:
        store_dots(memory, layer.g + k, d, x, pitch, indices, layer.columns + k, 4, add)
