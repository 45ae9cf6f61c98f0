"""How many weights each layer keeps in one step: exact totals, caps, and the shares that the papers define."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlth.errors import RecipeError
from fastlth.pruning import budget, layer_rates, prune
from fastlth.recipe import PruneSection, exact

LENET = {"fc1.weight": (300, 784), "fc2.weight": (100, 300), "output.weight": (10, 100)}
HALF_OUTPUT = PruneSection(rate=0.2, scale={"output": 0.5})
WEIGHTS = 266_200
NUMBERS = {n: i for i, n in enumerate(LENET)}


def kept_after_one_round(section: PruneSection, rate: float) -> dict[str, int]:
    """By prune() itself, on weights without ties."""
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s, generator=generator) for n, s in LENET.items()}
    prunable = layer_rates(weights, section)
    one_step = PruneSection(rate=rate, scale=section.scale, scope=section.scope)
    masks = {n: torch.ones(LENET[n], dtype=torch.bool) for n in prunable}
    new = prune(one_step, masks, weights, weights, numbers=NUMBERS, round=1, key=(0, 5))
    return {n: int(m.sum()) for n, m in new.items()}


SECTIONS = {
    "layer": HALF_OUTPUT,
    "global": PruneSection(rate=0.2, scope="global"),
    "global, output kept": PruneSection(rate=0.2, scope="global", scale={"output": 0.0}),
    "three rates": PruneSection(rate=0.2, scale={"fc1": 1.25, "fc2": 0.7, "output": 0.5}),
}


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("density", [0.9, 0.5, 0.375, 0.1, 0.0517, 0.02])
def test_one_step_ends_at_or_just_below_the_density(name, density):
    section = SECTIONS[name]
    if name == "three rates" and density < 0.06:
        with pytest.raises(RecipeError, match="cannot be reached in one step"):
            budget.one_shot_rate(LENET, section, density)
        return
    rate = budget.one_shot_rate(LENET, section, density)
    kept = kept_after_one_round(section, rate)
    total = sum(kept.values()) + (1000 if len(kept) == 2 else 0)
    assert total <= math.floor(exact(density) * WEIGHTS) < total + len(LENET)
    if section.scope == "layer":
        assert budget.of_density("layer", LENET, section, density) == [([n], count) for n, count in kept.items()]


@pytest.mark.parametrize("name", ["global", "global, output kept"])
@pytest.mark.parametrize("density", [0.9, 0.5, 0.2, 0.0517])
def test_layer_wise_pruning_to_a_density_does_not_look_at_the_searchs_scope(name, density):
    """With equal rates every layer keeps the same share, up to what does not come out whole."""
    section, whole = SECTIONS[name], 1000 if "kept" in name else 0
    shares = budget.of_density("layer", LENET, section, density)
    sizes = {n: math.prod(LENET[n]) for n in LENET if not (whole and n == "output.weight")}
    assert [names for names, _ in shares] == [[n] for n in sizes]
    room = math.floor(exact(density) * WEIGHTS) - whole
    assert room - len(LENET) < sum(count for _, count in shares) <= room
    for ([layer], count), size in zip(shares, sizes.values(), strict=True):
        assert abs(count - size * room / sum(sizes.values())) <= 1, layer


def test_the_smallest_such_rate_is_taken():
    rate = budget.one_shot_rate(LENET, HALF_OUTPUT, 0.1)
    less = sum(kept_after_one_round(HALF_OUTPUT, rate - 1e-5).values())
    assert less > 26_620 >= sum(kept_after_one_round(HALF_OUTPUT, rate).values())


@pytest.mark.parametrize("name", ["global", "global, output kept"])
def test_a_count_as_a_fraction_is_met_to_the_weight(name):
    """As a float, kept / all is often the decimal below, which lets one weight more go."""
    section, below = SECTIONS[name], 0
    for kept in range(1_500, WEIGHTS, 26_041):
        rate = budget.one_shot_rate(LENET, section, Fraction(kept, WEIGHTS))
        whole = sum(math.prod(s) for s in LENET.values()) - sum(
            math.prod(LENET[n]) for n in layer_rates(LENET, section)
        )
        assert whole + sum(kept_after_one_round(section, rate).values()) == kept
        below += math.floor(exact(kept / WEIGHTS) * WEIGHTS) < kept
    assert below > 0  # so that this test can fail


@pytest.mark.parametrize(
    ("label", "rate"), [(87.5, 1), (75.0, 2), (62.6, 3), (50.1, 4), (37.6, 5), (25.1, 6), (12.7, 7)]
)
def test_the_papers_one_shot_densities_come_from_whole_eighths(label, rate):
    """Figure 4c: hidden layers lose p = 1/8, 2/8, ..., the output layer half of it."""
    kept = sum(kept_after_one_round(HALF_OUTPUT, rate / 8).values())
    assert 100 * kept / WEIGHTS == pytest.approx(label, abs=0.1)
    assert budget.one_shot_rate(LENET, HALF_OUTPUT, kept / WEIGHTS) == pytest.approx(rate / 8, abs=1e-4)


def test_densities_out_of_reach_are_refused_whatever_their_rates_round_to():
    """LeNets of many widths whose output layer loses half as much: their rates would be above 1, as floats too."""
    section = PruneSection(rate=0.2, scale={"output": 0.5})
    for width in range(20, 200, 20):
        shapes = {"fc1.weight": (width, 64), "fc2.weight": (width, width), "output.weight": (10, width)}
        most = sum(a * b for a, b in shapes.values())
        for left in (5 * width - 1, 4 * width, width):  # half of the output layer stays whatever the rate
            with pytest.raises(RecipeError, match="cannot be reached in one step"):
                budget.one_shot_rate(shapes, section, left / most)


def test_factors_below_1_alone_leave_some_densities_out_of_reach():
    section = PruneSection(rate=0.2, scale={"*": 0.5})
    with pytest.raises(RecipeError, match=r"density 0\.1 cannot be reached in one step: .*have to be 1\.8, and must"):
        budget.one_shot_rate(LENET, section, 0.1)
    assert budget.one_shot_rate(LENET, section, 0.6) == pytest.approx(0.8, abs=1e-4)
    kept = sum(count for _, count in budget.of_density("layer", LENET, section, 0.1))  # drawn, by no rate
    assert kept == pytest.approx(WEIGHTS / 10, abs=3)


@pytest.mark.parametrize("density", [0.0, 1.0, -1.0, float("nan"), 1.5])
def test_densities_that_are_none_are_refused(density):
    with pytest.raises(RecipeError, match="must be below 1"):
        budget.one_shot_rate(LENET, HALF_OUTPUT, density)


def test_a_density_that_needs_unpruned_layers_is_refused_with_the_least():
    section = SECTIONS["global, output kept"]
    with pytest.raises(RecipeError, match=r"at least 0\.00376"):
        budget.one_shot_rate(LENET, section, 0.003)


def test_even_and_global_and_layer():
    assert budget.of_total("global", LENET, 1234) == [(list(LENET), 1234)]
    counts = [c for _, c in budget.of_total("even", LENET, 26_620)]
    assert counts == [23_520, 3_000, 100]
    masks = {n: torch.arange(math.prod(s)).view(s) % 3 == 0 for n, s in LENET.items()}
    assert budget.of_masks(masks) == [(["fc1.weight"], 78_400), (["fc2.weight"], 10_000), (["output.weight"], 334)]
    assert budget.of_masks(masks, "global") == [(list(LENET), 88_734)]


def erk_by_bisection(shapes, total):
    """Evci et al.: density min(1, eps (sum of the shape) / (product of the shape)), eps found numerically."""
    low, high = 0.0, 1e9
    for _ in range(200):
        eps = (low + high) / 2
        kept = {n: min(math.prod(s), eps * sum(s)) for n, s in shapes.items()}
        low, high = (eps, high) if sum(kept.values()) < total else (low, eps)
    return kept


@pytest.mark.parametrize("total", [1, 2, 1_000, 5_000, 40_000, 200_000, 266_199, 266_200])
def test_erk_is_what_its_authors_define(total):
    shapes = {**LENET, "conv.weight": (64, 3, 3, 3)}
    counts = {names[0]: c for names, c in budget.of_total("erk", shapes, total)}
    assert sum(counts.values()) == total
    for name, expected in erk_by_bisection(shapes, total).items():
        assert abs(counts[name] - expected) < 1 + 1e-6
        assert 0 <= counts[name] <= math.prod(shapes[name])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=6), st.data())
def test_shares_add_up_whatever_the_layers(shapes, data):
    named = {f"l{i}": s for i, s in enumerate(shapes)}
    total = data.draw(st.integers(1, sum(math.prod(s) for s in shapes)))
    for strategy in ("even", "erk"):
        counts = {names[0]: c for names, c in budget.of_total(strategy, named, total)}
        assert sum(counts.values()) == total and list(counts) == list(named)
        assert all(0 <= counts[n] <= math.prod(named[n]) for n in named)
    exact_even = {n: Fraction(total * math.prod(s), sum(map(math.prod, shapes))) for n, s in named.items()}
    even = {names[0]: c for names, c in budget.of_total("even", named, total)}
    assert all(abs(even[n] - exact_even[n]) < 1 for n in named)


def test_a_strategy_that_does_not_exist_and_a_total_that_is_not_there():
    with pytest.raises(RecipeError, match="did you mean 'even'"):
        budget.of_total("evn", LENET, 5)
    for total in (0, WEIGHTS + 1):
        with pytest.raises(RecipeError, match="choose another density"):
            budget.of_total("even", LENET, total)


def test_the_highest_scores_stay_and_ties_are_random():
    scores = {"a": torch.tensor([[0.0, -0.0, 3.0], [0.0, 0.0, 1.0]]), "b": torch.tensor([2.0])}
    numbers = {"a": 0, "b": 1}
    both = budget.keep_highest(scores, [(["a", "b"], 2)], numbers=numbers, round=1, key=(0, 5))
    assert both["a"].tolist() == [[False, False, True], [False] * 3] and both["b"].tolist() == [True]
    seen = set()
    for seed in range(40):
        masks = budget.keep_highest(scores, [(["a"], 3), (["b"], 0)], numbers=numbers, round=1, key=(seed, 5))
        assert int(masks["a"].sum()) == 3 and masks["a"][0, 2] and masks["a"][1, 2] and not masks["b"].any()
        seen.add(tuple(masks["a"].flatten().tolist()))
    assert len(seen) == 4  # each of the four zeros, -0.0 included, is chosen by some seed


def test_random_masks_are_uniform_and_seeded():
    shapes = {"a": (50, 40), "b": (30, 10)}
    drawn = [
        budget.random_masks(shapes, [(["a", "b"], 575)], numbers={"a": 0, "b": 1}, round=1, key=(seed, 7))
        for seed in range(60)
    ]
    assert all(sum(int(m.sum()) for m in masks.values()) == 575 for masks in drawn)
    share = torch.stack([m["a"].double() for m in drawn]).mean(0)
    assert abs(float(share.mean()) - 0.25) < 0.01
    assert float(share.mean(0).std()) < 0.02  # over columns and rows alike: no structure
    assert float(share.mean(1).std()) < 0.02
    again = budget.random_masks(shapes, [(["a", "b"], 575)], numbers={"a": 0, "b": 1}, round=1, key=(0, 7))
    assert torch.equal(again["a"], drawn[0]["a"]) and not torch.equal(again["a"], drawn[1]["a"])
