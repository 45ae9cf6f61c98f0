"""A convolution or a linear layer from its kept weights alone: forward, both gradients, 64 images being the vector.

    y[o, p, q]  = b[o] + sum_k w[k] x[c k, p + i k, q + j k]        over the entries k = (o, c, i, j) of row o
    g[k]        = sum over p, q and images of dy[o k, p, q] x[c k, p + i k, q + j k]
    dx          = the first sum with the entries by c, on dy, turned half around

An image buffer is [block of 64 images][channel][row][column][64 images], with a border of zeros as wide as the kernel
reaches. So an entry is one number in ``offsets``, from where a tile of the result lies to where it reads. A tile is 4
pixels, 16 AVX-512 registers of sums, and one weight is multiplied with all of it. A linear layer is a map of one pixel.

The channels are walked panel by panel, so that what the tile reads stays in the cache while all rows are made. Every
thread makes its own rows, and no two write one place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .compiled import compiled
from .shuffles import DOTS, GROUP, add_dots, store_dots, total16, turn_in, turn_out
from .simd import LANES, TWO_SUMS, at, fma, load, splat, store
from .threads import FLUSH, flush_denormals, wait


class Side(NamedTuple):
    """One direction of a layer: rows of results, each a sum over its entries."""

    offsets: Any
    """int32 [entries + 16]: from the tile's place in the result to the place of what an entry reads"""
    starts: Any
    """int64 [rows * panels + 1]: where the entries of a row in a panel begin"""
    cuts: Any
    """int64 [threads + 1]: the rows of each thread"""
    rows: int
    panels: int


class Map(NamedTuple):
    """The pixels of a layer. Distances are in numbers of a buffer."""

    height: int
    width: int
    tall: int
    wide: int
    """a tile's height and width: 1 and 1, 1 and 4, or 2 and 2"""
    line: int
    """from a row to the next"""
    channel: int
    origin: int
    """from a channel's begin to its first pixel, behind the border"""


class Kept(NamedTuple):
    """A layer laid out by ``kept_layer``."""

    ahead: Side
    """rows are outputs; entries in the order of the weights"""
    back: Side
    """rows are inputs"""
    back_entries: Any
    """int32 [entries]: which weight an entry of ``back`` is"""
    map: Map
    inputs: Any
    """the buffer of x, and of dx once x is done with; behind it ``room`` numbers for each thread"""
    outputs: Any
    """likewise of y and dy"""
    room: int
    counter: Any
    """int64 [1]: arrivals at the barrier"""


@compiled
def forward(
    thread: int, threads: int, layer: Kept, x: Any, images: int, channels: int, w: Any, bias: Any, y: Any
) -> None:
    """y [images, height, width, rows] from x [images, height, width, channels], flat; bfloat16 is given as uint16.

    Called once in each thread at the same time, the layer's counter being 0. ``bias`` may be empty.
    """
    before = flush_denormals(FLUSH)
    rows = layer.ahead.rows
    _pack(thread, threads, layer.map, x, images, channels, layer.inputs)
    wait(layer.counter, threads)
    _product(thread, layer.ahead, layer.map, w, bias, layer.inputs, channels, layer.outputs, images)
    wait(layer.counter, 2 * threads)
    _unpack(thread, threads, layer.map, layer.outputs, rows, y, images)
    flush_denormals(before)


@compiled
def backward(
    thread: int, threads: int, layer: Kept, dy: Any, images: int, w: Any, g: Any, w_back: Any, dx: Any
) -> None:
    """Gradients g [entries] and dx, which may be empty, after ``forward`` of the same images; else as there.

    ``w_back`` is room for the weights in the order of ``back``.
    """
    before = flush_denormals(FLUSH)
    ahead, back = layer.ahead, layer.back
    _pack(thread, threads, layer.map, dy, images, ahead.rows, layer.outputs)
    if len(dx) > 0:
        low, high = back.starts[back.cuts[thread] * back.panels], back.starts[back.cuts[thread + 1] * back.panels]
        for k in range(low, high):
            w_back[k] = w[layer.back_entries[k]]
    wait(layer.counter, threads)
    if layer.map.tall * layer.map.wide == 1:
        _gradient1(thread, layer, images, back.rows, g)
    else:
        _gradient4(thread, layer, images, back.rows, g)
    if len(dx) > 0:
        wait(layer.counter, 2 * threads)
        nothing = w[:0]
        _product(thread, back, layer.map, w_back, nothing, layer.outputs, ahead.rows, layer.inputs, images)
        wait(layer.counter, 3 * threads)
        _unpack(thread, threads, layer.map, layer.inputs, back.rows, dx, images)
    flush_denormals(before)


# ---- between the library's layout and ours


@compiled
def _pack(thread: int, threads: int, map: Map, source: Any, images: int, channels: int, buffer: Any) -> None:
    """This thread's share of a buffer from [images, height, width, channels]. Missing images and pixels are 0."""
    tall, wide = -(-map.height // map.tall) * map.tall, -(-map.width // map.wide) * map.wide
    groups = channels // GROUP
    pixel, image = channels, channels * map.height * map.width
    for unit in range(tall * groups * thread // threads, tall * groups * (thread + 1) // threads):
        p, group = unit // groups, unit % groups * GROUP
        for block in range(0, images, LANES):
            there = (block // LANES * channels + group) * map.channel + map.origin + p * map.line
            for q in range(wide):
                inside = p < map.height and q < map.width
                here = (p * map.width + q) * pixel + group if inside else 0
                for i in range(0, LANES, GROUP):
                    left = images - block - i if inside else 0
                    first = min(block + i, images - 1) * image + here
                    turn_in(source, first, image, left, buffer, there + q * LANES + i, map.channel)


@compiled
def _unpack(thread: int, threads: int, map: Map, buffer: Any, channels: int, target: Any, images: int) -> None:
    """The inverse, of the real images and pixels."""
    groups = channels // GROUP
    pixel, image = channels, channels * map.height * map.width
    units = map.height * groups
    for unit in range(units * thread // threads, units * (thread + 1) // threads):
        p, group = unit // groups, unit % groups * GROUP
        for block in range(0, images, LANES):
            there = (block // LANES * channels + group) * map.channel + map.origin + p * map.line
            for q in range(map.width):
                here = (p * map.width + q) * pixel + group
                for i in range(0, min(LANES, images - block), GROUP):
                    first = (block + i) * image + here
                    turn_out(buffer, there + q * LANES + i, map.channel, target, first, image, images - block - i)


# ---- sums


@compiled
def _product(thread: int, side: Side, map: Map, w: Any, bias: Any, x: Any, channels: int, y: Any, images: int) -> None:
    """The thread's rows of y from x, both buffers."""
    s1, s2, s3 = LANES, 2 * LANES, 3 * LANES
    if map.tall == 2:
        s2, s3 = map.line, map.line + LANES
    low, high = side.cuts[thread], side.cuts[thread + 1]
    for block in range(-(-images // LANES)):
        source, target = block * channels * map.channel, block * side.rows * map.channel + map.origin
        for p in range(0, map.height, map.tall):
            for q in range(0, map.width, map.wide):
                tile = p * map.line + q * LANES
                for panel in range(side.panels):
                    for row in range(low, high):
                        begin = at(side.starts, row * side.panels + panel)
                        end = at(side.starts, row * side.panels + panel + 1)
                        first = bias[row] if len(bias) > 0 else w.dtype.type(0)
                        there = target + tile + row * map.channel
                        if map.tall * map.wide == 1:
                            _sum1(w, side.offsets, begin, end, x, source + tile, y, there, panel == 0, first)
                        else:
                            _sum4(w, side.offsets, begin, end, x, source + tile, y, there, panel == 0, first,
                                  s1, s2, s3)  # fmt: skip


@compiled
def _sum4(
    w: Any, offsets: Any, begin: int, end: int, x: Any, source: int, y: Any, there: int, fresh: bool, first: Any,
    s1: int, s2: int, s3: int,
) -> None:  # fmt: skip
    a = splat(first)
    b, c, d = a, a, a
    if not fresh:
        a, b, c, d = load(y, there), load(y, there + s1), load(y, there + s2), load(y, there + s3)
    for k in range(begin, end):
        weight, here = at(w, k), source + at(offsets, k)
        a = fma(weight, load(x, here), a)
        b = fma(weight, load(x, here + s1), b)
        c = fma(weight, load(x, here + s2), c)
        d = fma(weight, load(x, here + s3), d)
    store(y, there, a)
    store(y, there + s1, b)
    store(y, there + s2, c)
    store(y, there + s3, d)


@compiled
def _sum1(
    w: Any, offsets: Any, begin: int, end: int, x: Any, source: int, y: Any, there: int, fresh: bool, first: Any
) -> None:
    even, odd = splat(first), splat(w.dtype.type(0))
    if not fresh:
        even = load(y, there)
    k = begin
    while k + 1 < end and TWO_SUMS:
        even = fma(at(w, k), load(x, source + at(offsets, k)), even)
        odd = fma(at(w, k + 1), load(x, source + at(offsets, k + 1)), odd)
        k += 2
    while k < end:
        even = fma(at(w, k), load(x, source + at(offsets, k)), even)
        k = end if TWO_SUMS else k + 1  # of two sums at most one entry is left
    store(y, there, even + odd)


# ---- gradients of the kept weights


@compiled
def _gradient4(thread: int, layer: Kept, images: int, channels: int, g: Any) -> None:
    """In tiles of 4 pixels; sixteen partial sums per entry stay in the cache until all pixels are seen."""
    side, map, x, dy = layer.ahead, layer.map, layer.inputs, layer.outputs
    s1, s2, s3 = LANES, 2 * LANES, 3 * LANES
    if map.tall == 2:
        s2, s3 = map.line, map.line + LANES
    sums = len(x) - (len(side.cuts) - 1 - thread) * layer.room
    out = sums + layer.room - GROUP
    for panel in range(side.panels):
        row = side.cuts[thread]
        while row < side.cuts[thread + 1]:
            low, used = row, 0  # as many rows as there is room for
            while row < side.cuts[thread + 1]:
                more = side.starts[row * side.panels + panel + 1] - side.starts[row * side.panels + panel]
                if row > low and (used + more + GROUP) * GROUP > layer.room - GROUP:
                    break
                used += more
                row += 1
            for i in range(used * GROUP):
                x[sums + i] = 0
            for block in range(-(-images // LANES)):
                source, target = block * channels * map.channel, block * side.rows * map.channel + map.origin
                for p in range(0, map.height, map.tall):
                    for q in range(0, map.width, map.wide):
                        tile, place = p * map.line + q * LANES, sums
                        for r in range(low, row):
                            d = target + tile + r * map.channel
                            d0, d1, d2, d3 = load(dy, d), load(dy, d + s1), load(dy, d + s2), load(dy, d + s3)
                            begin = at(side.starts, r * side.panels + panel)
                            for k in range(begin, at(side.starts, r * side.panels + panel + 1)):
                                here = source + tile + at(side.offsets, k)
                                add_dots(x, place, here, d0, d1, d2, d3, s1, s2, s3)
                                place += GROUP
            place = sums
            for r in range(low, row):
                begin, end = side.starts[r * side.panels + panel], side.starts[r * side.panels + panel + 1]
                for k in range(begin, end, GROUP):
                    total16(x, place, out)
                    for i in range(min(GROUP, end - k)):
                        g[k + i] = x[out + i]
                    place += min(GROUP, end - k) * GROUP


@compiled
def _gradient1(thread: int, layer: Kept, images: int, channels: int, g: Any) -> None:
    """Pixel by pixel: up to 16 entries of a row share their last steps."""
    side, map, x, dy = layer.ahead, layer.map, layer.inputs, layer.outputs
    sums = len(x) - (len(side.cuts) - 1 - thread) * layer.room
    for panel in range(side.panels):
        for row in range(side.cuts[thread], side.cuts[thread + 1]):
            begin, end = side.starts[row * side.panels + panel], side.starts[row * side.panels + panel + 1]
            for block in range(-(-images // LANES)):
                source = block * channels * map.channel
                target = (block * side.rows + row) * map.channel + map.origin
                for p in range(map.height):
                    for q in range(map.width):
                        tile = p * map.line + q * LANES
                        _dots(x, sums, load(dy, target + tile), source + tile, side.offsets, begin, end,
                              block + p + q > 0)  # fmt: skip
            for k in range(begin, end):
                g[k] = x[sums + k - begin]


@compiled
def _dots(memory: Any, sums: int, d: Any, x: int, offsets: Any, begin: int, end: int, more: bool) -> None:
    k = begin
    while k < end:
        out = sums + k - begin
        if end - k > DOTS // 2:
            store_dots(memory, out, d, x, 1, offsets, k, DOTS, more)
            k += DOTS
        elif end - k > 4:
            store_dots(memory, out, d, x, 1, offsets, k, 8, more)
            k += 8
        else:
            store_dots(memory, out, d, x, 1, offsets, k, 4, more)
            k += 4
