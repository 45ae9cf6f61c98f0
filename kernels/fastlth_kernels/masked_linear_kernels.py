"""Triton kernels of ``masked_linear``, and their launchers.

With w m = where(m, w, 0), made in registers from packed bits, for each replicate r (grid axis 2):

    y^T [N, B]  = (w m) x^T + b             _forward         the masked weight is the left operand, which wgmma
    dx^T [K, B] = (w m)^T g^T               _input_grad      reads from registers
    dw [N, K]   = where(m, g^T x, 0)        _weight_grad     and db [N] = sum of g over the batch
    Adam by this dw and db, in place        _adam_step       gradients are never stored

g is dy, or dy where y > 0 if a ReLU followed: read from y, never stored. Sums are fp32, fp32 products IEEE and not
TF32. Tensors are contiguous; no size needs to be a multiple of anything. Words beyond a row's last are never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import AotCase, cdiv, jit, jit_but, tl
from .masked_step import one_minus_exp as one_minus_exp
from .tiles import FP32, LARGE, ODD, SMALL, Tiles, choose, device_of, kept_columns, kept_rows


@jit
def _gradient(dy, y, at, ok, RELU: tl.constexpr):  # type: ignore[no-untyped-def]
    g = tl.load(dy + at, ok, 0.0)
    if RELU:
        g = tl.where(tl.load(y + at, ok, 0.0).to(tl.float32) <= 0.0, 0.0, g)
    return g


@jit_but(do_not_specialize=("B", "W"))
def _forward(  # type: ignore[no-untyped-def]
    x, w, bits, bias, y, B, N, K, W, BIAS: tl.constexpr, RELU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    n_ok, b_ok = n < N, b < B
    acc = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k, word = k0 + tl.arange(0, BLOCK_K), k0 // 32 + tl.arange(0, BLOCK_K // 32)
        words = tl.load(bits + r * N * W + n[:, None] * W + word[None, :], n_ok[:, None] & (word < W)[None, :], 0)
        weight = tl.load(w + r * N * K + n[:, None] * K + k[None, :], n_ok[:, None] & (k < K)[None, :], 0.0)
        right = tl.load(x + r * B * K + b[None, :] * K + k[:, None], (k < K)[:, None] & b_ok[None, :], 0.0)
        left = tl.where(kept_columns(words, BLOCK_K), weight, 0.0).to(right.dtype)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + r * N + n, n_ok, 0.0).to(tl.float32)[:, None]
    if RELU:
        acc = tl.where(acc <= 0.0, 0.0, acc)  # as torch's: NaN stays NaN
    tl.store(y + r * B * N + b[None, :] * N + n[:, None], acc, n_ok[:, None] & b_ok[None, :])


@jit_but(do_not_specialize=("B", "W"))
def _input_grad(  # type: ignore[no-untyped-def]
    dy, y, w, bits, dx, B, N, K, W, RELU: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(2).to(tl.int64)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    word = tl.program_id(0) * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    k_ok, b_ok = k < K, b < B
    acc = tl.zeros((BLOCK_K, BLOCK_B), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        n_ok = n < N
        words = tl.load(bits + r * N * W + n[None, :] * W + word[:, None], (word < W)[:, None] & n_ok[None, :], 0)
        weight = tl.load(w + r * N * K + n[None, :] * K + k[:, None], k_ok[:, None] & n_ok[None, :], 0.0)
        g = _gradient(dy, y, r * B * N + b[None, :] * N + n[:, None], n_ok[:, None] & b_ok[None, :], RELU)
        left = tl.where(kept_rows(words, BLOCK_K), weight, 0.0).to(g.dtype)
        acc = tl.dot(left, g, acc, input_precision="ieee")
    tl.store(dx + r * B * K + b[None, :] * K + k[:, None], acc, k_ok[:, None] & b_ok[None, :])


@jit
def _outer_product(  # type: ignore[no-untyped-def]
    dy, y, x, r, n, k, B, N, K, RELU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """g^T x, float32 [BLOCK_N, BLOCK_K]."""
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        b_ok = b < B
        g = _gradient(dy, y, r * B * N + b[None, :] * N + n[:, None], (n < N)[:, None] & b_ok[None, :], RELU)
        right = tl.load(x + r * B * K + b[:, None] * K + k[None, :], b_ok[:, None] & (k < K)[None, :], 0.0)
        acc = tl.dot(g, right, acc, input_precision="ieee")
    return acc


@jit
def _batch_sum(dy, y, r, n, B, N, RELU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of g over the batch, float32 [BLOCK_N]. A loop of its own: in the other it would stop the pipeline."""
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        g = _gradient(dy, y, r * B * N + b[:, None] * N + n[None, :], (b < B)[:, None] & (n < N)[None, :], RELU)
        acc += tl.sum(g.to(tl.float32), 0)
    return acc


@jit
def _kept_tile(bits, r, n, k0, N, W, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    word = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    words = tl.load(bits + r * N * W + n[:, None] * W + word[None, :], (n < N)[:, None] & (word < W)[None, :], 0)
    return kept_columns(words, BLOCK_K)


@jit_but(do_not_specialize=("B", "W"))
def _weight_grad(  # type: ignore[no-untyped-def]
    dy, y, x, bits, dw, db, B, N, K, W, BIAS: tl.constexpr, RELU: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = tl.program_id(1) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    acc = _outer_product(dy, y, x, r, n, k, B, N, K, RELU, BLOCK_N, BLOCK_K, BLOCK_B)
    kept = _kept_tile(bits, r, n, k0, N, W, BLOCK_K)
    inside = (n < N)[:, None] & (k < K)[None, :]
    tl.store(dw + r * N * K + n[:, None] * K + k[None, :], tl.where(kept, acc, 0.0), inside)
    if BIAS:
        if k0 == 0:
            tl.store(db + r * N + n, _batch_sum(dy, y, r, n, B, N, RELU, BLOCK_N, BLOCK_B), n < N)


@jit
def _adam(p, m, v, at, g, kept, inside, settings, DECOUPLED: tl.constexpr):  # type: ignore[no-untyped-def]
    """One update at the offsets ``at``, in place, by ``step_settings``; where not ``kept``, p, m and v become 0."""
    lr, decay, eps, steps = tl.load(settings), tl.load(settings + 1), tl.load(settings + 9), tl.load(settings + 10)
    value, first, second = tl.load(p + at, inside, 0.0), tl.load(m + at, inside, 0.0), tl.load(v + at, inside, 0.0)
    if DECOUPLED:
        value = value * (1 - lr * decay)
    else:
        g += decay * value
    first += tl.load(settings + 4) * (g - first)
    second = tl.load(settings + 6) * second + tl.load(settings + 7) * g * g
    rate = tl.div_rn(lr, one_minus_exp(steps * tl.load(settings + 5)))
    root = tl.sqrt_rn(one_minus_exp(steps * tl.load(settings + 8)))
    value -= rate * tl.div_rn(first, tl.div_rn(tl.sqrt_rn(second), root) + eps)
    tl.store(p + at, tl.where(kept, value, 0.0), inside)
    tl.store(m + at, tl.where(kept, first, 0.0), inside)
    tl.store(v + at, tl.where(kept, second, 0.0), inside)


@jit_but(do_not_specialize=("B", "W"))
def _adam_step(  # type: ignore[no-untyped-def]
    dy, y, x, bits, w, m, v, bias, bias_m, bias_v, settings, B, N, K, W,
    BIAS: tl.constexpr, RELU: tl.constexpr, DECOUPLED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = tl.program_id(1) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    acc = _outer_product(dy, y, x, r, n, k, B, N, K, RELU, BLOCK_N, BLOCK_K, BLOCK_B)
    kept = _kept_tile(bits, r, n, k0, N, W, BLOCK_K)
    inside = (n < N)[:, None] & (k < K)[None, :]
    _adam(w, m, v, r * N * K + n[:, None] * K + k[None, :], acc, kept, inside, settings, DECOUPLED)
    if BIAS:
        if k0 == 0:
            db = _batch_sum(dy, y, r, n, B, N, RELU, BLOCK_N, BLOCK_B)
            _adam(bias, bias_m, bias_v, r * N + n, db, n < N, n < N, settings, DECOUPLED)


def forward(x: Tensor, w: Tensor, bits: Tensor, bias: Tensor | None, relu: bool, config: Tiles | None = None) -> Tensor:
    """y [R, B, N] in x's dtype, from x [R, B, K], w [R, N, K], bits int32 [R, N, ceil(K / 32)], bias [R, N]."""
    (R, B, K), N = x.shape, w.shape[1]
    y = x.new_empty(R, B, N)
    c = config or choose(N, B, R, x.dtype, K)
    with device_of(x):
        _forward[(cdiv(N, c.rows), cdiv(B, c.columns), R)](
            x.contiguous(), w.contiguous(), bits.contiguous(), w if bias is None else bias.contiguous(), y,
            B, N, K, bits.shape[2], BIAS=bias is not None, RELU=relu,
            BLOCK_N=c.rows, BLOCK_B=c.columns, BLOCK_K=c.inner, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    return y


def input_grad(dy: Tensor, y: Tensor | None, w: Tensor, bits: Tensor, config: Tiles | None = None) -> Tensor:
    """dx [R, B, K] in dy's dtype. ``y`` is given where a ReLU followed."""
    (R, B, N), K = dy.shape, w.shape[2]
    dx = dy.new_empty(R, B, K)
    c = config or _input_grad_tiles(choose(K, B, R, dy.dtype, K, N))
    dy = dy.contiguous()
    with device_of(dy):
        _input_grad[(cdiv(K, c.rows), cdiv(B, c.columns), R)](
            dy, dy if y is None else y.contiguous(), w.contiguous(), bits.contiguous(), dx,
            B, N, K, bits.shape[2], RELU=y is not None,
            BLOCK_K=c.rows, BLOCK_B=c.columns, BLOCK_N=c.inner, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    return dx


def weight_grad(
    dy: Tensor, y: Tensor | None, x: Tensor, w: Tensor, bits: Tensor, bias: bool, config: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """dw [R, N, K], +0.0 where pruned, and db [R, N] ([R, 0] without ``bias``), in w's dtype."""
    (R, B, N), K = dy.shape, x.shape[2]
    dw, db = torch.empty_like(w, memory_format=torch.contiguous_format), w.new_empty(R, N if bias else 0)
    c = config or choose(N, K, R, dy.dtype, N, K)
    dy = dy.contiguous()
    with device_of(dy):
        _weight_grad[(cdiv(N, c.rows), cdiv(K, c.columns), R)](
            dy, dy if y is None else y.contiguous(), x.contiguous(), bits.contiguous(), dw, db,
            B, N, K, bits.shape[2], BIAS=bias, RELU=y is not None,
            BLOCK_N=c.rows, BLOCK_K=c.columns, BLOCK_B=c.inner, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    return dw, db


def _input_grad_tiles(c: Tiles) -> Tiles:
    return c._replace(inner=32) if c == LARGE else c  # spills on sm_80 otherwise


def _adam_tiles(c: Tiles) -> Tiles:
    return FP32._replace(columns=32) if c == FP32 else ODD  # the epilogue holds three more tiles


def adam_step(
    dy: Tensor, y: Tensor | None, x: Tensor, bits: Tensor, w: Tensor, m: Tensor, v: Tensor,
    bias: Tensor | None, bias_m: Tensor | None, bias_v: Tensor | None, settings: Tensor, decoupled: bool,
    config: Tiles | None = None,
) -> None:  # fmt: skip
    """Adam on w and bias by the gradients of (dy, x), in place; w, m, v, bias, bias_m and bias_v are contiguous
    float32. ``dx`` must have been made before, from the old w."""
    (R, B, N), K = dy.shape, x.shape[2]
    c = config or _adam_tiles(choose(N, K, R, dy.dtype, N, K))
    dy = dy.contiguous()
    with device_of(dy):
        _adam_step[(cdiv(N, c.rows), cdiv(K, c.columns), R)](
            dy, dy if y is None else y.contiguous(), x.contiguous(), bits.contiguous(), w, m, v,
            w if bias is None else bias, w if bias_m is None else bias_m, w if bias_v is None else bias_v, settings,
            B, N, K, bits.shape[2], BIAS=bias is not None, RELU=y is not None, DECOUPLED=decoupled,
            BLOCK_N=c.rows, BLOCK_K=c.columns, BLOCK_B=c.inner, num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip


def aot_cases() -> list[AotCase]:
    """Every configuration that a launcher takes: rows of x and w that divide by 16 and, "odd", rows that do not, as
    those of LeNet-300-100's second layer. fp16 needs what bf16 needs."""
    roles = {"forward": (_forward, ("N", "B", "K")), "input_grad": (_input_grad, ("K", "B", "N")),
             "weight_grad": (_weight_grad, ("N", "K", "B")), "adam_step": (_adam_step, ("N", "K", "B"))}  # fmt: skip
    cases = []
    for label, images, weights, base in (
        ("fp32", "*fp32", "*fp32", FP32), ("fp32 odd", "*fp32", "*fp32", FP32),
        ("bf16-fp32", "*bf16", "*fp32", SMALL), ("bf16-fp32", "*bf16", "*fp32", LARGE),
        ("bf16-fp32 odd", "*bf16", "*fp32", ODD),
        ("fp16", "*fp16", "*fp16", SMALL), ("bf16", "*bf16", "*bf16", LARGE), ("bf16 odd", "*bf16", "*bf16", ODD),
    ):  # fmt: skip
        for role, (kernel, (rows, columns, inner)) in roles.items():
            if role == "adam_step" and (weights != "*fp32" or base == LARGE):  # Adam's LARGE is its SMALL
                continue
            own = {"input_grad": _input_grad_tiles, "adam_step": _adam_tiles}
            c = own[role](base) if role in own else base
            constants = {"BIAS": True, "RELU": True, "DECOUPLED": False, f"BLOCK_{rows}": c.rows,
                         f"BLOCK_{columns}": c.columns, f"BLOCK_{inner}": c.inner}  # fmt: skip
            types = {n: "i32" for n in "BNKW"} | {n: images for n in ("x", "y", "dy", "dx")} | {"bits": "*i32"}
            names = [n for n in kernel.arg_names if n not in constants]
            known = "" if "odd" in label else "NK"
            cases.append(AotCase(
                f"masked_linear {role} {label} {c.rows}x{c.columns}x{c.inner}", kernel,
                {n: types.get(n, weights) for n in names},
                {n: v for n, v in constants.items() if n in kernel.arg_names},
                aligned=tuple(n for n in names if n in known or n not in "BNKW"),
                num_warps=c.warps, num_stages=c.stages,
                tensor_cores=images != "*fp32", ieee=images == "*fp32",
            ))  # fmt: skip
    return cases
