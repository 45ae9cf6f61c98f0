"""Every criterion against its formula written down a second time, and whole pruning steps by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.utils import prune as torch_prune

from fastlth import catalogue
from fastlth import masks as mask_tools
from fastlth.catalogue import SIGN_TESTS
from fastlth.errors import DivergedError, RecipeError
from fastlth.pruning import CRITERIA, prune
from fastlth.pruning.criteria import Inputs
from fastlth.recipe import PruneSection

Array = NDArray[Any]
KEY = (3, 5)

# Zhou et al. 2019, section 3, and the table of their program, in numpy: score by (w_i, w_f, gradient, alpha).
SCORES: dict[str, Callable[[Array, Array, Array, float], Array]] = {
    "large_final": lambda wi, wf, g, a: np.abs(wf),
    "small_final": lambda wi, wf, g, a: -np.abs(wf),
    "large_init": lambda wi, wf, g, a: np.abs(wi),
    "small_init": lambda wi, wf, g, a: -np.abs(wi),
    "large_init_large_final": lambda wi, wf, g, a: np.minimum(a * np.abs(wf), np.abs(wi)),
    "small_init_small_final": lambda wi, wf, g, a: -np.maximum(a * np.abs(wf), np.abs(wi)),
    "magnitude_increase": lambda wi, wf, g, a: np.abs(wf) - np.abs(wi),
    "movement": lambda wi, wf, g, a: np.abs(wf - wi),
    "random": lambda wi, wf, g, a: np.zeros_like(wf),
    "large_final_same_sign": lambda wi, wf, g, a: np.where(np.sign(wi) != np.sign(wf), 0, np.abs(wf)),
    "large_final_diff_sign": lambda wi, wf, g, a: np.where(np.sign(wi) == np.sign(wf), 0, np.abs(wf)),
    "magnitude_increase_same_sign":
        lambda wi, wf, g, a: np.where(np.sign(wi) != np.sign(wf), -np.inf, np.abs(wf) - np.abs(wi)),
    "magnitude_increase_diff_sign":
        lambda wi, wf, g, a: np.where(np.sign(wi) == np.sign(wf), -np.inf, np.abs(wf) - np.abs(wi)),
    "large_final_same_sign_single": lambda wi, wf, g, a: np.sign(wi) == np.sign(wf),
    "large_final_diff_sign_single": lambda wi, wf, g, a: np.sign(wi) != np.sign(wf),
    "snip": lambda wi, wf, g, a: np.abs(g * wi),
    "grad": lambda wi, wf, g, a: np.abs(g),
}  # fmt: skip
CODE = {  # where the program does not do what the paper (or the rest of the table) says
    "magnitude_increase_same_sign":
        lambda wi, wf, g, a: np.where(np.sign(wi) != np.sign(wf), 0, np.abs(wf) - np.abs(wi)),
    "magnitude_increase_diff_sign":
        lambda wi, wf, g, a: np.where(np.sign(wi) == np.sign(wf), 0, np.abs(wf) - np.abs(wi)),
}  # fmt: skip

NASTY = np.array([-2, -1, -0.5, -1e-45, -0.0, 0.0, 1e-45, 0.5, 1, 2, 1e19], np.float32)


def values(seed: int, nasty: bool = True, shape: tuple[int, ...] = (20, 30)) -> Array:
    """Many ties, zeros of both signs and extremes; or normal deviates, of which no two are equal in size."""
    rng = np.random.default_rng(seed)
    if nasty:
        return rng.choice(NASTY, shape)
    drawn = rng.standard_normal(shape).astype(np.float32)
    assert len(np.unique(np.abs(drawn))) == drawn.size
    return drawn


def inputs(initial: Array, final: Array, gradient: Array, **other: Any) -> Inputs:
    tensor = torch.from_numpy
    return Inputs(initial=tensor(initial), final=tensor(final), kept=torch.ones(initial.shape, dtype=torch.bool),
                  gradient=lambda: tensor(gradient), **other)  # fmt: skip


def test_there_are_seventeen_and_all_are_defined_here():
    assert set(SCORES) == set(CRITERIA) == set(catalogue.CRITERIA) and len(catalogue.CRITERIA) == 17


@pytest.mark.parametrize("nasty", [True, False])
@pytest.mark.parametrize("alpha", [1.0, 2.0, 0.1])
@pytest.mark.parametrize("name", SCORES)
def test_scores_are_those_of_the_formula(name, alpha, nasty):
    for seed in range(3):
        wi, wf, g = (values(10 * seed + i, nasty) for i in range(3))
        got = CRITERIA[name](inputs(wi, wf, g, alpha=alpha)).numpy()
        wanted = SCORES[name](wi, wf, g, np.float32(alpha))
        assert (got == wanted).all() and got.dtype == wanted.dtype
        if name in CODE:
            got = CRITERIA[name](inputs(wi, wf, g, alpha=alpha, code=True)).numpy()
            assert (got == CODE[name](wi, wf, g, alpha)).all()
            assert (got != wanted).any()


def step(name: str, wi: Array, wf: Array, g: Array, mask: Array, **settings: Any) -> Array:
    section = PruneSection(**{"criterion": name, "rate": 0.3, **settings})
    tensor = torch.from_numpy
    new = prune(section, {"w": tensor(mask)}, {"w": tensor(wi)}, {"w": tensor(wf)}, numbers={"w": 0}, round=1, key=KEY,
                gradients=lambda: {"w": tensor(g)})  # fmt: skip
    return new["w"].numpy()


@pytest.mark.parametrize("nasty", [True, False])
@pytest.mark.parametrize("name", [n for n in SCORES if n not in SIGN_TESTS])
def test_a_step_removes_exactly_the_lowest_scores_of_the_kept(name, nasty):
    for seed in range(3):
        wi, wf, g = (values(10 * seed + i, nasty) for i in range(3))
        mask = np.random.default_rng(seed).random(wi.shape) < 0.7
        new, score = step(name, wi, wf, g, mask), SCORES[name](wi, wf, g, np.float32(1))
        gone = mask & ~new
        assert not (new & ~mask).any()
        assert gone.sum() == 3 * mask.sum() // 10
        assert score[gone].max() <= score[new].min()


@pytest.mark.parametrize("name", SIGN_TESTS)
def test_a_sign_test_is_the_mask_whatever_the_rate(name):
    wi, wf, g = (values(i) for i in range(3))
    mask = np.random.default_rng(0).random(wi.shape) < 0.7
    expected = mask & SCORES[name](wi, wf, g, 1)
    assert 0 < expected.sum() < mask.sum()
    for rate in (0.1, 0.9):
        assert (step(name, wi, wf, g, mask, rate=rate) == expected).all()


@pytest.mark.parametrize("name", [n for n in SCORES if n not in (*SIGN_TESTS, "random") and "sign" not in n])
def test_torchs_own_pruning_chooses_the_same_masks(name):
    """Without ties l1_unstructured removes the lowest score of a layer, global_unstructured of all layers."""
    shapes = {"a": (12, 10), "b": (10, 30)}
    wi, wf, g = ({n: values(10 * i + j, False, s) for j, (n, s) in enumerate(shapes.items())} for i in range(3))
    score = {n: torch.from_numpy(SCORES[name](wi[n], wf[n], g[n], np.float32(1))) for n in shapes}
    # torch keeps the highest absolute scores it is given: shift them above zero, keeping their order
    ranks = torch.cat([s.flatten() for s in score.values()]).unique(return_inverse=True)[1] + 1.0
    score = {n: r.view(shapes[n]) for n, r in zip(shapes, ranks.split([120, 300]), strict=True)}
    tensors = [{n: torch.from_numpy(a) for n, a in x.items()} for x in (wi, wf, g)]
    masks = mask_tools.full(tensors[0])
    for scope in ("layer", "global"):
        section = PruneSection(criterion=name, rate=0.3, scope=scope)
        ours = prune(section, masks, tensors[0], tensors[1], numbers={"a": 0, "b": 1}, round=1, key=KEY,
                     gradients=lambda: tensors[2])  # fmt: skip
        layers = {n: torch.nn.Linear(s[1], s[0]) for n, s in shapes.items()}
        if scope == "layer":
            for n, layer in layers.items():
                torch_prune.l1_unstructured(layer, "weight", 3 * score[n].numel() // 10, importance_scores=score[n])
        else:
            torch_prune.global_unstructured(
                [(layer, "weight") for layer in layers.values()], torch_prune.L1Unstructured, amount=126,
                importance_scores={(layer, "weight"): score[n] for n, layer in layers.items()})  # fmt: skip
        for n, layer in layers.items():
            assert torch.equal(ours[n], layer.weight_mask.bool()), (scope, n)


@pytest.mark.parametrize("name", ["large_init_large_final", "small_init_small_final"])
def test_the_programs_percentile_keeps_what_is_high_in_both_rankings(name):
    """The program looks for the percentile at which the top of both rankings holds as many as it wants."""
    sign = 1 if name.startswith("large") else -1
    for seed in range(5):
        wi, wf = values(seed, False), values(seed + 100, False)
        mask = np.random.default_rng(seed).random(wi.shape) < 0.7
        new = step(name, wi, wf, wi, mask, formulas="code")
        wanted = mask.sum() - 3 * mask.sum() // 10
        assert new.sum() == wanted

        def top(n: int, wi=wi, wf=wf, mask=mask) -> Array:
            return np.logical_and.reduce([
                mask & (sign * np.abs(w) >= np.sort(sign * np.abs(w)[mask])[-n]) for w in (wi, wf)
            ])  # fmt: skip

        n = next(n for n in range(1, mask.sum() + 1) if top(n).sum() >= wanted)
        assert (new <= top(n)).all() and (new >= top(n - 1)).all()
        assert (new != step(name, wi, wf, wi, mask)).any()


def test_ties_in_the_programs_rankings_are_equal():
    wi = np.array([1, 1, 2, 2, -0.0, 0.0], np.float32)
    score = CRITERIA["large_init_large_final"](inputs(wi, -wi, wi, code=True))
    assert score.tolist() == [2, 2, 4, 4, 0, 0]


def test_half_of_the_sign_scores_tie_and_go_without_bias():
    """2,000 of 4,000 weights have score 0; half of these go, from rows and columns alike."""
    wi = np.ones((40, 100), np.float32)
    wf = np.where(np.arange(100) % 2, 1, -1).astype(np.float32) * (1 + values(0, False, (40, 100)) ** 2)
    gone = ~step("large_final_same_sign", wi, wf, wi, np.ones(wi.shape, bool), rate=0.25)
    assert gone.sum() == 1000 and not gone[:, 1::2].any()
    assert 10 <= gone[:, ::2].sum(1).min() and gone[:, ::2].sum(1).max() <= 40  # 25 +- 4.4 in a row


def test_random_is_a_fair_draw_of_seed_and_round():
    initial = {"w": torch.ones(100, 100)}
    section = PruneSection(criterion="random", rate=0.5)

    def draw(round: int = 1, key: tuple[int, int] = KEY) -> torch.Tensor:
        return prune(section, mask_tools.full(initial), initial, initial, numbers={"w": 0}, round=round, key=key)["w"]

    one = draw()
    assert torch.equal(one, draw()) and int(one.sum()) == 5000
    assert 30 <= int(one.sum(0).min()) and int(one.sum(0).max()) <= 70
    for other in (draw(round=2), draw(key=(4, 5))):
        assert 2_250 < int((one & other).sum()) < 2_750


@pytest.mark.parametrize("name", catalogue.CRITERIA)
def test_nets_that_are_empty_dead_or_of_one_weight(name):
    for shape, mask in (((0, 3), True), ((4, 3), False), ((1, 1), True)):
        wi = np.zeros(shape, np.float32)
        new = step(name, wi, wi, wi, np.full(shape, mask))
        single = SIGN_TESTS.index(name) == 0 if name in SIGN_TESTS else True
        assert new.sum() == (wi.size if mask and single else 0)


@pytest.mark.parametrize("name", catalogue.CRITERIA)
def test_a_net_that_became_nan_is_refused_by_every_criterion(name):
    wi, wf, g = (values(i, False) for i in range(3))
    wf[3, 3] = math.nan
    mask = np.ones(wi.shape, bool)
    with pytest.raises(DivergedError, match="weights of w are NaN"):
        step(name, wi, wf, g, mask)
    mask[3, 3] = False
    step(name, wi, wf, g, mask)


def test_criteria_that_need_gradients_say_so():
    wi = values(0)
    needing = [n for n in CRITERIA if PruneSection(criterion=n).needs_gradients]
    assert needing == ["snip", "grad"]
    for name in needing:
        with pytest.raises(ValueError, match="needs gradients"):
            CRITERIA[name](Inputs(initial=torch.from_numpy(wi), final=torch.from_numpy(wi), kept=torch.ones(wi.shape)))


def test_settings_that_mean_nothing_together_are_refused():
    both = {"criterion": "large_init_large_final"}
    PruneSection(**both, alpha=2.0)
    with pytest.raises(RecipeError, match=r"prune\.scope must be layer with .* which rank each layer alone"):
        PruneSection(**both, formulas="code", scope="global")
    with pytest.raises(RecipeError, match=r"prune\.alpha must be 1 with formulas code, which compares rankings"):
        PruneSection(**both, formulas="code", alpha=2.0)
    with pytest.raises(RecipeError, match=r"must be paper with criterion movement, of which paper .* say the same"):
        PruneSection(criterion="movement", formulas="code")
