"""The update of 64 weights at a time: SGD with momentum, Adam, AdamW, as torch.optim defines them.

SGD     g += decay w;  v = momentum v + g;  w -= lr (g + momentum v  if nesterov else  v)
Adam    g += decay w;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  w -= lr1 m / (sqrt(v) c2 + eps)
AdamW   w -= lr decay w, then Adam without decay        with lr1 = lr / (1 - b1^t), c2 = 1 / sqrt(1 - b2^t)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .compiled import compiled
from .simd import HAS_AVX512, LANES, fma, load, load_like, quarter, reciprocal, rsqrt, splat_like, store, times

SGD, ADAM, ADAMW = 0, 1, 2
KINDS = {"sgd": SGD, "adam": ADAM, "adamw": ADAMW}


class Rule(NamedTuple):
    """An optimizer's numbers at one step, in the precision of the weights; ``kind`` is a value of KINDS."""

    kind: int
    nesterov: int
    lr: float
    decay: float
    momentum: float
    beta1: float
    beta2: float
    eps: float
    lr1: float
    c2: float


@compiled
def rule_at(memory: Any, kind: int, nesterov: int, numbers: Any, lr: float, step: int) -> Rule:
    """The rule of the ``step``-th update (from 1). ``numbers``: float64 [decay, momentum, beta1, beta2, eps]."""
    real = memory.dtype.type
    decay, momentum, beta1, beta2, eps = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    lr1, c2 = lr, 1.0
    if kind != SGD:
        lr1, c2 = lr / (1.0 - beta1**step), 1.0 / math.sqrt(1.0 - beta2**step)
    return Rule(kind, nesterov, real(lr), real(decay), real(momentum), real(beta1), real(beta2), real(eps),
                real(lr1), real(c2))  # fmt: skip


@compiled
def update64(memory: Any, w: int, m: int, v: int, g: Any, rule: Rule) -> None:
    """Update the 64 weights at ``w`` by the gradients ``g``; their moments lie at ``m`` and ``v`` (SGD has only m)."""
    if HAS_AVX512:
        _update(memory, w, m, v, g, rule)
    else:  # 64 weights and all that is made of them would not fit into the registers
        _update(memory, w, m, v, quarter(g, 0), rule)
        _update(memory, w + 16, m + 16, v + 16, quarter(g, 1), rule)
        _update(memory, w + 32, m + 32, v + 32, quarter(g, 2), rule)
        _update(memory, w + 48, m + 48, v + 48, quarter(g, 3), rule)


@compiled
def _update(memory: Any, w: int, m: int, v: int, g: Any, rule: Rule) -> None:
    """As many weights as ``g`` has lanes."""
    real = memory.dtype.type
    weight = load_like(memory, w, g)
    if rule.kind == ADAMW:
        weight = fma(-(rule.lr * rule.decay), weight, weight)
    elif rule.decay != 0:
        g = fma(rule.decay, weight, g)
    if rule.kind == SGD:
        if rule.momentum != 0:
            momentum = fma(rule.momentum, load_like(memory, m, g), g)
            store(memory, m, momentum)
            g = fma(rule.momentum, momentum, g) if rule.nesterov else momentum
        store(memory, w, fma(-rule.lr, g, weight))
    else:
        mean, square = load_like(memory, m, g), load_like(memory, v, g)
        mean = fma(real(1) - rule.beta1, g - mean, mean)
        square = fma(rule.beta2, square, times(real(1) - rule.beta2, g) * g)
        store(memory, m, mean)
        store(memory, v, square)
        above_zero = square + splat_like(
            real(1e-30), g
        )  # 1 / sqrt(0) is infinite; the root of this is far below any eps
        root = above_zero * rsqrt(above_zero)
        step = mean * reciprocal(fma(rule.c2, root, splat_like(rule.eps, g)))
        store(memory, w, fma(-rule.lr1, step, weight))


@compiled
def update(memory: Any, w: int, m: int, v: int, g: int, count: int, rule: Rule) -> None:
    """``count`` weights (a multiple of 64), their gradients at ``g``."""
    for i in range(0, count, LANES):
        update64(memory, w + i, m + i, v + i, load(memory, g + i), rule)
