"""A dense layer in register tiles: 6 rows of the result times 64 columns, 24 AVX-512 registers of sums.

    y[r, :] = sum_k w[r, k] x[k, :]            columns are images
    below[i, :] = sum_r w[r, i] d[r, :]        columns are images
    g[r, :] = sum_b d[r, b] xt[b, :]           columns are inputs; the update follows while the tile is in registers

All three are one product with other strides; it runs at the speed of the multipliers. A bias is the weight of an
input that is always one, behind the last real input.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlth_kernels.compiled import compiled
from fastlth_kernels.simd import GROUP, HAS_AVX512, LANES, at, fma, gate, larger, load, splat, store, transpose16, where
from fastlth_kernels.update_cpu import update64

TILE = 6 if HAS_AVX512 else 1
"""rows at once; fewer registers hold no more than one row"""


@compiled
def tile(memory: Any, a: int, a_row: int, a_step: int, b: int, b_step: int, count: int) -> Any:
    """Six `Lanes`: row i is the sum over k < count of memory[a + i a_row + k a_step] * Lanes(b + k b_step)."""
    zero = splat(memory.dtype.type(0))
    c0, c1, c2, c3, c4, c5 = zero, zero, zero, zero, zero, zero
    for k in range(count):
        column, left = load(memory, b + k * b_step), a + k * a_step
        c0 = fma(at(memory, left), column, c0)
        c1 = fma(at(memory, left + a_row), column, c1)
        c2 = fma(at(memory, left + 2 * a_row), column, c2)
        c3 = fma(at(memory, left + 3 * a_row), column, c3)
        c4 = fma(at(memory, left + 4 * a_row), column, c4)
        c5 = fma(at(memory, left + 5 * a_row), column, c5)
    return c0, c1, c2, c3, c4, c5


@compiled
def line(memory: Any, a: int, a_step: int, b: int, b_step: int, count: int) -> Any:
    """One row of ``tile``."""
    total = splat(memory.dtype.type(0))
    for k in range(count):
        total = fma(at(memory, a + k * a_step), load(memory, b + k * b_step), total)
    return total


@compiled
def forward(memory: Any, layer: Any, low: int, high: int, x: int, y: int, pitch: int, relu: bool) -> None:
    """Rows low .. high of y, for the 64 images at x and y."""
    floor = splat(memory.dtype.type(0.0 if relu else -np.inf))
    inputs, row = layer.inputs + 1, low
    while row + TILE <= high and TILE > 1:
        c0, c1, c2, c3, c4, c5 = tile(memory, layer.w + row * layer.pitch, layer.pitch, 1, x, pitch, inputs)
        place = y + row * pitch
        store(memory, place, larger(c0, floor))
        store(memory, place + pitch, larger(c1, floor))
        store(memory, place + 2 * pitch, larger(c2, floor))
        store(memory, place + 3 * pitch, larger(c3, floor))
        store(memory, place + 4 * pitch, larger(c4, floor))
        store(memory, place + 5 * pitch, larger(c5, floor))
        row += TILE
    while row < high:
        one = line(memory, layer.w + row * layer.pitch, 1, x, pitch, inputs)
        store(memory, y + row * pitch, larger(one, floor))
        row += 1


@compiled
def backward(memory: Any, layer: Any, low: int, high: int, x: int, d: int, below: int, pitch: int) -> None:
    """Rows low .. high of ``below``, the gradient of the layer's inputs before their ReLU, for 64 images."""
    row = low
    while row + TILE <= high and TILE > 1:
        c0, c1, c2, c3, c4, c5 = tile(memory, layer.w + row, 1, layer.pitch, d, pitch, layer.outputs)
        h, place = x + row * pitch, below + row * pitch
        store(memory, place, gate(c0, load(memory, h)))
        store(memory, place + pitch, gate(c1, load(memory, h + pitch)))
        store(memory, place + 2 * pitch, gate(c2, load(memory, h + 2 * pitch)))
        store(memory, place + 3 * pitch, gate(c3, load(memory, h + 3 * pitch)))
        store(memory, place + 4 * pitch, gate(c4, load(memory, h + 4 * pitch)))
        store(memory, place + 5 * pitch, gate(c5, load(memory, h + 5 * pitch)))
        row += TILE
    while row < high:
        one = line(memory, layer.w + row, layer.pitch, d, pitch, layer.outputs)
        store(memory, below + row * pitch, gate(one, load(memory, x + row * pitch)))
        row += 1


@compiled
def transpose(memory: Any, low: int, high: int, x: int, pitch: int, xt: int, xt_pitch: int) -> None:
    """Columns low .. high (multiples of 16) of xt from these rows of x, all ``pitch`` images."""
    for row in range(low, high, GROUP):
        for image in range(0, pitch, GROUP):
            transpose16(memory, x + row * pitch + image, pitch, xt + image * xt_pitch + row, xt_pitch)


@compiled
def descend(
    memory: Any, masks: Any, layer: Any, low: int, high: int, d: int, pitch: int, images: int, rule: Any
) -> None:
    """Gradient and update of the weights of rows low .. high, over ``images`` images; pruned ones stay as they are."""
    for column in range(0, layer.pitch, LANES):  # outside, so that its part of xt stays in the L1 cache
        xt, row = layer.xt + column, low
        while row + TILE <= high and TILE > 1:
            c0, c1, c2, c3, c4, c5 = tile(memory, d + row * pitch, pitch, 1, xt, layer.pitch, images)
            _move(memory, masks, layer, row, column, c0, rule)
            _move(memory, masks, layer, row + 1, column, c1, rule)
            _move(memory, masks, layer, row + 2, column, c2, rule)
            _move(memory, masks, layer, row + 3, column, c3, rule)
            _move(memory, masks, layer, row + 4, column, c4, rule)
            _move(memory, masks, layer, row + 5, column, c5, rule)
            row += TILE
        while row < high:
            _move(memory, masks, layer, row, column, line(memory, d + row * pitch, 1, xt, layer.pitch, images), rule)
            row += 1


@compiled
def _move(memory: Any, masks: Any, layer: Any, row: int, column: int, g: Any, rule: Any) -> None:
    i = row * layer.pitch + column
    g = where(at(masks, layer.mask + i // LANES), g)
    update64(memory, layer.w + i, layer.m + i, layer.v + i, g, rule)
