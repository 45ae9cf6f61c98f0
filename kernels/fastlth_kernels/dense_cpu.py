"""A dense layer in register tiles: 6 rows of the result times 64 columns, 24 AVX-512 registers of sums.

    y[r, :] = sum_k w[r, k] x[k, :]            columns are images
    below[i, :] = sum_r w[r, i] d[r, :]        columns are images
    g[r, :] = sum_b d[r, b] xt[b, :]           columns are inputs; the update follows while the tile is in registers

All three are one product with other strides; it runs at the speed of the multipliers. A bias is the weight of an
input that is always one, behind the last real input.
"""

from __future__ import annotations

from typing import Any

from .compiled import compiled
from .shuffles import GROUP, transpose16
from .simd import HAS_AVX512, LANES, at, fma, gate, larger, load, splat, store, where
from .update_cpu import update64

TILE = 6 if HAS_AVX512 else 1
"""rows at once; fewer registers hold no more than one row"""


@compiled
def product(
    memory: Any, a: int, a_row: int, a_step: int, b: int, b_step: int, count: int, out: int, out_row: int, rows: int
) -> None:
    """The 64 numbers at out + i out_row, for i < rows, are the sum over k < count of
    memory[a + i a_row + k a_step] times the 64 numbers at b + k b_step."""
    zero = splat(memory.dtype.type(0))
    i = 0
    while TILE > 1 and i + TILE <= rows:
        c0, c1, c2, c3, c4, c5 = zero, zero, zero, zero, zero, zero
        for k in range(count):
            column, left = load(memory, b + k * b_step), a + i * a_row + k * a_step
            c0 = fma(at(memory, left), column, c0)
            c1 = fma(at(memory, left + a_row), column, c1)
            c2 = fma(at(memory, left + 2 * a_row), column, c2)
            c3 = fma(at(memory, left + 3 * a_row), column, c3)
            c4 = fma(at(memory, left + 4 * a_row), column, c4)
            c5 = fma(at(memory, left + 5 * a_row), column, c5)
        place = out + i * out_row
        store(memory, place, c0)
        store(memory, place + out_row, c1)
        store(memory, place + 2 * out_row, c2)
        store(memory, place + 3 * out_row, c3)
        store(memory, place + 4 * out_row, c4)
        store(memory, place + 5 * out_row, c5)
        i += TILE
    while i < rows:
        total = zero
        for k in range(count):
            total = fma(at(memory, a + i * a_row + k * a_step), load(memory, b + k * b_step), total)
        store(memory, out + i * out_row, total)
        i += 1


@compiled
def forward(memory: Any, layer: Any, low: int, high: int, x: int, y: int, pitch: int, relu: bool) -> None:
    """Rows low .. high of y, for the 64 images at x and y."""
    product(memory, layer.w + low * layer.pitch, layer.pitch, 1, x, pitch, layer.inputs + 1,
            y + low * pitch, pitch, high - low)  # fmt: skip
    zero = splat(memory.dtype.type(0))
    if relu:
        for row in range(low, high):
            store(memory, y + row * pitch, larger(load(memory, y + row * pitch), zero))


@compiled
def backward(memory: Any, layer: Any, low: int, high: int, x: int, d: int, below: int, pitch: int) -> None:
    """Rows low .. high of ``below``, the gradient of the layer's inputs before their ReLU, for 64 images."""
    product(memory, layer.w + low, 1, layer.pitch, d, pitch, layer.outputs, below + low * pitch, pitch, high - low)
    for row in range(low, high):
        place = below + row * pitch
        store(memory, place, gate(load(memory, place), load(memory, x + row * pitch)))


@compiled
def transpose(memory: Any, rows: int, x: int, pitch: int, xt: int, xt_pitch: int) -> None:
    """xt [pitch, xt_pitch] from ``rows`` rows of x, rounded up to a multiple of 16."""
    for row in range(0, rows, GROUP):
        for image in range(0, pitch, GROUP):
            transpose16(memory, x + row * pitch + image, pitch, xt + image * xt_pitch + row, xt_pitch)


@compiled
def descend(
    memory: Any, masks: Any, layer: Any, part: Any, xt: int, d: int, pitch: int, images: int, rule: Any
) -> None:
    """Gradient and update of a part's weights, over ``images`` images; pruned ones stay as they are.

    Gradients live for six rows at part.g: they never leave the L1 cache.
    """
    for column in range(0, layer.pitch, LANES):  # outside, so that its part of xt stays in the L1 cache
        for low in range(part.low, part.high, TILE):
            rows = min(TILE, part.high - low)
            product(memory, d + low * pitch, pitch, 1, xt + column, layer.pitch, images, part.g, LANES, rows)
            for row in range(rows):
                i = (low + row) * layer.pitch + column
                g = where(at(masks, layer.mask + i // LANES), load(memory, part.g + row * LANES))
                update64(memory, layer.w + i, layer.m + i, layer.v + i, g, rule)
