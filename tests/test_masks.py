"""The few functions on masks."""

import pytest
import torch

from fastlth import masks as mask_tools


def masks(*rows: str) -> dict[str, torch.Tensor]:
    """{"0": ..., "1": ...} from strings of 1 (kept) and 0."""
    return {str(i): torch.tensor([c == "1" for c in row]) for i, row in enumerate(rows)}


def test_full_masks_keep_everything():
    weights = {"a": torch.zeros(2, 3), "b": torch.full((4,), torch.nan)}
    made = mask_tools.full(weights)
    assert {n: m.tolist() for n, m in made.items()} == {"a": [[True] * 3] * 2, "b": [True] * 4}
    assert mask_tools.kept(made) == 10


def test_kept_counts_over_all_masks():
    assert mask_tools.kept(masks("1010", "0000", "11")) == 4
    assert mask_tools.kept({}) == 0


def test_kept_does_not_wrap_at_256():
    assert mask_tools.kept({"a": torch.ones(1000, dtype=torch.bool)}) == 1000


@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [
        (("1100", "10"), ("1110", "11"), True),
        (("1100", "10"), ("1100", "10"), True),  # equal masks are nested
        (("0000", "00"), ("1100", "10"), True),
        (("1001", "10"), ("1110", "11"), False),  # came back in the first
        (("1100", "11"), ("1110", "10"), False),  # came back in the last
        (("1100",), ("1110", "11"), False),  # not the same tensors
    ],
)
def test_nested_means_that_nothing_removed_is_kept(inner, outer, expected):
    assert mask_tools.nested(masks(*inner), masks(*outer)) is expected


def test_nested_compares_tensors_of_the_same_name():
    assert not mask_tools.nested({"a": torch.tensor([True])}, {"b": torch.tensor([True])})


def test_copying_keeps_the_tensors_of_the_target():
    target, source = masks("1111", "11"), masks("1010", "01")
    tensors = {n: m.data_ptr() for n, m in target.items()}
    before = {n: id(m) for n, m in target.items()}
    mask_tools.copy_(target, source)
    assert {n: m.tolist() for n, m in target.items()} == {n: m.tolist() for n, m in source.items()}
    assert {n: m.data_ptr() for n, m in target.items()} == tensors
    assert {n: id(m) for n, m in target.items()} == before
    source["0"][0] = False  # a copy, not a view
    assert target["0"][0]


def test_copying_takes_only_what_the_target_has():
    target = masks("11")
    mask_tools.copy_(target, masks("01", "11"))
    assert list(target) == ["0"]
    assert target["0"].tolist() == [False, True]
