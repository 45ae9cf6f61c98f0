"""Exactly k weights go: against a full sort in numpy, against torch's own pruning, and without bias among ties."""

import math

import numpy as np
import pytest
import torch
from fastlth_kernels.philox import philox
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import prune as torch_prune

from fastlth.errors import DivergedError
from fastlth.pruning.select import lowest, remove_lowest

KEY = (11, 5)
ROUND = 4
DENORMAL = 1e-42


def tie_key(index: int, tensor: int, round: int = ROUND, key: tuple[int, int] = KEY) -> int:
    """63 random bits of (seed, round, tensor, index)."""
    w0, w1, _, _ = philox(index, tensor, round, 0, key)
    return w0 << 31 | w1 >> 1


def by_full_sort(
    scores: dict[str, Tensor], masks: dict[str, Tensor], names: list[str], count: int, numbers: dict[str, int]
) -> dict[str, list[bool]]:
    """The definition: sort all kept weights by (score, random key), remove the first ``count``."""
    value, key, name, place = [], [], [], []
    for n in names:
        flat = scores[n].flatten().tolist()
        for i in np.flatnonzero(masks[n].flatten().numpy()):
            value.append(flat[i])
            key.append(tie_key(int(i), numbers[n]))
            name.append(n)
            place.append(i)
    order = np.lexsort((np.array(key, np.uint64), np.array(value, np.float64)))
    new = {n: masks[n].flatten().tolist() for n in names}
    for j in order[:count]:
        new[name[j]][place[j]] = False
    return new


def check(scores: dict[str, Tensor], masks: dict[str, Tensor], count: int, numbers: dict[str, int]) -> None:
    names = list(scores)
    before = {n: m.clone() for n, m in masks.items()}
    new = remove_lowest(scores, masks, names, count, numbers=numbers, round=ROUND, key=KEY)
    expected = by_full_sort(scores, masks, names, count, numbers)
    assert {n: m.flatten().tolist() for n, m in new.items()} == expected
    assert all(new[n].shape == masks[n].shape for n in names)
    assert all(torch.equal(masks[n], before[n]) for n in names)  # what was given is left as it is
    assert sum(int((masks[n] & ~new[n]).sum()) for n in names) == count
    assert not any(bool((new[n] & ~masks[n]).any()) for n in names)


def one(values: list[float], count: int) -> None:
    scores = {"a.weight": torch.tensor(values, dtype=torch.float32)}
    check(scores, {"a.weight": torch.ones(len(values), dtype=torch.bool)}, count, {"a.weight": 2})


AWKWARD = {
    "distinct": [3.0, 1.0, 2.0, 5.0, 4.0, 0.5],
    "all equal": [0.25] * 12,
    "all zero": [0.0] * 12,
    "two values": [1.0, 0.0] * 6,
    "signed zeros": [0.0, -0.0, -0.0, 0.0, 1.0, -0.0, 0.0, -1.0],
    "denormals": [DENORMAL, 2 * DENORMAL, 0.0, DENORMAL, 1e-45, -DENORMAL, 1.2e-38, 0.0],
    "infinities": [math.inf, -math.inf, 1.0, math.inf, -math.inf, 0.0],
    "negative": [-1.0, -3.0, -2.0, -2.0, 0.0, 2.0],
}


@pytest.mark.parametrize("values", AWKWARD.values(), ids=AWKWARD.keys())
def test_any_count_of_awkward_scores_agrees_with_a_full_sort(values):
    for count in range(len(values) + 1):  # 0 and all included
        one(values, count)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_several_tensors_ranked_together_agree_with_a_full_sort(data):
    values = st.sampled_from([0.0, -0.0, 0.5, 1.0, DENORMAL, math.inf, 2.0])
    sizes = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=3))
    scores, masks = {}, {}
    for i, size in enumerate(sizes):
        scores[f"{i}.weight"] = torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size)))
        kept = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
        masks[f"{i}.weight"] = torch.tensor(kept, dtype=torch.bool)
    total = sum(int(m.sum()) for m in masks.values())
    numbers = {n: 10 * i + 1 for i, n in enumerate(scores)}
    check(scores, masks, data.draw(st.integers(0, total)), numbers)


def test_a_tensor_in_another_memory_order_is_pruned_at_the_same_places():
    scores = torch.randint(0, 3, (4, 3, 2, 2), generator=torch.Generator().manual_seed(0)).float()
    mask = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(1)) > 0.3
    arguments = {"numbers": {"a": 0}, "round": 1, "key": KEY}
    plain = remove_lowest({"a": scores}, {"a": mask}, ["a"], 12, **arguments)["a"]
    for s, m in [
        (scores.contiguous(memory_format=torch.channels_last), mask),
        (scores, mask.contiguous(memory_format=torch.channels_last)),
    ]:
        assert torch.equal(remove_lowest({"a": s}, {"a": m}, ["a"], 12, **arguments)["a"], plain)


def test_a_nan_among_the_kept_weights_is_refused():
    scores = {"a.weight": torch.tensor([1.0, math.nan, 2.0])}
    mask = torch.ones(3, dtype=torch.bool)
    for count in (0, 1):
        with pytest.raises(DivergedError, match=r"weights of a\.weight are NaN.*lower --lr") as caught:
            remove_lowest(scores, {"a.weight": mask}, ["a.weight"], count, numbers={"a.weight": 0}, round=1, key=KEY)
        assert caught.value.exit_code == 5


def test_a_nan_at_a_pruned_place_is_not_looked_at():
    scores = {"a.weight": torch.tensor([1.0, math.nan, 2.0])}
    mask = {"a.weight": torch.tensor([True, False, True])}
    new = remove_lowest(scores, mask, ["a.weight"], 1, numbers={"a.weight": 0}, round=1, key=KEY)
    assert new["a.weight"].tolist() == [False, False, True]


def test_a_pruned_place_never_counts_even_where_its_score_is_the_lowest():
    scores = {"a": torch.tensor([0.0, 3.0, 1.0, 0.0, 2.0])}
    new = remove_lowest(
        scores, {"a": torch.tensor([False, True, True, False, True])}, ["a"], 2, numbers={"a": 0}, round=1, key=KEY
    )
    assert new["a"].tolist() == [False, True, False, False, False]


def test_flushed_denormals_do_not_change_the_count():
    """A processor that treats denormals as zero sees ties there; the count stays exact, and larger scores stay."""
    scores = torch.cat([torch.full((50,), DENORMAL), torch.full((50,), 3 * DENORMAL), torch.ones(20)])
    assert torch.set_flush_denormal(True)
    try:
        new = remove_lowest({"a": scores}, {"a": torch.ones(120, dtype=torch.bool)}, ["a"], 70,
                            numbers={"a": 0}, round=1, key=KEY)["a"]  # fmt: skip
    finally:
        torch.set_flush_denormal(False)
    assert int((~new).sum()) == 70
    assert new[100:].all()


# ---- torch's own pruning chooses the same weights where there are no ties -----------------------------------------


def distinct(*shape: int, seed: int) -> Tensor:
    """Weights of both signs, all of different size."""
    size = math.prod(shape)
    generator = torch.Generator().manual_seed(seed)
    sizes = (torch.randperm(size, generator=generator) + 1) / size
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return (sizes * signs).view(shape)


def test_one_tensor_loses_the_weights_that_l1_unstructured_removes():
    layer = torch.nn.Linear(40, 30)
    layer.weight.data = distinct(30, 40, seed=0)
    ours = {"w": torch.ones(30, 40, dtype=torch.bool)}
    for count in (1, 240, 500, 400):  # torch stacks one pruning on another
        torch_prune.l1_unstructured(layer, "weight", amount=count)
        ours = remove_lowest(
            {"w": layer.weight_orig.detach().abs()}, ours, ["w"], count, numbers={"w": 0}, round=1, key=KEY
        )
        assert torch.equal(ours["w"], layer.weight_mask.bool())
    assert int(ours["w"].sum()) == 1200 - 1141


def test_several_tensors_lose_the_weights_that_global_unstructured_removes():
    layers = {"conv": torch.nn.Conv2d(4, 8, 3), "fc": torch.nn.Linear(32, 20), "output": torch.nn.Linear(20, 5)}
    values = distinct(4 * 8 * 9 + 32 * 20 + 20 * 5, seed=1).split([288, 640, 100])
    for layer, part in zip(layers.values(), values, strict=True):
        layer.weight.data = part.view(layer.weight.shape)
    scores = {n: m.weight.detach().abs().clone() for n, m in layers.items()}
    ours = {n: torch.ones_like(s, dtype=torch.bool) for n, s in scores.items()}
    for count in (205, 164, 300):
        torch_prune.global_unstructured(
            [(m, "weight") for m in layers.values()], pruning_method=torch_prune.L1Unstructured, amount=count
        )
        ours = remove_lowest(scores, ours, list(layers), count, numbers={"conv": 0, "fc": 1, "output": 2},
                             round=1, key=KEY)  # fmt: skip
        assert all(torch.equal(ours[n], m.weight_mask.bool()) for n, m in layers.items())


# ---- ties ---------------------------------------------------------------------------------------------------------


def ties(round: int = 1, key: tuple[int, int] = KEY, tensor: int = 0, size: int = 400) -> Tensor:
    """Which of equal scores are removed when half of them go."""
    index = torch.arange(size)
    return lowest(torch.zeros(size), size // 2, index, torch.full_like(index, tensor), round, key)


def test_ties_go_in_the_order_of_their_keys():
    order = sorted(range(400), key=lambda i: tie_key(i, 0, round=1))
    assert set(ties().nonzero().flatten().tolist()) == set(order[:200])


@pytest.mark.parametrize("other", [{"round": 2}, {"key": (12, 5)}, {"key": (11, 4)}, {"tensor": 1}])
def test_ties_are_broken_anew_for_every_seed_round_and_tensor(other):
    """Two independent halves of 400 share 100 on average, standard deviation 5."""
    shared = int((ties() & ties(**other)).sum())
    assert 75 <= shared <= 125


def test_ties_are_broken_without_bias():
    """600 draws of 20 out of 40 equal weights: 300 each, standard deviation 12.2; the first half and even places too.

    Index order would remove the first twenty every time.
    """
    counts = np.zeros(40)
    for round in range(600):
        counts += ties(round=round, size=40).numpy()
    assert counts.sum() == 600 * 20
    assert np.abs(counts - 300).max() < 5 * 12.3
    assert abs(counts[:20].sum() - 6_000) < 5 * 39.2  # sums of 20 of the 40, hypergeometric
    assert abs(counts[::2].sum() - 6_000) < 5 * 39.2


def test_no_row_of_equal_weights_is_pruned_whole():
    """100 rows of 100: half of each on average, standard deviation 5."""
    removed = ties(size=10_000).view(100, 100).sum(1)
    assert 25 <= int(removed.min())
    assert int(removed.max()) <= 75


def test_ties_do_not_move_weights_that_differ():
    """Scores below the tied ones always go, those above never do, whatever the key says."""
    scores = torch.tensor([1.0] * 30 + [0.5] * 10 + [2.0] * 10)
    index = torch.arange(50)
    removed = lowest(scores, 25, index, torch.zeros_like(index), 1, KEY)
    assert removed[30:40].all()
    assert not removed[40:].any()
    assert int(removed[:30].sum()) == 15
