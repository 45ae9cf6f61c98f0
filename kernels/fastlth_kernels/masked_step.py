"""One training step of all weights, in one pass over memory:

    g += decay w;   m, v = moments of g;   w -= lr update(m, v);   w, m, v = where(kept, ..., 0);   copy = bf16(w)

SGD (momentum, Nesterov), Adam and AdamW as in torch.optim, without dampening, amsgrad and maximize. A pruned weight
and its state become +0.0 whatever its gradient says, NaN included. fp32 weights and state, fp32 or bf16 gradients; the
reference also takes float64 for fp32 throughout.
SGD with momentum reads and writes 20 bytes per weight plus one bit, a bf16 copy 2 more; the same step as a sequence of
PyTorch calls 72.

All tensors take one launch: a table on the device holds their addresses. Learning rate and the other settings are a
device tensor, so a captured graph or a compiled step sees their changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .bitmask import kept_bits, unpack, words_shape
from .kth_magnitude import count_digits, first_digit
from .launch import AotCase, cdiv, jit, on_gpu, tl

LR, DECAY, STEPS = 0, 1, 10  # places in the tensor of settings
BLOCK = 1024
_COLUMNS = 9  # weight, grad, first, second, copy, bits: addresses, 0 where there is none; size; row; gradient is bf16


def step_settings(
    lr: float, *, weight_decay: float = 0.0, momentum: float = 0.0, betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """The settings of ``masked_step``, [11] of the weights' dtype: write ``[LR]`` and ``[DECAY]`` at any time;
    ``[STEPS]`` counts the steps of Adam and is 0 for a fresh optimizer. 1 - beta and log(beta) are held beside beta,
    because in float32 1 - 0.999 would be wrong in the fifth digit."""
    values = [lr, weight_decay, momentum]
    for beta in betas:
        values += [beta, 1 - beta, math.log(beta) if beta > 0 else -1e30]
    values += [eps, 0.0]
    return torch.tensor(values, dtype=dtype, device=device)


def _reference(
    weights: Sequence[Tensor], grads: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor],
    copies: Sequence[Tensor], bits: Sequence[Tensor], settings: Tensor, histogram: Tensor | None,
    optimizer: str, nesterov: bool,
) -> None:  # fmt: skip
    lr, decay, momentum, _, rest1, log1, b2, rest2, log2, eps, steps = settings.unbind()
    for i, (w, grad) in enumerate(zip(weights, grads, strict=True)):
        g = grad.to(w.dtype)
        if optimizer != "adamw":
            g = g + decay * w
        if optimizer == "sgd":
            if first:
                m = momentum * first[i] + g
                g = g + momentum * m if nesterov else m
            new = w - lr * g
        else:
            m = first[i] + rest1 * (g - first[i])
            v = b2 * second[i] + rest2 * g * g
            correction1, correction2 = -torch.expm1(steps * log1), -torch.expm1(steps * log2)
            start = w * (1 - lr * decay) if optimizer == "adamw" else w
            new = start - lr / correction1 * (m / (v.sqrt() / correction2.sqrt() + eps))
        kept = unpack(bits[i], w.shape[-1]) if bits[i].numel() else None
        w.copy_(new if kept is None else torch.where(kept, new, 0.0))
        if first:
            first[i].copy_(m if kept is None else torch.where(kept, m, 0.0))
        if second:
            second[i].copy_(v if kept is None else torch.where(kept, v, 0.0))
        if copies:
            copies[i].copy_(w)
        if histogram is not None and kept is not None:
            digits = first_digit(w.view(torch.int32)[kept])
            histogram += torch.bincount(digits, minlength=2048).to(torch.int32)


@jit
def one_minus_exp(x):  # type: ignore[no-untyped-def]
    """1 - exp(x) for x <= 0, to a few units in the last place also where exp(x) is almost 1."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))))))
    return tl.where(x > -0.5, -series, 1 - tl.exp(x))


@jit
def _step_block(  # type: ignore[no-untyped-def]
    row, start, n, settings, histogram, ADAM: tl.constexpr, DECOUPLED: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, COPY: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    index = start + tl.arange(0, BLOCK)
    inside = index < n
    weights = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), 16) + index
    grads = tl.load(row + 1)
    if tl.load(row + 8) != 0:
        narrow = tl.multiple_of(grads.to(tl.pointer_type(tl.bfloat16)), 16) + index
        g = (tl.load(narrow) if WHOLE else tl.load(narrow, mask=inside, other=0.0)).to(tl.float32)
    else:
        wide = tl.multiple_of(grads.to(tl.pointer_type(tl.float32)), 16) + index
        g = tl.load(wide) if WHOLE else tl.load(wide, mask=inside, other=0.0)
    w = tl.load(weights) if WHOLE else tl.load(weights, mask=inside, other=0.0)
    masked = tl.load(row + 5) != 0
    if masked:
        words = tl.load(row + 5).to(tl.pointer_type(tl.int32))
        kept = kept_bits(words, start, tl.load(row + 7).to(tl.int32), n, BLOCK, WHOLE)
    else:
        kept = inside
    lr, decay = tl.load(settings), tl.load(settings + 1)
    if not DECOUPLED:
        g = g + decay * w
    if ADAM or MOMENTUM:
        firsts = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.float32)), 16) + index
        m = tl.load(firsts) if WHOLE else tl.load(firsts, mask=inside, other=0.0)
    if ADAM:
        seconds = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.float32)), 16) + index
        v = tl.load(seconds) if WHOLE else tl.load(seconds, mask=inside, other=0.0)
        m = m + tl.load(settings + 4) * (g - m)
        v = tl.load(settings + 6) * v + tl.load(settings + 7) * g * g
        steps = tl.load(settings + 10)
        root = tl.sqrt_rn(one_minus_exp(steps * tl.load(settings + 8)))
        rate = tl.div_rn(lr, one_minus_exp(steps * tl.load(settings + 5)))
        if DECOUPLED:
            w = w * (1 - lr * decay)
        w = w - rate * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + tl.load(settings + 9))
    elif MOMENTUM:
        momentum = tl.load(settings + 2)
        m = momentum * m + g
        if NESTEROV:
            g = g + momentum * m
        else:
            g = m
        w = w - lr * g
    else:
        w = w - lr * g
    # where() and not a product: 0 times NaN is NaN
    w = tl.where(kept, w, 0.0)
    tl.store(weights, w) if WHOLE else tl.store(weights, w, mask=inside)
    if ADAM or MOMENTUM:
        m = tl.where(kept, m, 0.0)
        tl.store(firsts, m) if WHOLE else tl.store(firsts, m, mask=inside)
    if ADAM:
        v = tl.where(kept, v, 0.0)
        tl.store(seconds, v) if WHOLE else tl.store(seconds, v, mask=inside)
    if COPY:
        copies = tl.multiple_of(tl.load(row + 4).to(tl.pointer_type(tl.bfloat16)), 16) + index
        tl.store(copies, w.to(tl.bfloat16)) if WHOLE else tl.store(copies, w.to(tl.bfloat16), mask=inside)
    if COUNT:
        if masked:
            count_digits(w, kept, histogram)


@jit
def _step_kernel(  # type: ignore[no-untyped-def]
    pointers, work, settings, histogram, ADAM: tl.constexpr, DECOUPLED: tl.constexpr, MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr, COPY: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = pointers + tl.load(work + 2 * program) * COLUMNS
    start = tl.load(work + 2 * program + 1) * BLOCK
    n = tl.load(row + 6).to(tl.int32)
    # Two copies of the code, since only the one that needs no bounds can load and store 128 bits at a time.
    if start + BLOCK <= n:
        _step_block(row, start, n, settings, histogram, ADAM, DECOUPLED, MOMENTUM, NESTEROV, COPY, COUNT, BLOCK, True)
    else:
        _step_block(row, start, n, settings, histogram, ADAM, DECOUPLED, MOMENTUM, NESTEROV, COPY, COUNT, BLOCK, False)


class StepTable(NamedTuple):
    """Where the tensors of a step are: ``pointers`` int64 [tensors, 9] and ``work`` int32 [programs, 2], which holds
    the tensor and the block of each program."""

    pointers: Tensor
    work: Tensor


def step_table(
    weights: Sequence[Tensor], grads: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor],
    copies: Sequence[Tensor], bits: Sequence[Tensor],
) -> StepTable:  # fmt: skip
    """The table of these tensors, on their device; anew whenever one of them has moved.

    A step in a CUDA graph meets its gradients' addresses only while it is captured: capture with a table of the right
    shapes, then ``table.pointers.copy_(step_table(...).pointers)`` before the first replay.
    Raises ValueError where a tensor has a wrong type, shape or layout, or does not start at a multiple of 16 bytes.
    """
    _check(weights, grads, first, second, copies, bits)
    rows, work = [], []
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        tensors = [w, g, *(group[i] if group else None for group in (first, second, copies)), bits[i]]
        addresses = [0 if t is None or t.numel() == 0 else t.data_ptr() for t in tensors]
        if any(a % 16 for a in addresses[:5]) or addresses[5] % 4:
            raise ValueError(f"tensor {i} of the step does not start at a multiple of 16 bytes; copy it")
        rows.append([*addresses, w.numel(), w.shape[-1] if bits[i].numel() else 0, int(g.dtype == torch.bfloat16)])
        work += [[i, block] for block in range(cdiv(w.numel(), BLOCK))]
    device = weights[0].device
    return StepTable(
        torch.tensor(rows, dtype=torch.int64).to(device),
        torch.tensor(work, dtype=torch.int32).reshape(-1, 2).to(device),
    )


def _check(
    weights: Sequence[Tensor], grads: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor],
    copies: Sequence[Tensor], bits: Sequence[Tensor],
) -> None:  # fmt: skip
    if not weights:
        raise ValueError("a step needs at least one weight tensor")
    if not len(weights) == len(grads) == len(bits):
        raise ValueError(f"{len(weights)} weights, {len(grads)} gradients and {len(bits)} masks: must be as many")
    for name, group in (("first moments", first), ("second moments", second), ("copies", copies)):
        if len(group) not in (0, len(weights)):
            raise ValueError(f"{len(group)} {name} for {len(weights)} weights: one each, or none at all")
    wide = torch.float64 if _exact(weights) else torch.float32
    for i, w in enumerate(weights):
        for name, group, dtypes in (
            ("weight", weights, (wide,)), ("gradient", grads, (wide, torch.bfloat16)),
            ("first moment", first, (wide,)), ("second moment", second, (wide,)),
            ("copy", copies, (torch.bfloat16,)),
        ):  # fmt: skip
            if group and (group[i].dtype not in dtypes or group[i].shape != w.shape or not group[i].is_contiguous()):
                raise ValueError(
                    f"{name} {i} is {group[i].dtype} {tuple(group[i].shape)}, strides {group[i].stride()}; it must be "
                    f"{' or '.join(map(str, dtypes))} {tuple(w.shape)}, contiguous (pass OHWI views of convolutions)"
                )
        if bits[i].dtype != torch.int32 or not bits[i].is_contiguous():
            raise ValueError(f"mask {i} must be contiguous int32 words, empty where nothing is pruned")
        if bits[i].numel() and bits[i].shape != words_shape(w.shape):
            shapes = f"{tuple(bits[i].shape)} words; a weight {tuple(w.shape)} has {words_shape(w.shape)}"
            raise ValueError(f"mask {i} is {shapes}")
        if w.numel() >= 2**31 - BLOCK:
            raise ValueError(f"weight {i} has {w.numel()} elements; a step takes fewer than 2^31")


def _exact(weights: Sequence[Tensor]) -> bool:
    """Whether the step is made in float64, which is the reference's alone."""
    return weights[0].dtype == torch.float64 and not on_gpu(weights[0])


def _launch(
    table: StepTable, settings: Tensor, histogram: Tensor | None, optimizer: str, nesterov: bool,
    *, momentum: bool, copy: bool,
) -> None:  # fmt: skip
    adam = optimizer != "sgd"
    _step_kernel[(len(table.work),)](
        table.pointers, table.work, settings, settings if histogram is None else histogram,
        ADAM=adam, DECOUPLED=optimizer == "adamw", MOMENTUM=momentum, NESTEROV=nesterov, COPY=copy,
        COUNT=histogram is not None, BLOCK=BLOCK, COLUMNS=_COLUMNS, num_warps=8,
    )  # fmt: skip


@torch.library.custom_op(
    "fastlth::masked_step", mutates_args=("weights", "first", "second", "copies", "settings", "histogram")
)
def masked_step(
    weights: Sequence[Tensor], grads: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor],
    copies: Sequence[Tensor], bits: Sequence[Tensor], settings: Tensor, histogram: Tensor | None,
    pointers: Tensor, work: Tensor, optimizer: str, nesterov: bool = False,
) -> None:  # fmt: skip
    """One step in place. Contiguous tensors, convolution weights as OHWI.

    weights, first, second: fp32; first is the momentum of SGD (empty list: none) or Adam's first moment, second Adam's
    second (empty for SGD); copies: bf16, or an empty list; bits: packed masks ([..., ceil(K / 32)] int32 for a weight
    [..., K]), an empty tensor where nothing is pruned. settings: ``step_settings``. histogram: int32 [2048], to which
    the leading 11 bits of every kept |w| of the tensors with a mask are added, or None. pointers, work: ``step_table``
    of the same tensors (the CPU ignores it). optimizer: sgd, adam or adamw. Raises ValueError otherwise.
    """
    _check(weights, grads, first, second, copies, bits)
    if optimizer not in ("sgd", "adam", "adamw"):
        raise ValueError(f"optimizer {optimizer!r} is not one of sgd, adam, adamw")
    if (optimizer != "sgd") != bool(second) or (second and not first):
        raise ValueError(f"{optimizer} got {len(first)} first and {len(second)} second moments")
    if optimizer != "sgd":
        settings[STEPS].add_(1)
    if on_gpu(weights[0]):
        with torch.cuda.device(weights[0].device):
            _launch(StepTable(pointers, work), settings, histogram, optimizer, nesterov,
                    momentum=bool(first), copy=bool(copies))  # fmt: skip
    else:
        _reference(weights, grads, first, second, copies, bits, settings, histogram, optimizer, nesterov)


@masked_step.register_fake
def _(weights: Sequence[Tensor], *rest: object, **named: object) -> None:
    return None


def step_bytes(
    weights: int, optimizer: str, *, momentum: bool = False, copy: bool = False, bf16: bool = False
) -> float:
    """Bytes of memory traffic of one step of that many masked weights, each tensor read and written once."""
    state = 2 if optimizer != "sgd" else int(momentum)
    return weights * (8 + (2 if bf16 else 4) + 8 * state + 2 * copy + 1 / 8)


def step_operations(weights: int, optimizer: str, *, momentum: bool = False, nesterov: bool = False) -> int:
    """Floating-point operations of one step of that many weights, as the formulas have them; a root is one."""
    if optimizer == "sgd":
        return weights * (4 + 2 * momentum + 2 * nesterov)
    return weights * (15 if optimizer == "adam" else 14)  # decay 2 or 1, first moment 3, second 4, update 6


def aot_cases() -> list[AotCase]:
    """The steps the trainer makes: SGD with momentum and bf16 copy, with Nesterov and a histogram, Adam, AdamW."""
    signature = {"pointers": "*i64", "work": "*i32", "settings": "*fp32", "histogram": "*i32"}
    kinds = {
        "sgd": dict(MOMENTUM=True, COPY=True), "sgd nesterov counted": dict(MOMENTUM=True, NESTEROV=True, COUNT=True),
        "adam": dict(ADAM=True), "adamw": dict(ADAM=True, DECOUPLED=True, COPY=True),
    }  # fmt: skip
    flags = ("ADAM", "DECOUPLED", "MOMENTUM", "NESTEROV", "COPY", "COUNT")
    return [
        AotCase(
            f"masked_step {name}", _step_kernel, signature,
            {**dict.fromkeys(flags, False), **on, "BLOCK": BLOCK, "COLUMNS": _COLUMNS}, num_warps=8,
        )
        for name, on in kinds.items()
    ]  # fmt: skip
