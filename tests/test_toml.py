"""TOML out, read back by the standard library: every string, number and nesting survives."""

import math
import tomllib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastlth import toml

NASTY = [
    "", " ", '"', "'", "\\", "\\u0041", "\n", "\r\n", "\t", "\b\f", "\x00", "\x1b", "\x7f", "\x80\x9f", "\u2028\u2029",
    "\ufeff", "\uffff", "é", "日本", "🎟", '"""', "'''", "a = 1", "[section]", "# no comment", "conv*", "a.b", "-",
]  # fmt: skip

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(NASTY)
number = st.integers() | st.floats(allow_nan=False)
scalar = text | number | st.booleans()
flat = scalar | st.lists(scalar, max_size=4) | st.dictionaries(text, scalar, max_size=4)
value = flat | st.lists(st.lists(number, max_size=3), max_size=3) | st.dictionaries(text, flat, max_size=3)


def exactly(x: object) -> object:
    """Something that tells 1 from 1.0 and True, and 0.0 from -0.0."""
    if isinstance(x, dict):
        return [(k, exactly(v)) for k, v in x.items()]  # order too: the first pattern of prune.scale wins
    if isinstance(x, list | tuple):
        return [exactly(v) for v in x]
    return (type(x), x, math.copysign(1, x) if isinstance(x, float) else None)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(text, st.dictionaries(text, value, max_size=4), max_size=4))
@example({"a": {n: n for n in NASTY}} | {n: {} for n in NASTY})
def test_whatever_is_written_is_read_back(tables):
    read = tomllib.loads(toml.dumps(tables).encode().decode())
    assert exactly(read) == exactly(tables)


@pytest.mark.parametrize("string", NASTY)
def test_nasty_strings_are_safe_as_section_key_pattern_and_value(string):
    tables = {string: {string: string, "list": [string, string], "table": {string: string}}}
    assert tomllib.loads(toml.dumps(tables)) == tables


@pytest.mark.parametrize("number", [1e16, 1e-5, 1e300, 5e-324, 0.1 + 0.2, 1.2e-3, -0.0, math.inf, -math.inf, 2**64])
def test_numbers_keep_every_bit(number):
    read = tomllib.loads(toml.dumps({"a": {"b": number}}))["a"]["b"]
    assert exactly(read) == exactly(number)


def test_not_a_number_stays_one():
    assert math.isnan(tomllib.loads(toml.dumps({"a": {"b": math.nan}}))["a"]["b"])


def test_the_text_looks_as_a_person_would_write_it():
    tables = {
        "train": {"lr": 0.0012, "iterations": 50_000, "drop_last": True, "optimizer": "adam", "betas": (0.9, 0.999)},
        "prune": {"scale": {"conv*": 0.5, "output": 0.5}, "none": []},
    }
    assert toml.dumps(tables) == (
        "[train]\nlr = 0.0012\niterations = 50000\ndrop_last = true\noptimizer = \"adam\"\nbetas = [0.9, 0.999]\n\n"
        "[prune]\nscale = {\"conv*\" = 0.5, output = 0.5}\nnone = []\n"
    )  # fmt: skip
