"""A whole pruning step: nested masks, exact counts, and the papers' densities on random weights."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch.nn.utils import prune as torch_prune

from fastlth import masks as mask_tools
from fastlth.catalogue import DATASETS
from fastlth.composition import compose
from fastlth.errors import DivergedError
from fastlth.models import skeleton, weight_names
from fastlth.pruning import layer_rates, prune
from fastlth.recipe import PruneSection

KEY = (3, 5)
SHAPES = {"conv1.weight": (6, 3, 3, 3), "fc1.weight": (40, 30), "output.weight": (10, 40)}


def weights(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}


def step(section: PruneSection, masks: dict[str, Tensor], final: dict[str, Tensor], **other) -> dict[str, Tensor]:
    numbers = {n: i for i, n in enumerate(final)}
    arguments = {"numbers": numbers, "round": 1, "key": KEY} | other
    return prune(section, masks, final, final, **arguments)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_masks_are_nested_and_counts_exact_over_many_rounds(scope):
    section = PruneSection(rate=0.2, scope=scope, scale={} if scope == "global" else {"output": 0.5, "conv*": 0.75})
    masks = mask_tools.full(weights(0))
    rates = layer_rates(SHAPES, section)
    for round in range(1, 31):
        final = {n: w * masks[n] for n, w in weights(round).items()}
        new = step(section, masks, final, round=round)
        assert mask_tools.nested(new, masks)
        before, after = ({n: int(m.sum()) for n, m in group.items()} for group in (masks, new))
        if scope == "global":
            total = sum(before.values())
            assert sum(after.values()) == total - math.floor(Fraction(1, 5) * total)
        else:
            assert after == {n: kept - math.floor(rates[n] * kept) for n, kept in before.items()}
        assert all(new[n] is not masks[n] for n in masks)
        gone = {n: w[masks[n] & ~new[n]].abs() for n, w in final.items()}
        left = {n: w[new[n]].abs() for n, w in final.items()}
        if scope == "global":  # one ranking over all
            gone, left = ({"all": torch.cat(list(group.values()))} for group in (gone, left))
        for n in gone:
            assert not len(gone[n]) or not len(left[n]) or gone[n].max() <= left[n].min()
        masks = new
    assert sum(int(m.sum()) for m in masks.values()) > 0
    if scope == "layer":
        assert all(m.any() for m in masks.values())


def test_global_scope_lets_small_layers_lose_more_and_layer_scope_does_not():
    final = weights(0)
    final["fc1.weight"] *= 1e-9
    masks = mask_tools.full(final)
    by_layer = step(PruneSection(rate=0.5), masks, final)
    overall = step(PruneSection(rate=0.5, scope="global"), masks, final)
    assert [int(m.sum()) for m in by_layer.values()] == [81, 600, 200]
    assert [int(m.sum()) for m in overall.values()] == [162, 1200 - 881, 400]


def test_large_final_looks_at_sizes_after_training_alone():
    final = weights(0)
    masks = mask_tools.full(final)
    arguments = {"numbers": {n: i for i, n in enumerate(final)}, "round": 1, "key": KEY}
    section = PruneSection(rate=0.3)
    one, other = (prune(section, masks, initial, final, **arguments) for initial in (weights(8), weights(9)))
    negated = prune(section, masks, weights(8), {n: -w for n, w in final.items()}, **arguments)
    for n in masks:
        assert torch.equal(one[n], other[n])
        assert torch.equal(one[n], negated[n])
        threshold = final[n].abs().flatten().sort().values[int(Fraction(3, 10) * final[n].numel())]
        assert torch.equal(one[n], final[n].abs() >= threshold)


def test_magnitude_is_another_name_of_large_final():
    assert PruneSection(criterion="magnitude") == PruneSection(criterion="large_final")


def test_a_layer_with_factor_zero_has_no_mask_and_changes_nothing_for_the_others():
    section = PruneSection(rate=0.2, scope="global", scale={"output": 0.0})
    final = weights(0)
    prunable = {n: m for n, m in mask_tools.full(final).items() if n != "output.weight"}
    one = step(section, prunable, final)
    other = step(section, prunable, final | {"output.weight": torch.zeros(10, 40)})
    assert one.keys() == prunable.keys()
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert mask_tools.kept(one) == 162 + 1200 - 272


ELSEWHERE = {n: i + 1 for i, n in enumerate(SHAPES)}


@pytest.mark.parametrize("change", [{"round": 2}, {"key": (4, 5)}, {"numbers": ELSEWHERE}])
def test_round_seed_and_place_matter_among_ties_only(change):
    masks = mask_tools.full(weights(0))
    section = PruneSection(rate=0.5)
    final = weights(0)
    one, other = step(section, masks, final), step(section, masks, final, **change)
    assert all(torch.equal(one[n], other[n]) for n in one)
    tied = {n: torch.zeros_like(w) for n, w in final.items()}
    one, other = step(section, masks, tied), step(section, masks, tied, **change)
    assert mask_tools.kept(one) == mask_tools.kept(other) == 81 + 600 + 200
    assert not any(torch.equal(one[n], other[n]) for n in one)


def test_layers_without_any_score_lose_exactly_their_share():
    """A net that has died has zeros alone; the counts hold all the same."""
    final = {n: torch.zeros(s) for n, s in SHAPES.items()}
    masks = mask_tools.full(final)
    for round in range(1, 6):
        new = step(PruneSection(rate=0.2), masks, final, round=round)
        assert {n: int(m.sum()) for n, m in new.items()} == {n: k - k // 5 for n, k in counts(masks).items()}
        masks = new


def counts(masks: dict[str, Tensor]) -> dict[str, int]:
    return {n: int(m.sum()) for n, m in masks.items()}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_nan_in_any_kept_weight_is_refused(scope):
    final = weights(0)
    final["fc1.weight"][3, 3] = math.nan
    with pytest.raises(DivergedError, match=r"fc1\.weight.* NaN"):
        step(PruneSection(scope=scope), mask_tools.full(final), final)


def test_only_tensors_that_have_a_mask_are_pruned():
    final = weights(0)
    one = {"fc1.weight": torch.ones(40, 30, dtype=torch.bool)}
    new = step(PruneSection(rate=0.2), one, final)
    assert new.keys() == one.keys()
    assert torch.equal(new["fc1.weight"], step(PruneSection(rate=0.2), mask_tools.full(final), final)["fc1.weight"])


def test_an_exact_zero_that_survives_is_not_taken_for_pruned():
    """The mask says what is pruned, not the value: of 1,000 kept zeros a fifth goes."""
    final = {"fc1.weight": torch.cat([torch.zeros(1_000), torch.ones(1_000)])}
    masks = {"fc1.weight": torch.cat([torch.ones(1_000), torch.zeros(1_000)]).bool()}
    new = step(PruneSection(rate=0.2), masks, final)
    assert int(new["fc1.weight"].sum()) == 800


def test_twenty_rounds_choose_the_masks_of_torchs_global_pruning():
    generator = torch.Generator().manual_seed(0)
    layers = {"fc1": torch.nn.Linear(30, 40), "output": torch.nn.Linear(40, 10)}
    order = (torch.randperm(1600, generator=generator) + 1.0).split([1200, 400])  # all sizes differ
    for layer, part in zip(layers.values(), order, strict=True):
        layer.weight.data = part.view(layer.weight.shape).clone()
    final = {f"{n}.weight": m.weight.detach().clone() for n, m in layers.items()}
    masks = mask_tools.full(final)
    for round in range(1, 21):
        gone = mask_tools.kept(masks) // 5
        torch_prune.global_unstructured(
            [(m, "weight") for m in layers.values()], pruning_method=torch_prune.L1Unstructured, amount=gone
        )
        masks = step(PruneSection(rate=0.2, scope="global"), masks, final, round=round)
        assert all(torch.equal(masks[f"{n}.weight"], m.weight_mask.bool()) for n, m in layers.items())


def test_lenet_on_random_weights_has_the_papers_densities_for_24_rounds():
    recipe = compose("lenet-300-100", "mnist", preset="paper").recipe
    model = skeleton(recipe)
    shapes = {n: tuple(model.get_parameter(n).shape) for n in weight_names(model)}
    final = weights(0, shapes)
    masks = mask_tools.full(final)
    densities = [100.0]
    for round in range(1, 25):
        new = step(recipe.prune, masks, final, round=round)
        assert mask_tools.nested(new, masks)
        masks = new
        densities.append(100 * mask_tools.kept(masks) / 266_200)
    expected = {1: 80.04, 3: 51.28, 7: 21.07, 9: 13.52, 12: 6.95, 15: 3.58, 20: 1.19, 24: 0.50}
    assert {k: densities[k] for k in expected} == pytest.approx(expected, abs=0.01)


def test_what_ranks_together_in_vgg19_is_every_convolution_and_nothing_else():
    recipe = compose("vgg19", "cifar-10", preset="paper").recipe
    model = skeleton(recipe)
    assert list(layer_rates(weight_names(model), recipe.prune)) == [f"conv{i}.weight" for i in range(1, 17)]
    assert model.get_parameter("output.weight").shape == (DATASETS["cifar-10"].classes, 512)
