"""How many weights go: exact floors on decimals as written, and the papers' densities round by round."""

from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlth.composition import compose
from fastlth.errors import RecipeError
from fastlth.models import skeleton, weight_names
from fastlth.pruning import layer_rates
from fastlth.pruning.scope import groups
from fastlth.recipe import PruneSection

LAYERS = ["conv1.weight", "conv2.weight", "fc1.weight", "output.weight"]


def removed(rate: float, kept: int, factor: float = 1.0) -> int:
    rates = layer_rates(["fc1.weight"], PruneSection(rate=rate, scale={"fc1": factor}))
    [(names, count)] = groups(rates, {"fc1.weight": kept}, "layer")
    assert names == ["fc1.weight"]
    return count


@pytest.mark.parametrize("hundredths", range(1, 100))
def test_counts_are_exact_floors_of_the_decimal(hundredths):
    rate = hundredths / 100
    for kept in (*range(200), 1_000, 99_999, 20_018_880):
        assert removed(rate, kept) == hundredths * kept // 100


def test_binary_floats_would_get_some_of_these_counts_wrong():
    """The test above has teeth: the obvious code fails it."""
    wrong = sum(int(h / 100 * n) != h * n // 100 for h in range(1, 100) for n in range(200))
    assert wrong >= 5
    assert int(0.29 * 100) == 28
    assert removed(0.29, 100) == 29


def test_a_factor_multiplies_the_decimals_not_the_floats():
    """0.1 * 0.7 is 0.06999999999999999 as floats; 700 of 10,000 weights must go."""
    assert int(0.1 * 0.7 * 10_000) == 699
    assert removed(0.1, 10_000, factor=0.7) == 700


@settings(deadline=None)
@given(st.decimals("0.0001", "0.9999", places=4), st.integers(0, 30_000_000))
def test_counts_agree_with_decimal_arithmetic(rate, kept):
    assert removed(float(rate), kept) == int(rate * Decimal(kept))


def test_rates_are_written_in_shortest_form_or_in_exponents():
    assert layer_rates(["a.weight"], PruneSection(rate=1e-5)) == {"a.weight": Fraction(1, 100_000)}


def test_the_first_pattern_that_matches_wins():
    prune = PruneSection(rate=0.2, scale={"conv2": 0.25, "conv*": 0.5, "*": 2.0})
    assert layer_rates(LAYERS, prune) == {
        "conv1.weight": Fraction(1, 10), "conv2.weight": Fraction(1, 20),
        "fc1.weight": Fraction(2, 5), "output.weight": Fraction(2, 5),
    }  # fmt: skip


def test_a_layer_no_pattern_names_has_the_whole_rate_and_factor_zero_leaves_a_layer_out():
    prune = PruneSection(rate=0.2, scale={"output": 0.0, "conv*": 0.5})
    assert layer_rates(LAYERS, prune) == {
        "conv1.weight": Fraction(1, 10), "conv2.weight": Fraction(1, 10), "fc1.weight": Fraction(1, 5),
    }  # fmt: skip


def test_patterns_see_layer_names_with_dots_and_upper_case():
    names = ["block1.conv.weight", "block2.conv.weight", "Output.weight"]
    prune = PruneSection(rate=0.4, scale={"block1.*": 0.5, "O*": 0.25})
    assert list(layer_rates(names, prune).values()) == [Fraction(1, 5), Fraction(2, 5), Fraction(1, 10)]
    with pytest.raises(RecipeError, match="'output' matches no layer"):
        layer_rates(names, PruneSection(scale={"output": 0.5}))


def test_a_pattern_that_matches_nothing_lists_the_layers():
    with pytest.raises(RecipeError) as caught:
        layer_rates(LAYERS, PruneSection(scale={"conv*": 0.5, "conv3": 0.5}))
    assert str(caught.value) == "prune.scale pattern 'conv3' matches no layer; there are: conv1, conv2, fc1, output"


def test_nothing_left_to_prune_is_refused():
    with pytest.raises(RecipeError, match="leaves no layer to prune; give at least one layer a factor above 0"):
        layer_rates(LAYERS, PruneSection(scale={"*": 0.0}))


def test_global_scope_refuses_unequal_rates():
    with pytest.raises(RecipeError, match=r"needs one rate; make all factors .* 1 or 0, or use scope layer"):
        layer_rates(LAYERS, PruneSection(scope="global", scale={"output": 0.5}))


def test_global_scope_takes_equal_factors_that_are_not_one():
    rates = layer_rates(LAYERS, PruneSection(scope="global", scale={"output": 0.0, "*": 0.5}))
    assert rates == {n: Fraction(1, 10) for n in LAYERS[:3]}


def test_layer_scope_floors_each_layer_and_global_scope_the_sum():
    prune = PruneSection(rate=0.2)
    rates = layer_rates(LAYERS[:2], prune)
    kept = {"conv1.weight": 8, "conv2.weight": 13}
    assert groups(rates, kept, "layer") == [(["conv1.weight"], 1), (["conv2.weight"], 2)]
    assert groups(rates, kept, "global") == [(["conv1.weight", "conv2.weight"], 4)]


# ---- P_m: densities in percent per round. Frankle & Carbin's labels; the decimals are exact arithmetic on the nets.

P_M = {
    "lenet-300-100 mnist": {
        1: 80.04, 2: 64.06, 3: 51.28, 4: 41.05, 5: 32.87, 6: 26.32, 7: 21.07, 8: 16.88, 9: 13.52, 10: 10.83, 11: 8.68,
        12: 6.95, 13: 5.57, 14: 4.47, 15: 3.58, 16: 2.87, 18: 1.85, 20: 1.19, 24: 0.50,
    },
    "conv-2 cifar-10": {3: 51.41, 6: 26.47, 9: 13.66, 11: 8.81, 12: 7.08, 14: 4.57, 16: 2.97, 18: 1.93, 21: 1.02},
    "conv-4 cifar-10": {3: 53.55, 6: 29.13, 9: 16.16, 11: 11.06, 12: 9.18, 15: 5.37, 18: 3.23, 21: 2.01, 24: 1.28},
    "conv-6 cifar-10": {
        3: 56.39, 6: 32.07, 7: 26.61, 9: 18.38, 10: 15.29, 12: 10.62, 15: 6.18, 18: 3.62, 21: 2.13, 24: 1.27,
    },
    "vgg19 cifar-10": {
        4: 40.98, 8: 16.80, 12: 6.90, 15: 3.54, 16: 2.84, 19: 1.47, 20: 1.18, 24: 0.50, 28: 0.22, 32: 0.10,
    },
}  # fmt: skip
CONV_6_LABELS = {3: 56.2, 6: 31.9, 7: 26.4, 9: 18.2, 10: 15.1, 12: 10.5, 15: 6.1, 18: 3.6, 21: 2.1, 24: 1.2}


def ladder(sizes: dict[str, int], prune: PruneSection, rounds: int) -> list[float]:
    """Density in percent after 0, 1, ... rounds, from counts alone."""
    rates = layer_rates(sizes, prune)
    kept = dict(sizes)
    densities = [100.0]
    for _ in range(rounds):
        for names, count in groups(rates, {n: kept[n] for n in rates}, prune.scope):
            kept[names[0]] -= count  # which tensor of a group loses them changes no sum
        densities.append(100 * sum(kept.values()) / sum(sizes.values()))
    return densities


def paper(pair: str) -> SimpleNamespace:
    recipe = compose(*pair.split(), preset="paper").recipe
    model = skeleton(recipe)
    return SimpleNamespace(sizes={n: model.get_parameter(n).numel() for n in weight_names(model)}, prune=recipe.prune)


@pytest.mark.parametrize("pair", P_M)
def test_densities_of_the_paper_presets_are_the_papers(pair):
    net = paper(pair)
    densities = ladder(net.sizes, net.prune, max(P_M[pair]))
    assert {k: densities[k] for k in P_M[pair]} == pytest.approx(P_M[pair], abs=0.01)
    assert all(b < a for a, b in pairwise(densities))


def test_conv_6_comes_near_the_labels_the_paper_prints_for_a_smaller_net():
    """Figure 2 says 1.7M weights where its architecture has 2.26M."""
    net = paper("conv-6 cifar-10")
    densities = ladder(net.sizes, net.prune, 24)
    assert {k: densities[k] for k in CONV_6_LABELS} == pytest.approx(CONV_6_LABELS, abs=0.3)


def test_resnet_20s_densities():
    """267,696 weights ranked together; 2,560 of shortcuts and 640 of the output are never pruned."""
    sizes = {"convs.weight": 267_696, "shortcut.weight": 2_560, "output.weight": 640}
    prune = PruneSection(rate=0.2, scope="global", scale={"shortcut": 0.0, "output": 0.0})
    densities = ladder(sizes, prune, 14)
    expected = {2: 64.43, 4: 41.66, 6: 27.09, 7: 21.91, 8: 17.76, 10: 11.79, 12: 7.97, 14: 5.53}
    assert {k: densities[k] for k in expected} == pytest.approx(expected, abs=0.01)


def test_vgg19s_exact_counts():
    net = paper("vgg19 cifar-10")
    rates = layer_rates(net.sizes, net.prune)
    assert sum(net.sizes[n] for n in rates) == 20_018_880
    kept = {n: net.sizes[n] for n in rates}
    counts = []
    for _ in range(2):
        [(_, count)] = groups(rates, kept, "global")
        kept["conv16.weight"] -= count
        counts.append(sum(kept.values()))
    assert counts == [16_015_104, 12_812_084]


@pytest.mark.parametrize(
    ("rate", "label"), [(0.125, 87.5), (0.25, 75.0), (0.375, 62.6), (0.5, 50.1), (0.625, 37.6), (0.75, 25.1),
                        (0.875, 12.7)],
)  # fmt: skip
def test_one_shot_pruning_at_half_the_rate_in_the_output_gives_the_papers_labels(rate, label):
    net = paper("lenet-300-100 mnist")
    [_, density] = ladder(net.sizes, PruneSection(rate=rate, scale={"output": 0.5}), 1)
    assert density == pytest.approx(label, abs=0.1)
