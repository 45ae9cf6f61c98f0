"""Triton kernels of ``masked_conv2d``, and their launchers: matrix products whose operands are gathered from images.

x is NHWC, w is OHWI, the bits of a tap (one place of the filter) are packed along IN. With M the pixels of the result:

    y^T [OUT, M]  = sum over taps of (w m)[:, tap, :] x[pixels moved by tap]^T       _forward
    dx^T [IN, M] = sum over taps of (w m)[:, tap, :]^T dy[pixels moved by tap]^T    _input_grad
    dw[:, tap, :] = where(m, dy^T x[pixels moved by tap], 0)                       _weight_grad

The masked weight is the left operand, which wgmma reads from registers. With stride s, the pixels of dx fall in s * s
classes by row % s and column % s, and each class has taps of its own: no product is made for the others. The sum of
dw, over all pixels of a batch, is cut in parts; they meet by atomic additions, whose order is not fixed, or are kept
apart and added in order by _add_parts. Sums are fp32, fp32 products IEEE and not TF32. Offsets are 32-bit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .launch import AotCase, cdiv, jit_but, tl
from .tiles import FP32, LARGE, ODD, SMALL, Tiles, choose, device_of, kept_columns, kept_rows


@jit_but(do_not_specialize=("M", "H", "W", "P", "Q", "WORDS", "PAD"))
def _forward(  # type: ignore[no-untyped-def]
    x, w, bits, bias, y, M, H, W, IN, OUT, P, Q, WORDS, PAD, STRIDE: tl.constexpr, TAPS: tl.constexpr,
    TAPS_W: tl.constexpr, BIAS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    pixel = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_ok, pixel_ok = o < OUT, pixel < M
    top, left = pixel // Q % P * STRIDE - PAD, pixel % Q * STRIDE - PAD
    image = pixel // (P * Q) * H
    acc = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    blocks = tl.cdiv(IN, BLOCK_I)
    for step in range(TAPS * blocks):
        tap, i0 = step // blocks, step % blocks * BLOCK_I
        i, word = i0 + tl.arange(0, BLOCK_I), i0 // 32 + tl.arange(0, BLOCK_I // 32)
        at = (o * TAPS + tap)[:, None]
        words = tl.load(bits + at * WORDS + word[None, :], o_ok[:, None] & (word < WORDS)[None, :], 0)
        weight = tl.load(w + at * IN + i[None, :], o_ok[:, None] & (i < IN)[None, :], 0.0)
        row, column = top + tap // TAPS_W, left + tap % TAPS_W
        inside = pixel_ok & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        where = ((image + row) * W + column) * IN
        right = tl.load(x + where[None, :] + i[:, None], (i < IN)[:, None] & inside[None, :], 0.0)
        masked = tl.where(kept_columns(words, BLOCK_I), weight, 0.0).to(right.dtype)
        acc = tl.dot(masked, right, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + o, o_ok, 0.0).to(tl.float32)[:, None]
    tl.store(y + pixel[None, :] * OUT + o[:, None], acc, o_ok[:, None] & pixel_ok[None, :])


@jit_but(do_not_specialize=("B", "H", "W", "P", "Q", "WORDS", "PAD"))
def _input_grad(  # type: ignore[no-untyped-def]
    dy, w, bits, dx, B, H, W, IN, OUT, P, Q, WORDS, PAD, STRIDE: tl.constexpr, TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    word = tl.program_id(0) * (BLOCK_I // 32) + tl.arange(0, BLOCK_I // 32)
    # the class of pixels, their rows and columns, and the first tap that reaches them
    row0, column0 = tl.program_id(2) // STRIDE, tl.program_id(2) % STRIDE
    rows, columns = (H - row0 + STRIDE - 1) // STRIDE, (W - column0 + STRIDE - 1) // STRIDE
    first_v, first_h = (row0 + PAD) % STRIDE, (column0 + PAD) % STRIDE
    taps_v, taps_h = (TAPS_H - first_v + STRIDE - 1) // STRIDE, (TAPS_W - first_h + STRIDE - 1) // STRIDE
    pixel = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_ok, pixel_ok = i < IN, pixel < B * rows * columns
    rows, columns = tl.maximum(rows, 1), tl.maximum(columns, 1)  # a class may be empty; nothing is divided by 0
    row = row0 + pixel // columns % rows * STRIDE
    column = column0 + pixel % columns * STRIDE
    image = pixel // (rows * columns)
    acc = tl.zeros((BLOCK_I, BLOCK_M), tl.float32)
    blocks = tl.cdiv(OUT, BLOCK_O)
    for step in range(taps_v * taps_h * blocks):
        tap, o = step // blocks, step % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
        v, h = first_v + tap // taps_h * STRIDE, first_h + tap % taps_h * STRIDE
        at = ((o * TAPS_H + v) * TAPS_W + h)[None, :]
        words = tl.load(bits + at * WORDS + word[:, None], (word < WORDS)[:, None] & (o < OUT)[None, :], 0)
        weight = tl.load(w + at * IN + i[:, None], i_ok[:, None] & (o < OUT)[None, :], 0.0)
        # whole numbers, below 0 where the tap reaches from outside
        p, q = (row + PAD - v) // STRIDE, (column + PAD - h) // STRIDE
        inside = pixel_ok & (row + PAD >= v) & (p < P) & (column + PAD >= h) & (q < Q)
        where = ((image * P + p) * Q + q) * OUT
        g = tl.load(dy + where[None, :] + o[:, None], (o < OUT)[:, None] & inside[None, :], 0.0)
        masked = tl.where(kept_rows(words, BLOCK_I), weight, 0.0).to(g.dtype)
        acc = tl.dot(masked, g, acc, input_precision="ieee")
    where = ((image * H + row) * W + column) * IN
    tl.store(dx + where[None, :] + i[:, None], acc, i_ok[:, None] & pixel_ok[None, :])


@jit_but(do_not_specialize=("M", "H", "W", "P", "Q", "WORDS", "PAD", "SHARE"))
def _weight_grad(  # type: ignore[no-untyped-def]
    dy, x, bits, dw, M, H, W, IN, OUT, P, Q, WORDS, PAD, SHARE, STRIDE: tl.constexpr, TAPS: tl.constexpr,
    TAPS_W: tl.constexpr, ATOMIC: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Part number program_id(2) sums over SHARE pixels, a multiple of BLOCK_M. Parts lie one after the other in dw,
    or with ATOMIC are added to it."""
    blocks = tl.cdiv(IN, BLOCK_I)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    tap, i0 = tl.program_id(1) // blocks, tl.program_id(1) % blocks * BLOCK_I
    i, word = i0 + tl.arange(0, BLOCK_I), i0 // 32 + tl.arange(0, BLOCK_I // 32)
    part = tl.program_id(2)
    o_ok, i_ok = o < OUT, i < IN
    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for m0 in range(part * SHARE, tl.minimum(M, part * SHARE + SHARE), BLOCK_M):
        pixel = m0 + tl.arange(0, BLOCK_M)
        row = pixel // Q % P * STRIDE - PAD + tap // TAPS_W
        column = pixel % Q * STRIDE - PAD + tap % TAPS_W
        inside = (pixel < M) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        where = ((pixel // (P * Q) * H + row) * W + column) * IN
        g = tl.load(dy + pixel[None, :] * OUT + o[:, None], o_ok[:, None] & (pixel < M)[None, :], 0.0)
        right = tl.load(x + where[:, None] + i[None, :], inside[:, None] & i_ok[None, :], 0.0)
        acc = tl.dot(g, right, acc, input_precision="ieee")
    at = (o * TAPS + tap)[:, None]
    words = tl.load(bits + at * WORDS + word[None, :], o_ok[:, None] & (word < WORDS)[None, :], 0)
    kept = kept_columns(words, BLOCK_I)
    inside = o_ok[:, None] & i_ok[None, :]
    if ATOMIC:
        tl.atomic_add(dw + at * IN + i[None, :], acc, inside & kept, sem="relaxed")
    else:
        tl.store(dw + part * OUT * TAPS * IN + at * IN + i[None, :], tl.where(kept, acc, 0.0), inside)


@jit_but(do_not_specialize=("PARTS",))
def _add_parts(parts, dw, n, PARTS, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + part * n + at, at < n, 0.0)
    tl.store(dw + at, total, at < n)


def forward(
    x: Tensor, w: Tensor, bits: Tensor, bias: Tensor | None, stride: int, padding: int, config: Tiles | None = None
) -> Tensor:
    """y [B, OUT, P, Q] channels-last in x's dtype; x [B, IN, H, W], w [OUT, IN, kh, kw], bits [OUT, kh, kw, WORDS]."""
    (B, IN, H, W), (OUT, _, kh, kw) = x.shape, w.shape
    P, Q = result_size(H, kh, stride, padding), result_size(W, kw, stride, padding)
    y = x.new_empty(B, P, Q, OUT).permute(0, 3, 1, 2)
    M = B * P * Q
    c = config or choose(OUT, M, 1, x.dtype, IN)
    with device_of(x):
        _forward[(cdiv(OUT, c.rows), cdiv(M, c.columns))](
            _nhwc(x), _nhwc(w), bits.contiguous(), w if bias is None else bias.contiguous(), y, M, H, W, IN, OUT, P, Q,
            bits.shape[3], padding, STRIDE=stride, TAPS=kh * kw, TAPS_W=kw, BIAS=bias is not None,
            BLOCK_O=c.rows, BLOCK_M=c.columns, BLOCK_I=c.inner, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    return y


def input_grad(
    dy: Tensor, w: Tensor, bits: Tensor, height: int, width: int, stride: int, padding: int,
    config: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """dx [B, IN, height, width] channels-last in dy's dtype."""
    (B, OUT, P, Q), (_, IN, kh, kw) = dy.shape, w.shape
    dx = dy.new_empty(B, height, width, IN).permute(0, 3, 1, 2)
    M = B * cdiv(height, stride) * cdiv(width, stride)  # of the largest class
    c = config or _input_grad_tiles(choose(IN, M, stride * stride, dy.dtype, IN, OUT))
    with device_of(dy):
        _input_grad[(cdiv(IN, c.rows), cdiv(M, c.columns), stride * stride)](
            _nhwc(dy), _nhwc(w), bits.contiguous(), dx, B, height, width, IN, OUT, P, Q, bits.shape[3],
            padding, STRIDE=stride, TAPS_H=kh, TAPS_W=kw,
            BLOCK_I=c.rows, BLOCK_M=c.columns, BLOCK_O=c.inner, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    return dx


def _input_grad_tiles(c: Tiles) -> Tiles:
    # on sm_80 spill: four warps; and eight, where one of the two numbers of channels is odd and the other is not
    return ODD._replace(inner=32) if c == ODD else ODD if c == SMALL else c


def weight_grad(
    dy: Tensor, x: Tensor, w: Tensor, bits: Tensor, stride: int, padding: int, *,
    deterministic: bool = True, parts: int | None = None, config: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """dw [OUT, IN, kh, kw] channels-last, +0.0 where pruned, in w's dtype.

    ``parts`` is the number of pieces the sum over pixels is cut into; not ``deterministic``, they meet by atomics."""
    (B, OUT, P, Q), (_, IN, H, W), (kh, kw) = dy.shape, x.shape, w.shape[2:]
    M, taps = B * P * Q, kh * kw
    c, parts, share = weight_parts(OUT, IN, taps, M, dy.dtype, parts, config)
    atomic = parts > 1 and not deterministic
    made, dtype = torch.zeros if atomic else torch.empty, w.dtype if parts == 1 else torch.float32
    whole = made(1 if atomic else parts, OUT, kh, kw, IN, device=w.device, dtype=dtype)
    with device_of(dy):
        _weight_grad[(cdiv(OUT, c.rows), cdiv(IN, c.columns) * taps, parts)](
            _nhwc(dy), _nhwc(x), bits.contiguous(), whole, M, H, W, IN, OUT, P, Q, bits.shape[3],
            padding, share, STRIDE=stride, TAPS=taps, TAPS_W=kw, ATOMIC=atomic,
            BLOCK_O=c.rows, BLOCK_I=c.columns, BLOCK_M=c.inner, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    if parts == 1 or atomic:
        return whole[0].to(w.dtype).permute(0, 3, 1, 2)
    dw = torch.empty(OUT, kh, kw, IN, device=w.device, dtype=w.dtype)
    with device_of(dw):
        _add_parts[(cdiv(dw.numel(), 1024),)](whole, dw, dw.numel(), parts, BLOCK=1024, num_warps=4)
    return dw.permute(0, 3, 1, 2)


def weight_parts(
    outputs: int, inputs: int, taps: int, pixels: int, dtype: torch.dtype, parts: int | None = None,
    config: Tiles | None = None,
) -> tuple[Tiles, int, int]:  # fmt: skip
    """How the weight gradient's sum over pixels is cut: its tiles, the number of pieces, pixels in each."""
    copies = taps * cdiv(pixels, 512)  # parts fill the device, too
    c = config or _weight_grad_tiles(choose(outputs, inputs, copies, dtype, outputs, inputs))
    tiles = cdiv(outputs, c.rows) * cdiv(inputs, c.columns) * taps
    parts = min(parts or enough_parts(tiles, pixels), max(cdiv(pixels, c.inner), 1))
    share = max(cdiv(cdiv(pixels, parts), c.inner), 1) * c.inner
    return c, max(cdiv(pixels, share), 1), share


def result_size(size: int, taps: int, stride: int, padding: int) -> int:
    """Rows (or columns) of the result."""
    return (size + 2 * padding - taps) // stride + 1


def _weight_grad_tiles(c: Tiles) -> Tiles:
    return c._replace(inner=16) if c == FP32 else c  # spills on sm_80 otherwise, where channels are odd


def enough_parts(tiles: int, pixels: int) -> int:
    """Pieces of the weight gradient's sum: two programs for each of an H200's 132 multiprocessors, 512 pixels each."""
    return max(1, min(264 // tiles, pixels // 512))


def _nhwc(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def aot_cases() -> list[AotCase]:
    """Every configuration that a launcher takes, for 3x3 filters: channels that divide by 16 and, "odd", channels that
    do not, as images have. fp16 needs what bf16 needs."""
    roles = {"forward": (_forward, ("O", "M", "I")), "input_grad": (_input_grad, ("I", "M", "O")),
             "weight_grad": (_weight_grad, ("O", "I", "M"))}  # fmt: skip
    cases = []
    for label, images, weights, base, stride in (
        ("fp32", "*fp32", "*fp32", FP32, 1), ("fp32 odd", "*fp32", "*fp32", FP32, 1),
        ("bf16-fp32", "*bf16", "*fp32", SMALL, 1), ("bf16-fp32", "*bf16", "*fp32", LARGE, 1),
        ("bf16-fp32 odd", "*bf16", "*fp32", ODD, 1),
        ("fp16-stride2", "*fp16", "*fp16", SMALL, 2), ("bf16", "*bf16", "*bf16", LARGE, 1),
        ("bf16 odd", "*bf16", "*bf16", ODD, 1),
    ):  # fmt: skip
        for role, (kernel, (rows, columns, inner)) in roles.items():
            own = {"input_grad": _input_grad_tiles, "weight_grad": _weight_grad_tiles}
            c = own[role](base) if role in own else base
            constants = {"STRIDE": stride, "TAPS": 9, "TAPS_H": 3, "TAPS_W": 3, "BIAS": True, "ATOMIC": False,
                         f"BLOCK_{rows}": c.rows, f"BLOCK_{columns}": c.columns, f"BLOCK_{inner}": c.inner}  # fmt: skip
            types = dict.fromkeys(("x", "y", "dy", "dx"), images) | dict.fromkeys(("w", "bias", "dw"), weights)
            types["bits"] = "*i32"
            names = [n for n in kernel.arg_names if n not in constants]
            cases.append(AotCase(
                f"masked_conv {role} {label} {c.rows}x{c.columns}x{c.inner}", kernel,
                {n: types.get(n, "i32") for n in names},
                {n: v for n, v in constants.items() if n in kernel.arg_names},
                aligned=tuple(n for n in names if n in types or (n in ("IN", "OUT") and "odd" not in label)),
                num_warps=c.warps, num_stages=c.stages, tensor_cores=images != "*fp32", ieee=images == "*fp32",
            ))  # fmt: skip
    atomic = next(c for c in cases if c.kernel is _weight_grad and c.tensor_cores)
    cases.append(replace(atomic, name=f"{atomic.name} atomic", constants={**atomic.constants, "ATOMIC": True}))
    for label, weights, aligned in (("", "*fp32", True), (" odd", "*fp32", False),
                                    (" bf16", "*bf16", True), (" bf16 odd", "*bf16", False)):  # fmt: skip
        cases.append(AotCase(
            f"masked_conv add_parts{label}", _add_parts, {"parts": "*fp32", "dw": weights, "n": "i32", "PARTS": "i32"},
            {"BLOCK": 1024}, aligned=("parts", "dw", "n") if aligned else ("parts", "dw"),
        ))  # fmt: skip
    return cases
