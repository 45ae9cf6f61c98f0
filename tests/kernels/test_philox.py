"""Philox4x32-10: the published test vectors, equal bits in every container, and streams that can be cut anywhere."""

import numpy as np
import pytest
import torch
from fastlth_kernels.philox import philox, words
from hypothesis import given, settings
from hypothesis import strategies as st

# Random123's known-answer file, `philox4x32 10`: counter, key, output.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
KEY = (7, 3)

word = st.integers(0, 2**32 - 1)


def parse(text: str) -> list[int]:
    return [int(part, 16) for part in text.split()]


def as_int(value: int) -> int:
    return value


def as_numpy(value: int) -> np.ndarray:
    return np.array([value], dtype=np.uint64)


def as_torch(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64)


@pytest.mark.parametrize("kind", [as_int, as_numpy, as_torch])
@pytest.mark.parametrize(("counter", "key", "output"), KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, output, kind):
    k0, k1 = parse(key)
    drawn = philox(*map(kind, parse(counter)), (k0, k1))
    assert [w if kind is as_int else w.item() for w in drawn] == parse(output)


@settings(deadline=None)
@given(st.lists(st.tuples(word, word, word, word), min_size=1, max_size=8), word, word)
def test_integers_numpy_and_torch_give_equal_bits(counters, k0, k1):
    expected = [philox(*c, (k0, k1)) for c in counters]
    columns = list(zip(*counters, strict=True))
    of_numpy = philox(*(np.array(c, dtype=np.uint64) for c in columns), (k0, k1))
    of_torch = philox(*(torch.tensor(c, dtype=torch.int64) for c in columns), (k0, k1))
    assert {w.dtype for w in of_numpy} == {np.dtype(np.uint64)}
    assert {w.dtype for w in of_torch} == {torch.int64}
    assert list(zip(*(w.tolist() for w in of_numpy), strict=True)) == expected
    assert list(zip(*(w.tolist() for w in of_torch), strict=True)) == expected


def test_counters_broadcast():
    rows = np.arange(3, dtype=np.uint64)[:, None]
    columns = np.arange(2**32 - 2, 2**32, dtype=np.uint64)[None]
    drawn = philox(rows, columns, np.zeros_like(rows), 5, KEY)
    for i in range(3):
        for j in range(2):
            assert tuple(int(w[i, j]) for w in drawn) == philox(i, 2**32 - 2 + j, 0, 5, KEY)


def word_of(i: int, key: tuple[int, int], c2: int, c3: int) -> int:
    """The definition of a stream, one word at a time."""
    return philox(i // 4 % 2**32, i // 4 >> 32, c2, c3, key)[i % 4]


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 4_095, 2**34 - 6])  # the last one carries into the second counter
@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_words_are_the_outputs_in_a_row(start, count):
    drawn = words(start, count, KEY, c2=9, c3=4)
    assert drawn.dtype == np.uint32
    assert drawn.tolist() == [word_of(i, KEY, 9, 4) for i in range(start, start + count)]


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(0, 100))
def test_any_piece_of_a_stream_can_be_drawn_alone(start, count):
    assert words(start, count, KEY, c2=1).tolist() == words(0, 300, KEY, c2=1)[start : start + count].tolist()


def test_every_part_of_the_address_makes_another_stream():
    """1,024 words of five streams: two that shared a counter would have thousands of equal words, chance gives none."""
    streams = [
        words(0, 1024, KEY), words(0, 1024, (8, 3)), words(0, 1024, (7, 4)),
        words(0, 1024, KEY, c2=1), words(0, 1024, KEY, c3=1),
    ]  # fmt: skip
    assert len(np.unique(np.concatenate(streams))) > 5 * 1024 - 5


def test_every_bit_is_set_half_of_the_time():
    """32 bits over 65,536 words, 5 standard deviations (128 each) around one half."""
    drawn = words(0, 1 << 16, KEY)
    counts = [int((drawn >> np.uint32(bit) & np.uint32(1)).sum()) for bit in range(32)]
    assert all(abs(c - (1 << 15)) < 5 * 128 for c in counts), counts
