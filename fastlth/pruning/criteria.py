"""Criteria: a score per weight from its value before (w_i) and after (w_f) a round's training.

The weights with the lowest scores are removed; equal scores go in the random order of ``select.py``.
Names and formulas: Zhou et al. 2019, "Deconstructing Lottery Tickets", section 3, and the authors' program;
docs/criteria.md is the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlth.catalogue import SIGN_TESTS as SIGN_TESTS


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a score may depend on; all tensors have the shape of one weight tensor and lie on one device."""

    initial: Tensor
    """w_i: what the round started with"""
    final: Tensor
    """w_f: what it ended with"""
    kept: Tensor
    """bool: the mask of the round; scores elsewhere mean nothing"""
    gradient: Callable[[], Tensor] | None = None
    """dL/dw at w_i, over the training images; only snip and grad call it"""
    alpha: float = 1.0
    """weighs w_f against w_i in large_init_large_final and small_init_small_final"""
    code: bool = False
    """where paper and program differ, do as the program does"""


Score = Callable[[Inputs], Tensor]


def _large_init_large_final(x: Inputs) -> Tensor:
    initial, final = x.initial.abs(), x.final.abs()
    if x.code:
        return torch.minimum(_rank(initial, x.kept), _rank(final, x.kept))
    return torch.minimum(x.alpha * final, initial)


def _small_init_small_final(x: Inputs) -> Tensor:
    initial, final = x.initial.abs(), x.final.abs()
    if x.code:
        return torch.minimum(_rank(-initial, x.kept), _rank(-final, x.kept))
    return -torch.maximum(x.alpha * final, initial)


def _rank(values: Tensor, kept: Tensor) -> Tensor:
    """How many kept values are smaller. The program searches for the percentile p at which the weights that are in
    the top p of both rankings are as many as it wants: these are the ones whose lower rank is highest."""
    return torch.searchsorted(values[kept].sort().values, values.contiguous())


def _increase(x: Inputs) -> Tensor:
    return x.final.abs() - x.initial.abs()


def _same_sign(x: Inputs) -> Tensor:
    """Three signs: that of 0 (and of -0.0) is equal to itself alone."""
    return x.initial.sign() == x.final.sign()


def _increase_within(x: Inputs, wanted: Tensor) -> Tensor:
    """The program scores the unwanted weights 0, which ranks them above all that shrank."""
    return _increase(x).masked_fill(~wanted, 0.0 if x.code else -math.inf)


def _gradient(x: Inputs) -> Tensor:
    if x.gradient is None:
        raise ValueError("this criterion needs gradients")
    return x.gradient()


CRITERIA: dict[str, Score] = {
    "large_final": lambda x: x.final.abs(),
    "small_final": lambda x: -x.final.abs(),
    "large_init": lambda x: x.initial.abs(),
    "small_init": lambda x: -x.initial.abs(),
    "large_init_large_final": _large_init_large_final,
    "small_init_small_final": _small_init_small_final,
    "magnitude_increase": _increase,
    "movement": lambda x: (x.final - x.initial).abs(),
    "random": lambda x: torch.zeros_like(x.final),  # all tie, and ties go by random keys
    "large_final_same_sign": lambda x: x.final.abs().masked_fill(~_same_sign(x), 0.0),
    "large_final_diff_sign": lambda x: x.final.abs().masked_fill(_same_sign(x), 0.0),
    "magnitude_increase_same_sign": lambda x: _increase_within(x, _same_sign(x)),
    "magnitude_increase_diff_sign": lambda x: _increase_within(x, ~_same_sign(x)),
    "large_final_same_sign_single": _same_sign,  # of these two the score, a bool, is the new mask itself
    "large_final_diff_sign_single": lambda x: ~_same_sign(x),
    "snip": lambda x: (_gradient(x) * x.initial).abs(),
    "grad": lambda x: _gradient(x).abs(),
}
