"""Masks as bits, 32 weights to an int32 word along the last dimension: bit k % 32 of word k // 32 is mask[..., k].

A bool mask takes 1 byte per weight of every step's traffic, the words take 1/8. The bits of a row's last word beyond
its end are 0 when written and never looked at when read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import cdiv, jit, tl


def pack(mask: Tensor) -> Tensor:
    """bool [..., K] -> int32 [..., ceil(K / 32)]. Raises TypeError if the mask is not bool."""
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask is a bool tensor; this one is {mask.dtype}")
    shape = words_shape(mask.shape)
    padded = torch.nn.functional.pad(mask, (0, 32 * shape[-1] - mask.shape[-1])).view(*shape, 32)
    bits = padded.to(torch.int64) << torch.arange(32, device=mask.device)
    unsigned = bits.sum(-1)
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)


def unpack(words: Tensor, size: int) -> Tensor:
    """int32 [..., ceil(size / 32)] -> bool [..., size]. Raises ValueError if the number of words does not fit."""
    if words.shape[-1] != cdiv(size, 32):
        raise ValueError(f"{words.shape[-1]} words in a row; {size} bits need {cdiv(size, 32)}")
    bits = (words[..., None] >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    return (bits != 0).flatten(-2)[..., :size]


def words_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the words of a mask of this shape."""
    return (*shape[:-1], cdiv(shape[-1], 32))


@jit
def kept_bits(words, start, row_length, n, BLOCK: tl.constexpr, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """bool [BLOCK]: the mask of elements start... of a contiguous tensor of n elements in rows of ``row_length``.

    start is a multiple of BLOCK. WHOLE: the block ends at or before n; else elements from n on read as pruned.
    """
    index = start + tl.arange(0, BLOCK)
    if row_length % 32 == 0:  # rows are whole words: no division
        place, column = index // 32, index
    else:
        row = index // row_length
        place, column = row * ((row_length + 31) // 32) + (index - row * row_length) // 32, index - row * row_length
    word = tl.load(words + place) if WHOLE else tl.load(words + place, mask=index < n, other=0)
    kept = (word >> (column % 32)) & 1
    if not WHOLE:
        kept = tl.where(index < n, kept, 0)
    return kept != 0
