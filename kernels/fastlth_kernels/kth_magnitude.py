"""Prune by magnitude, exactly: of all kept weights of several tensors, the ``count`` lowest by (|w|, key) go.

    threshold = k-th smallest |w|;   removed = |w| < threshold, and of those equal to it the lowest by a random key

The key is words 0 and 1 of Philox counter (index, tensor number, round, 0), so ties are broken reproducibly and without
bias, to the very weights ``argsort`` would choose. On the GPU the k-th is found digit by digit: the bits of |w| order
as |w| does, denormals included; a histogram of their leading 11 bits says which digit the k-th has, one of the next 10
among those the next digit, and so on: three passes, six more over the key only where a tie must be broken.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from .bitmask import pack, unpack, words_shape
from .launch import AotCase, cdiv, jit, jit_but, on_gpu, tl
from .philox import philox
from .philox_triton import philox_words

_INF = 0x7F800000
# (word, lowest bit, width) from the leading digit on; words: 0 is |w|, 31 bits; 1 and 2 the key, 32 and 31 bits.
_DIGITS = [
    (0, 20, 11), (0, 10, 10), (0, 0, 10),
    (1, 21, 11), (1, 10, 11), (1, 0, 10), (2, 20, 11), (2, 10, 10), (2, 0, 10),
]  # fmt: skip
_WORDS = 32  # mask words per program: 1,024 weights
NUMBERS = ("words", "spatial", "number", "round", "key0", "key1")
"""what the kernels are not compiled anew for: otherwise rounds 1 and 16 would wait for a compiler"""
_LAUNCHING = threading.Lock()
"""Replicates prune at once, each in its thread, and Triton's first launch of a kernel is not safe in several."""


def first_digit(weight_bits: Tensor) -> Tensor:
    """The leading 11 bits of |w| for weights seen as int32; 2047, which no number has, for NaN."""
    magnitude = weight_bits & 0x7FFFFFFF
    return torch.where(magnitude > _INF, 2047, magnitude >> 20)


def _reference(
    weights: Sequence[Tensor],
    bits: Sequence[Tensor],
    count: int,
    numbers: Sequence[int],
    round: int,
    key: Sequence[int],
) -> tuple[Tensor, list[Tensor]]:
    """The k-th smallest |w| as int32 bits, 0-d, and the new masks."""
    masks = [unpack(b, w.shape[-1]) for w, b in zip(weights, bits, strict=True)]
    values = torch.cat([w.view(torch.int32)[m] & 0x7FFFFFFF for w, m in zip(weights, masks, strict=True)])
    _refuse(int((values > _INF).sum()), len(values), count)
    threshold = values.sort().values[count - 1].clone()
    removed = values < threshold
    index = torch.cat([_logical_index(w)[m] for w, m in zip(weights, masks, strict=True)])
    tensor = torch.cat([torch.full((int(m.sum()),), n, device=m.device) for n, m in zip(numbers, masks, strict=True)])
    tied = (values == threshold).nonzero().squeeze(1)
    w0, w1, _, _ = philox(index[tied], tensor[tied], round, 0, (key[0], key[1]))
    order = ((w0 << 31) | (w1 >> 1)).argsort(stable=True)
    removed[tied[order[: count - int(removed.sum())]]] = True
    for mask, gone in zip(masks, torch.split(removed, [int(m.sum()) for m in masks]), strict=True):
        mask[mask.clone()] = ~gone
    return threshold, masks


def _logical_index(weight: Tensor) -> Tensor:
    """Where each weight stands in its tensor as torch numbers it: OHWI weights are OIHW to a model."""
    index = torch.arange(weight.numel(), device=weight.device)
    if weight.dim() != 4:
        return index.view(weight.shape)
    o, h, w, i = weight.shape
    return index.view(o, i, h, w).permute(0, 2, 3, 1)


def _spatial(weight: Tensor) -> int:
    """H * W of an OHWI weight."""
    return weight.shape[1] * weight.shape[2] if weight.dim() == 4 else 1


def _refuse(nans: int, kept: int, count: int) -> None:
    if nans:
        raise ValueError(f"{nans} of {kept} kept weights are NaN; they cannot be ranked")
    if not 1 <= count <= kept:
        raise ValueError(f"cannot take the {count} lowest of {kept} kept weights; between 1 and {kept} is possible")


@jit
def count_digits(w, kept, histogram):  # type: ignore[no-untyped-def]
    """Add the first digits (``first_digit``) of the kept of fp32 weights [N] to histogram int32 [2048]."""
    magnitude = w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    digit = tl.where(magnitude > 0x7F800000, 2047, magnitude >> 20)
    counts = tl.histogram(digit, 2048, mask=kept)
    # A block has few different exponents: most bins are empty, and adding them would cost more than the rest.
    tl.atomic_add(histogram + tl.arange(0, 2048), counts, mask=counts > 0, sem="relaxed")


@jit
def _load_block(weights, bits, words, width, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of WORDS mask words: (place, the words, index of each of their weights, |w| as int32, kept), [WORDS, 32] each."""
    place = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)
    per_row = (width + 31) // 32
    row, column = place // per_row, (place % per_row)[:, None] * 32 + bit[None, :]
    index = row[:, None] * width + column
    inside = (place < words)[:, None] & (column < width)
    old = tl.load(bits + place, mask=place < words, other=0)
    magnitude = tl.load(weights + index, mask=inside, other=0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    kept = inside & (((old[:, None] >> bit[None, :]) & 1) != 0)
    return place, old, index, magnitude, kept


@jit
def _key_words(index, width, spatial, number, round, key0, key1):  # type: ignore[no-untyped-def]
    """The key of each weight: two int64 below 2^32 and 2^31."""
    row, i = index // width, index % width
    # memory holds [O, spatial, I]; torch numbers [O, I, spatial]
    logical = ((row // spatial) * width + i) * spatial + row % spatial
    w0, w1, _, _ = philox_words(logical, number, round, key0, key1)
    return w0.to(tl.int64), (w1 >> 1).to(tl.int64)


@jit_but(do_not_specialize=NUMBERS)
def _histogram_kernel(  # type: ignore[no-untyped-def]
    weights, bits, histogram, chosen, words, width, spatial, number, round, key0, key1,
    WORD: tl.constexpr, LOW: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Count digit (WORD, LOW, WIDTH) of the weights whose digits before it are the chosen ones."""
    _, _, index, magnitude, kept = _load_block(weights, bits, words, width, WORDS)
    if WORD == 0:
        value = magnitude.to(tl.int64)
    else:
        w0, w1 = _key_words(index, width, spatial, number, round, key0, key1)
        kept = kept & (magnitude == tl.load(chosen))
        if WORD == 1:
            value = w0
        else:
            kept = kept & (w0 == tl.load(chosen + 1))
            value = w1
    kept = kept & ((value >> (LOW + WIDTH)) == (tl.load(chosen + WORD) >> (LOW + WIDTH)))
    digit = ((value >> LOW) & ((1 << WIDTH) - 1)).to(tl.int32)
    if WORD == 0 and LOW == 20:
        digit = tl.where(magnitude > 0x7F800000, 2047, digit)
    counts = tl.histogram(tl.reshape(digit, (32 * WORDS,)), 1 << WIDTH, mask=tl.reshape(kept, (32 * WORDS,)))
    tl.atomic_add(histogram + tl.arange(0, 1 << WIDTH), counts, mask=counts > 0, sem="relaxed")


@jit_but(do_not_specialize=NUMBERS)
def _remove_kernel(  # type: ignore[no-untyped-def]
    weights, bits, chosen, words, width, spatial, number, round, key0, key1, TIES: tl.constexpr, WORDS: tl.constexpr
):
    """Clear the bits of the weights at or below the chosen (|w|, key); without TIES at or below the chosen |w|."""
    place, old, index, magnitude, kept = _load_block(weights, bits, words, width, WORDS)
    threshold = tl.load(chosen).to(tl.int32)
    gone = magnitude < threshold
    if TIES:
        w0, w1 = _key_words(index, width, spatial, number, round, key0, key1)
        c0, c1 = tl.load(chosen + 1), tl.load(chosen + 2)
        gone = gone | ((magnitude == threshold) & ((w0 < c0) | ((w0 == c0) & (w1 <= c1))))
    else:
        gone = gone | (magnitude == threshold)
    cleared = tl.sum((kept & gone).to(tl.int32) << tl.arange(0, 32)[None, :], axis=1)
    tl.store(bits + place, old & ~cleared, mask=place < words)


def signed(key: Sequence[int]) -> list[int]:
    """Words below 2^32 as int32 of the same bits: one type for Triton, whatever the key."""
    return [word - (word >> 31 << 32) for word in key]


def _launch(
    weights: Sequence[Tensor], bits: Sequence[Tensor], count: int, numbers: Sequence[int], round: int,
    key: Sequence[int], histogram: Tensor | None, remove: bool,
) -> Tensor:  # fmt: skip
    """The k-th smallest |w| as int64 bits, 0-d; with ``remove`` the bits are cleared. Reads back once or twice."""
    device = weights[0].device
    chosen = torch.zeros(3, dtype=torch.int64, device=device)
    rank = torch.full((1,), count, dtype=torch.int64, device=device)
    shapes = [(b.numel(), w.shape[-1], _spatial(w)) for w, b in zip(weights, bits, strict=True)]
    key = signed(key)

    def digit(word: int, low: int, width: int, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose the next digit: the counts of its values, and how many weights have the one chosen, [1]."""
        nonlocal rank
        if counts is None:
            counts = torch.zeros(1 << width, dtype=torch.int32, device=device)
            for w, b, shape, number in zip(weights, bits, shapes, numbers, strict=True):
                _histogram_kernel[(cdiv(b.numel(), _WORDS),)](
                    w, b, counts, chosen, *shape, number, round, *key,
                    WORD=word, LOW=low, WIDTH=width, WORDS=_WORDS, num_warps=4,
                )  # fmt: skip
        upto = counts.cumsum(0)
        place = torch.searchsorted(upto, rank).clamp_max(len(counts) - 1)
        chosen[word : word + 1] += place << low
        here = counts.gather(0, place)  # indexing with a tensor of one element would wait for the device
        rank = rank - (upto.gather(0, place) - here)
        return counts, here

    first, _ = digit(*_DIGITS[0], counts=histogram)
    digit(*_DIGITS[1])
    _, equal = digit(*_DIGITS[2])
    nans, kept, wanted, tied = torch.stack([first[(_INF >> 20) + 1 :].sum(), first.sum(), rank[0], equal[0]]).tolist()
    _refuse(nans, kept, count)
    threshold = chosen[0].clone()
    if not remove:
        return threshold
    if wanted != tied:
        for level in _DIGITS[3:]:
            _, equal = digit(*level)
        if torch.cat([rank, equal]).tolist() != [1, 1]:
            raise RuntimeError("two weights have equal 63-bit keys at the boundary; prune with another seed")
    for w, b, shape, number in zip(weights, bits, shapes, numbers, strict=True):
        _remove_kernel[(cdiv(b.numel(), _WORDS),)](
            w, b, chosen, *shape, number, round, *key, TIES=wanted != tied, WORDS=_WORDS, num_warps=4
        )
    return threshold


def _check(weights: Sequence[Tensor], bits: Sequence[Tensor], numbers: Sequence[int]) -> None:
    if not len(weights) == len(bits) == len(numbers) > 0:
        raise ValueError(f"{len(weights)} weights, {len(bits)} masks, {len(numbers)} numbers: one each, at least one")
    for i, (w, b) in enumerate(zip(weights, bits, strict=True)):
        if w.dtype != torch.float32 or not w.is_contiguous() or w.numel() >= 2**31 or w.numel() == 0:
            raise ValueError(f"weight {i} must be contiguous fp32 of 1 to 2^31 - 1 elements (convolutions as OHWI)")
        if b.dtype != torch.int32 or not b.is_contiguous() or b.shape != words_shape(w.shape):
            raise ValueError(f"mask {i} must be the contiguous int32 words of a mask of shape {tuple(w.shape)}")


@torch.library.custom_op("fastlth::kth_magnitude", mutates_args=())
def kth_magnitude(weights: Sequence[Tensor], bits: Sequence[Tensor], k: int) -> Tensor:
    """The k-th smallest |w| (k from 1) over the kept weights of all tensors, 0-d fp32.

    weights: contiguous fp32 [..., K], convolutions as OHWI; bits: their masks, int32 [..., ceil(K / 32)].
    Raises ValueError if a kept weight is NaN, or there are fewer than k.
    """
    _check(weights, bits, range(len(weights)))
    if on_gpu(weights[0]):
        with torch.cuda.device(weights[0].device), _LAUNCHING:
            found = _launch(weights, bits, k, range(len(weights)), 0, (0, 0), None, remove=False)
    else:
        found = _reference(weights, bits, k, range(len(weights)), 0, (0, 0))[0]
    return found.to(torch.int32).view(torch.float32)


@kth_magnitude.register_fake
def _(weights: Sequence[Tensor], bits: Sequence[Tensor], k: int) -> Tensor:
    return weights[0].new_empty(())


@torch.library.custom_op("fastlth::prune_lowest", mutates_args=("bits",))
def prune_lowest(
    weights: Sequence[Tensor], bits: Sequence[Tensor], count: int, numbers: Sequence[int], round: int,
    key: Sequence[int], histogram: Tensor | None = None,
) -> None:  # fmt: skip
    """Clear exactly ``count`` bits in place: those of the lowest kept |w| over all tensors, ties by the key.

    weights and bits as in ``kth_magnitude``; numbers: the place of each tensor in the model, which goes into the key;
    key: two integers below 2^32; histogram: int32 [2048] of the kept weights' first digits, if ``masked_step`` has
    already made it (saves one pass). Raises ValueError if a kept weight is NaN, or count is not 1 to the number kept.
    """
    _check(weights, bits, numbers)
    if on_gpu(weights[0]):
        with torch.cuda.device(weights[0].device), _LAUNCHING:
            _launch(weights, bits, count, numbers, round, key, histogram, remove=True)
    else:
        masks = _reference(weights, bits, count, numbers, round, key)[1]
        for b, mask in zip(bits, masks, strict=True):
            b.copy_(pack(mask))


@prune_lowest.register_fake
def _(weights: Sequence[Tensor], bits: Sequence[Tensor], count: int, *rest: object, **named: object) -> None:
    return None


def prune_bytes(weights: int, *, ties: bool = False, histogram: bool = False) -> float:
    """Bytes read and written to prune among that many weights: |w| and mask per pass, and the mask written once."""
    passes = (3 if not histogram else 2) + 6 * ties + 1
    return weights * (passes * (4 + 1 / 8) + 1 / 8)


def aot_cases() -> list[AotCase]:
    """The first pass, a pass over the key, and both ways to clear bits."""
    sizes = dict.fromkeys(("words", "width", "spatial", "number", "round", "key0", "key1"), "i32")
    tensors = {"weights": "*fp32", "bits": "*i32", "chosen": "*i64"}
    aligned = ("weights", "bits", "chosen", "width")
    return [
        *(
            AotCase(
                f"kth_magnitude digit {word} {low}", _histogram_kernel, {**tensors, "histogram": "*i32", **sizes},
                {"WORD": word, "LOW": low, "WIDTH": width, "WORDS": _WORDS}, (*aligned, "histogram"),
            )
            for word, low, width in (_DIGITS[0], _DIGITS[2], _DIGITS[8])
        ),
        *(
            AotCase(
                f"prune_lowest {name}", _remove_kernel, {**tensors, **sizes}, {"TIES": ties, "WORDS": _WORDS}, aligned
            )
            for name, ties in (("plain", False), ("ties", True))
        ),
    ]  # fmt: skip
