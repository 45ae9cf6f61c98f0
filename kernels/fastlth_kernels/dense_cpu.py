"""A dense layer in register tiles: 6 rows of the result times 64 columns, 24 AVX-512 registers of sums, or times 16,
12 registers of AVX2.

    y[r, :] = start[r] + sum_k w[r, k] x[k, :]              columns are images
    below[i, :] = sum_r w[r, i] d[r, :]                     columns are images
    g[r, :] = sum[r] shift + sum_b d[r, b] xt[b, :]         columns are inputs; the update follows at once

All three are one product with other strides; it runs at the speed of the multipliers. What every image has alike is
not multiplied: an input is ``x + shift``, where x is 0 for black pixels, shift is 1 and x is 0 for the bias. So
start[r] = sum_k w[r, k] shift[k] is the same for all images, and sum[r] = sum_b d[r, b] for all inputs. And what is 0
is not read: ``active`` lists the pixels that are not black in some of 64 images, and for 64 pixels the images in which
some of them are not. (MNIST, 60 images: 63 % of the pixels; 56 % of the images, where pixels that are rarely
black stand together.)
"""

from __future__ import annotations

from typing import Any

from .compiled import compiled
from .shuffles import GROUP, transpose16
from .simd import (
    HAS_AVX512,
    LANES,
    at,
    fma,
    gate,
    larger,
    load,
    load_like,
    nonzero,
    quarter,
    splat,
    store,
    times,
    where,
)
from .simd import total as lanes_sum
from .update_cpu import update64

TILE = 6
"""rows at once"""


@compiled
def product(
    memory: Any, start: int, by: Any, a: int, a_row: int, a_step: int, b: int, b_step: int, lists: Any, first: int,
    count: int, out: int, out_row: int, rows: int,
) -> None:  # fmt: skip
    """The 64 numbers at out + i out_row, for i < rows, are memory[start + i] times ``by``, plus the sum over k in
    lists[first : first + count] of memory[a + i a_row + k a_step] times the 64 numbers at b + k b_step."""
    i = 0
    while i + TILE <= rows:
        left, place = a + i * a_row, out + i * out_row
        if HAS_AVX512:
            _tile(memory, start + i, by, left, a_row, a_step, b, b_step, lists, first, count, place, out_row)
        else:
            _tile(memory, start + i, quarter(by, 0), left, a_row, a_step, b, b_step, lists, first, count,
                  place, out_row)  # fmt: skip
            _tile(memory, start + i, quarter(by, 1), left, a_row, a_step, b + 16, b_step, lists, first, count,
                  place + 16, out_row)  # fmt: skip
            _tile(memory, start + i, quarter(by, 2), left, a_row, a_step, b + 32, b_step, lists, first, count,
                  place + 32, out_row)  # fmt: skip
            _tile(memory, start + i, quarter(by, 3), left, a_row, a_step, b + 48, b_step, lists, first, count,
                  place + 48, out_row)  # fmt: skip
        i += TILE
    while i < rows:
        total = splat(at(memory, start + i)) * by
        for j in range(first, first + count):
            k = at(lists, j)
            total = fma(at(memory, a + i * a_row + k * a_step), load(memory, b + k * b_step), total)
        store(memory, out + i * out_row, total)
        i += 1


@compiled
def _tile(
    memory: Any, start: int, by: Any, a: int, a_row: int, a_step: int, b: int, b_step: int, lists: Any, first: int,
    count: int, out: int, out_row: int,
) -> None:  # fmt: skip
    """Six rows of ``product``, of as many columns as ``by`` has lanes."""
    c0, c1, c2 = times(at(memory, start), by), times(at(memory, start + 1), by), times(at(memory, start + 2), by)
    c3, c4, c5 = times(at(memory, start + 3), by), times(at(memory, start + 4), by), times(at(memory, start + 5), by)
    for j in range(first, first + count):
        k = at(lists, j)
        column, left = load_like(memory, b + k * b_step, by), a + k * a_step
        c0 = fma(at(memory, left), column, c0)
        c1 = fma(at(memory, left + a_row), column, c1)
        c2 = fma(at(memory, left + 2 * a_row), column, c2)
        c3 = fma(at(memory, left + 3 * a_row), column, c3)
        c4 = fma(at(memory, left + 4 * a_row), column, c4)
        c5 = fma(at(memory, left + 5 * a_row), column, c5)
    store(memory, out, c0)
    store(memory, out + out_row, c1)
    store(memory, out + 2 * out_row, c2)
    store(memory, out + 3 * out_row, c3)
    store(memory, out + 4 * out_row, c4)
    store(memory, out + 5 * out_row, c5)


@compiled
def fold(memory: Any, layer: Any, low: int, high: int) -> None:
    """What rows low .. high of every image's outputs start with: each row of weights times the shifts."""
    for row in range(low, high):
        total = splat(memory.dtype.type(0))
        for column in range(0, layer.pitch, LANES):
            total = fma(load(memory, layer.w + row * layer.pitch + column), load(memory, layer.shift + column), total)
        memory[layer.start + row] = lanes_sum(total)


@compiled
def find_active(
    memory: Any, lists: Any, layer: Any, x: int, pitch: int, images: int, pixels_at: int, images_at: int
) -> None:
    """Lists, each behind its length: of every 64 images the rows of x that are not 0 in all of them, at pixels_at and
    then each ``layer.inputs`` + 1 further; of every 64 rows of x the images, fewer than ``images``, in which they are
    not all 0, at images_at and then each ``pitch`` + 1 further."""
    for lane in range(0, pitch, LANES):
        lists[pixels_at + lane // LANES * (layer.inputs + 1)] = 0
    for block in range(0, layer.pitch, LANES):
        mine, found = images_at + block // LANES * (pitch + 1) + 1, 0
        for lane in range(0, pitch, LANES):
            here, some = pixels_at + lane // LANES * (layer.inputs + 1), 0
            count = lists[here]
            for row in range(block, min(block + LANES, layer.inputs)):
                lit = nonzero(load(memory, x + row * pitch + lane))
                some |= lit
                lists[here + 1 + count] = row
                count += lit != 0
            lists[here] = count
            for image in range(lane, min(lane + LANES, images)):
                lists[mine + found] = image
                found += (some >> (image - lane)) & 1
        lists[mine - 1] = found


@compiled
def forward(
    memory: Any, lists: Any, first: int, count: int, layer: Any, low: int, high: int, x: int, y: int, pitch: int,
    relu: bool,
) -> None:  # fmt: skip
    """Rows low .. high of y, for the 64 images at x and y, from the inputs in lists[first : first + count]."""
    one, zero = splat(memory.dtype.type(1)), splat(memory.dtype.type(0))
    product(memory, layer.start + low, one, layer.w + low * layer.pitch, layer.pitch, 1, x, pitch, lists, first, count,
            y + low * pitch, pitch, high - low)  # fmt: skip
    if relu:
        for row in range(low, high):
            store(memory, y + row * pitch, larger(load(memory, y + row * pitch), zero))


@compiled
def backward(
    memory: Any, lists: Any, first: int, layer: Any, low: int, high: int, x: int, d: int, below: int, pitch: int
) -> None:
    """Rows low .. high of ``below``, the gradient of the layer's inputs before their ReLU, for 64 images; outputs are
    listed at ``first``."""
    zero = splat(memory.dtype.type(0))
    product(memory, layer.shift, zero, layer.w + low, 1, layer.pitch, d, pitch, lists, first, layer.outputs,
            below + low * pitch, pitch, high - low)  # fmt: skip
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
    memory: Any, masks: Any, lists: Any, active: int, apart: int, layer: Any, part: Any, xt: int, d: int, pitch: int,
    rule: Any,
) -> None:  # fmt: skip
    """Gradient and update of a part's weights; pruned ones stay as they are. The images that the gradient of the n-th
    64 columns sums over are listed behind their number at lists[active + n apart].

    Gradients live for six rows at part.g: they never leave the L1 cache.
    """
    for row in range(part.low, part.high):
        total = load(memory, d + row * pitch)
        for lane in range(LANES, pitch, LANES):
            total = total + load(memory, d + row * pitch + lane)
        memory[layer.sums + row] = lanes_sum(total)
    for column in range(0, layer.pitch, LANES):  # outside, so that its part of xt stays in the L1 cache
        shift, images = load(memory, layer.shift + column), active + column // LANES * apart
        for low in range(part.low, part.high, TILE):
            rows = min(TILE, part.high - low)
            product(memory, layer.sums + low, shift, d + low * pitch, pitch, 1, xt + column, layer.pitch,
                    lists, images + 1, at(lists, images), part.g, LANES, rows)  # fmt: skip
            for row in range(rows):
                i = (low + row) * layer.pitch + column
                g = where(at(masks, layer.mask + i // LANES), load(memory, part.g + row * LANES))
                update64(memory, layer.w + i, layer.m + i, layer.v + i, g, rule)
