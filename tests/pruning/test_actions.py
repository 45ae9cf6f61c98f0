"""Every mask-1 and mask-0 action against its definition written down a second time, and what freezing means."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fastlth_kernels.philox import philox
from numpy.typing import NDArray

from fastlth import catalogue
from fastlth.errors import RecipeError
from fastlth.pruning import actions
from fastlth.pruning.draws import FREEZE_REINIT, MASK_1, REINIT, TIES, ZERO_RESHUFFLE
from fastlth.recipe import PruneSection, Recipe, TrainSection
from fastlth.training.optim import MaskedOptimizer
from tests.helpers import assert_same_bits, bits

Array = NDArray[Any]
KEY, NUMBER, ROUND = (3, 5), 2, 7
NASTY = np.array([-2, -1, -0.5, -1e-45, -0.0, 0.0, 1e-45, 0.5, 1, 2, 1e19], np.float32)


@functools.cache
def random(place: int, round: int, purpose: int) -> int:
    w0, w1, _, _ = philox(place, NUMBER, round, purpose, KEY)
    return int((w0 << 31) | (w1 >> 1))


def order(places: Array, round: int, purpose: int) -> Array:
    """Places of one tensor by their random keys, with Python's integers and its own sort."""
    return np.array(sorted(range(len(places)), key=lambda i: random(int(places[i]), round, purpose)), np.int64)


def permute(w: Array, round: int = ROUND, purpose: int = MASK_1) -> Array:
    return w.ravel()[order(np.arange(w.size), round, purpose)].reshape(w.shape)


def reshuffle(w: Array, m: Array, round: int = ROUND) -> Array:
    out = w.copy()
    out[m] = w[m][order(np.flatnonzero(m), round, MASK_1)]
    return out


def std(w: Array) -> Any:
    return np.float32(np.std(w.astype(np.float64)))


def factor(m: Array) -> Any:
    return np.float32(m.size / m.sum())


# Zhou et al. 2019 and the table of their program, in numpy: w_i, mask -> what the kept weights start with.
KEPT: dict[str, Callable[[Array, Array], Array]] = {
    "none": lambda w, m: w,
    "random_reinit": lambda w, m: permute(w),
    "signed_reinit": lambda w, m: np.abs(permute(w)) * np.sign(w),
    "random_reshuffle": reshuffle,
    "signed_reshuffle": lambda w, m: np.abs(reshuffle(w, m)) * np.sign(w),
    "signed_constant": lambda w, m: std(w) * np.sign(w),
    "rand_signed_constant": lambda w, m: permute(std(w) * np.sign(w)),
    "random_reinit_rescaling": lambda w, m: permute(w) * factor(m),
    "signed_reinit_rescaling": lambda w, m: np.abs(permute(w)) * np.sign(w) * factor(m),
    "signed_constant_rescaling": lambda w, m: std(w) * np.sign(w) * factor(m),
    "rand_signed_constant_rescaling": lambda w, m: permute(std(w) * np.sign(w)) * factor(m),
    "mask_init": lambda w, m: w * m,
}


# Two rounds of the program: what the action of round 2 makes of what that of round 1 made, of all entries.
PILED: dict[str, Callable[[Array, Array, Array], Array]] = {
    "random_reinit": lambda w, m, n: permute(permute(w, 1), 2),
    "signed_reinit": lambda w, m, n: np.abs(permute(permute(w, 1), 2)) * np.sign(w),
    "random_reshuffle": lambda w, m, n: reshuffle(reshuffle(w, m, 1), n, 2),
    "signed_reshuffle": lambda w, m, n: np.abs(reshuffle(reshuffle(w, m, 1), n, 2)) * np.sign(w),
    "signed_constant": lambda w, m, n: std(std(w) * np.sign(w)) * np.sign(w),
    "rand_signed_constant": lambda w, m, n: permute(
        std(permute(std(w) * np.sign(w), 1)) * np.sign(permute(std(w) * np.sign(w), 1)), 2),
    "random_reinit_rescaling": lambda w, m, n: permute(permute(w, 1) * factor(m), 2) * factor(n),
    "signed_reinit_rescaling": lambda w, m, n:
        np.abs(permute(np.abs(permute(w, 1)) * np.sign(w) * factor(m), 2)) * np.sign(w) * factor(n),
    "signed_constant_rescaling": lambda w, m, n: std(std(w) * np.sign(w) * factor(m)) * np.sign(w) * factor(n),
    "rand_signed_constant_rescaling": lambda w, m, n: PILED["rand_signed_constant"](w, m, n) * factor(m) * factor(n),
}  # fmt: skip


def reshuffled_zeros(wi: Array, wf: Array, gone: Array) -> Array:
    """As many zeros as weights shrank, elsewhere among those that are pruned."""
    places = np.flatnonzero(gone)
    zero = np.zeros(gone.size, bool)
    count = int((gone & (np.abs(wi) > np.abs(wf))).sum())
    zero[places[order(places, ROUND, ZERO_RESHUFFLE)[:count]]] = True
    return np.where(zero.reshape(gone.shape), 0, wi)


# w_i, w_f, the weights now pruned -> what they are frozen at.
PRUNED: dict[str, Callable[[Array, Array, Array], Array]] = {
    "mask": lambda wi, wf, gone: np.zeros_like(wi),
    "freeze_init": lambda wi, wf, gone: wi,
    "freeze_reinit": lambda wi, wf, gone: permute(wi, 0, FREEZE_REINIT),
    "freeze_init_zero_mask": lambda wi, wf, gone: np.where(np.abs(wi) > np.abs(wf), 0, wi),
    "freeze_init_zero_all": lambda wi, wf, gone: np.where(np.abs(wi) > np.abs(wf), 0, wi),
    "freeze_init_zero_reshuffle": reshuffled_zeros,
    "freeze_init_zero_rev": lambda wi, wf, gone: np.where(np.abs(wi) < np.abs(wf), 0, wi),
}


def values(seed: int, nasty: bool = True) -> Array:
    rng = np.random.default_rng(seed)
    return rng.choice(NASTY, (12, 10)) if nasty else rng.standard_normal((12, 10)).astype(np.float32)


def drawn(key: tuple[int, int], shape: tuple[int, ...] = (12, 10)) -> dict[str, torch.Tensor]:
    """A net's values from a key, as another distribution gives them."""
    return {"w": torch.from_numpy(np.random.default_rng(key).standard_normal(shape).astype(np.float32))}


def gone(mask: Array, round: int) -> dict[str, torch.Tensor]:
    """``pruned_at`` of weights that all went in one round."""
    return {"w": torch.from_numpy(np.where(mask, 0, round).astype(np.uint8))}


def start(wi: Array, wf: Array, before: Array, after: Array, mask_1: str, mask_0: str, **settings: Any) -> Array:
    """What round 7 starts with after a round that began with ``wi`` under ``before`` and ended with ``wf``."""
    section = PruneSection(mask_1=mask_1, mask_0=mask_0, **settings)
    tensor = torch.from_numpy
    arguments: dict[str, Any] = {"numbers": {"w": NUMBER, "other": 0}, "round": ROUND, "key": KEY}
    draw = functools.partial(drawn, shape=wi.shape)
    none_yet = {"w": torch.zeros(wi.shape, dtype=torch.uint8)} if section.zeroes else {}
    zero_from = actions.zeroed(section, none_yet, {"w": tensor(before)}, {"w": tensor(after)}, {"w": tensor(wi)},
                               {"w": tensor(wf)}, **arguments)  # fmt: skip
    theta = {"w": tensor(wi), "bias": torch.arange(3.0)}
    kept_theta = {n: t.clone() for n, t in theta.items()}
    values = actions.start(section, theta, gone(after, ROUND), zero_from, **arguments, draw=draw)
    assert_same_bits(theta, kept_theta)
    assert values.keys() == theta.keys() and torch.equal(values["bias"], theta["bias"])
    return values["w"].numpy()


def history(seed: int, nasty: bool) -> tuple[Array, Array, Array, Array]:
    rng = np.random.default_rng(seed)
    before = rng.random((12, 10)) < 0.8
    return values(seed, nasty), values(seed + 50, nasty), before, before & (rng.random((12, 10)) < 0.7)


def test_there_are_twelve_and_eight_and_all_are_defined_here():
    assert set(KEPT) == set(actions.MASK_1) == set(catalogue.MASK_1) and len(catalogue.MASK_1) == 12
    assert {*PRUNED, "original"} == set(actions.MASK_0) == set(catalogue.MASK_0) and len(catalogue.MASK_0) == 8
    assert set(actions.ZEROING) == {n for n in catalogue.MASK_0 if PruneSection(mask_0=n).zeroes}


@pytest.mark.parametrize("nasty", [True, False])
@pytest.mark.parametrize("mask_0", PRUNED)
@pytest.mark.parametrize("mask_1", [n for n in KEPT if n != "mask_init"])
def test_all_actions_combined(mask_1, mask_0, nasty):
    for seed in range(2):
        wi, wf, before, after = history(seed, nasty)
        got = start(wi, wf, before, after, mask_1, mask_0)
        kept, gone = KEPT[mask_1](wi, after), PRUNED[mask_0](wi, wf, before & ~after)
        if mask_0 == "freeze_init_zero_all":
            kept = np.where(np.abs(wi) > np.abs(wf), 0, kept)
        newly = before & ~after
        assert (got[after] == kept[after]).all() and got.dtype == np.float32
        assert (got[newly] == gone[newly]).all()
        if mask_0 in ("mask", "freeze_init", "freeze_reinit"):
            assert (got[~after] == gone[~after]).all()


@pytest.mark.parametrize("mask_1", KEPT)
def test_with_original_pruned_weights_are_trained_from_what_the_mask_1_action_gives_them(mask_1):
    wi, wf, before, after = history(1, False)
    assert (start(wi, wf, before, after, mask_1, "original") == KEPT[mask_1](wi, after)).all()


def test_what_is_drawn_for_different_ends_has_numbers_that_never_change():
    """docs/ticket-format.md names them: a ticket's starts are made again from them."""
    assert (TIES, MASK_1, FREEZE_REINIT, ZERO_RESHUFFLE, REINIT) == (0, 1, 2, 3, 4)


def test_mask_init_with_frozen_weights_is_refused():
    for mask_0 in catalogue.MASK_0:
        if mask_0 != "original":
            with pytest.raises(RecipeError, match="mask_0 must be original with mask_1 mask_init, which trains"):
                PruneSection(mask_1="mask_init", mask_0=mask_0)


@pytest.mark.parametrize("mask_1", catalogue.MASK_1)
@pytest.mark.parametrize("mask_0", catalogue.MASK_0)
def test_round_0_trains_the_net_as_it_is(mask_1, mask_0):
    if (mask_1 == "mask_init") == (mask_0 == "original"):
        theta = {"w": torch.from_numpy(values(0))}
        none_yet = {"w": torch.zeros(12, 10, dtype=torch.uint8)}
        section = PruneSection(mask_1=mask_1, mask_0=mask_0)
        zero_from = none_yet if section.zeroes else {}
        got = actions.start(section, theta, none_yet, zero_from, numbers={"w": 0}, round=0, key=KEY, draw=drawn)
        assert_same_bits(got, theta)


@pytest.mark.parametrize("name", [n for n in KEPT if "reinit" in n or "reshuffle" in n or n.startswith("rand")])
def test_draws_depend_on_seed_round_and_tensor_and_signs_stay_where_they_should(name):
    wi, _, _, after = history(3, False)
    theta, pruned_at = {"w": torch.from_numpy(wi)}, gone(after, 1)

    def draw(number: int = 1, round: int = 1, key: tuple[int, int] = KEY) -> Array:
        section = PruneSection(mask_1=name)
        got = actions.start(section, theta, pruned_at, {}, numbers={"w": number}, round=round, key=key, draw=drawn)
        return got["w"].numpy()

    one = draw()
    assert (one == draw()).all()
    for other in (draw(number=2), draw(round=2), draw(key=(4, 5))):
        assert 0.5 < (one[after] != other[after]).mean() or "constant" in name
        assert (one != other).any()
    if name.startswith("signed"):
        assert (np.sign(one) == np.sign(wi * after)).all()
    if name.startswith("random_reshuffle"):
        assert (np.sort(one[after]) == np.sort(wi[after])).all()


@pytest.mark.parametrize("mask_1", PILED)
@pytest.mark.parametrize("mask_0", ["mask", "original", "freeze_init"])
def test_as_the_program_does_actions_pile_up_over_rounds(mask_1, mask_0):
    for seed in range(3):
        wi, _, first, second = history(seed, False)
        at = np.where(first, np.where(second, 0, 2), 1).astype(np.uint8)
        section = PruneSection(mask_1=mask_1, mask_0=mask_0, actions="code")

        def begin(round: int, section: PruneSection, wi: Array = wi, at: Array = at) -> Array:
            return actions.start(section, {"w": torch.from_numpy(wi)}, {"w": torch.from_numpy(at)}, {},
                                 numbers={"w": NUMBER}, round=round, key=KEY, draw=drawn)["w"].numpy()  # fmt: skip

        paper = PruneSection(mask_1=mask_1, mask_0=mask_0)
        assert (begin(1, section)[first] == begin(1, paper)[first]).all()
        got, wanted = begin(2, section), PILED[mask_1](wi, first, second)
        np.testing.assert_allclose(got[second], wanted[second], rtol=3e-7)
        if mask_0 != "original":
            assert mask_0 == "freeze_init" or (got[~second] == 0).all()
        if mask_0 != "mask":  # frozen, too, at what the action made of them
            np.testing.assert_allclose(got, wanted, rtol=3e-7)
        differs = (got[second] != begin(2, paper)[second]).mean()
        assert differs > 0.5 or mask_1 == "rand_signed_constant"


@pytest.mark.parametrize("actions_of", ["paper", "code"])
@pytest.mark.parametrize("mask_1", [n for n in KEPT if "reinit" in n])
def test_reinitialised_from_the_distribution(mask_1, actions_of):
    """Every round's values are another draw; frozen ones keep that of round 0."""
    wi, _, first, second = history(2, False)
    at = np.where(first, np.where(second, 0, 2), 1).astype(np.uint8)
    section = PruneSection(mask_1=mask_1, mask_0="freeze_reinit", reinit="draw", actions=actions_of)
    asked: list[tuple[int, int]] = []

    def draw(key: tuple[int, int]) -> dict[str, torch.Tensor]:
        asked.append(key)
        return drawn(key)

    def key_of(round: int) -> tuple[int, int]:
        w0, w1, _, _ = philox(round, 0, 0, 4, KEY)
        return int(w0), int(w1)

    got = actions.start(section, {"w": torch.from_numpy(wi)}, {"w": torch.from_numpy(at)}, {}, numbers={"w": NUMBER},
                        round=2, key=KEY, draw=draw)["w"].numpy()  # fmt: skip
    fresh = drawn(key_of(2))["w"].numpy()
    kept = np.abs(fresh) * np.sign(wi) if mask_1.startswith("signed") else fresh
    kept = kept * factor(second) if mask_1.endswith("rescaling") else kept
    np.testing.assert_allclose(got[second], kept[second], rtol=3e-7)
    assert (got[~second] == drawn(key_of(0))["w"].numpy()[~second]).all()
    assert set(asked) == {key_of(k) for k in ((0, 1, 2) if actions_of == "code" else (0, 2))}


@pytest.mark.parametrize("mask_1", ["none", "signed_constant", "random_reshuffle"])
def test_a_draw_that_no_action_asks_for_is_refused(mask_1):
    with pytest.raises(RecipeError, match=rf"prune\.reinit must be permute with mask_1 {mask_1} and mask_0 mask; only"):
        PruneSection(mask_1=mask_1, reinit="draw")
    PruneSection(mask_1=mask_1, mask_0="freeze_reinit", reinit="draw")


@pytest.mark.parametrize("mask_1", ["none", "mask_init"])
def test_actions_that_cannot_pile_up_are_refused(mask_1):
    mask_0 = "original" if mask_1 == "mask_init" else "mask"
    with pytest.raises(RecipeError, match=rf"prune\.actions must be paper with mask_1 {mask_1}, which gives the same"):
        PruneSection(mask_1=mask_1, mask_0=mask_0, actions="code")


def test_a_given_constant_takes_the_place_of_the_standard_deviation():
    wi, wf, before, after = history(2, True)
    got = start(wi, wf, before, after, "signed_constant", "mask", constant=0.25)
    assert (got == 0.25 * np.sign(wi) * after).all()


def test_the_standard_deviation_is_the_same_bits_however_the_tensor_lies_in_memory():
    w = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0)) * 1e-3 + 1
    assert actions._std(w) == actions._std(w.to(memory_format=torch.channels_last))
    exact = math.fsum(w.double().flatten().tolist()) / w.numel()
    wanted = math.sqrt(math.fsum((x - exact) ** 2 for x in w.double().flatten().tolist()) / w.numel())
    assert actions._std(w) == pytest.approx(wanted, rel=1e-12)
    assert actions._std(torch.zeros(0, 3)) == 0.0 and actions._std(torch.ones(1, 1)) == 0.0


@pytest.mark.parametrize("mask_1", catalogue.MASK_1)
@pytest.mark.parametrize("mask_0", catalogue.MASK_0)
def test_layers_that_are_empty_whole_or_dead(mask_1, mask_0):
    if (mask_1 == "mask_init") == (mask_0 == "original"):
        for shape, kept in (((0, 3), True), ((4, 3), False), ((4, 3), True), ((1, 1), True)):
            w, mask = np.full(shape, -0.5, np.float32), np.full(shape, kept)
            got = start(w, 2 * w, np.full(shape, True), mask, mask_1, mask_0)
            assert got.shape == shape and np.isfinite(got).all()


def test_a_decision_about_a_pruned_weight_is_for_ever():
    """Over ten rounds a weight becomes zero when it is pruned or never; only zero_all asks kept ones too."""
    rng = np.random.default_rng(0)
    theta = rng.standard_normal((12, 10)).astype(np.float32)
    for mask_0 in actions.ZEROING:
        section = PruneSection(mask_0=mask_0)
        arguments: dict[str, Any] = {"numbers": {"w": 0}, "key": KEY}
        mask, zero_from = np.ones((12, 10), bool), {"w": torch.zeros(12, 10, dtype=torch.uint8)}
        initial, pruned_at = {"w": torch.from_numpy(theta)}, np.zeros((12, 10))
        for round in range(1, 11):
            final = initial["w"].numpy() + np.where(mask, rng.standard_normal((12, 10)), 0).astype(np.float32)
            after = mask & (rng.random((12, 10)) < 0.8)
            pruned_at[mask & ~after] = round
            new = actions.zeroed(section, zero_from, {"w": torch.from_numpy(mask)}, {"w": torch.from_numpy(after)},
                                 initial, {"w": torch.from_numpy(final)}, round=round, **arguments)  # fmt: skip
            old, now = zero_from["w"].numpy(), new["w"].numpy()
            assert (now[old > 0] == old[old > 0]).all() and set(now[old == 0]) <= {0, round}
            if mask_0 != "freeze_init_zero_all":
                assert (now[now > 0] == pruned_at[now > 0]).all()
            values = actions.start(section, {"w": torch.from_numpy(theta)}, gone(after, round), new,
                                   round=round, draw=drawn, **arguments)  # fmt: skip
            assert (values["w"].numpy() == np.where(now > 0, 0, theta)).all()
            frozen = ~mask
            assert (values["w"].numpy()[frozen] == initial["w"].numpy()[frozen]).all()
            mask, zero_from, initial = after, new, values
        assert (zero_from["w"] > 0).any() and (zero_from["w"] == 0).any()


# freezing

OPTIMIZERS = {
    "sgd": {}, "sgd-decay": {"weight_decay": 0.1}, "momentum": {"momentum": 0.9, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "adam": {"optimizer": "adam"}, "adam-decay": {"optimizer": "adam", "weight_decay": 0.1},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_weights_stay_bit_for_bit_through_100_steps(name):
    train = TrainSection(**{"iterations": 1, "batch_size": 1, "lr": 0.1, "optimizer": "sgd", **OPTIMIZERS[name]})
    fill = torch.from_numpy(values(0)).flatten()
    fill[:2] = torch.tensor([math.nan, -math.inf])
    weight = torch.nn.Parameter(fill.clone())
    pruned = torch.arange(len(fill)) % 3 == 0
    kept = weight.detach()[~pruned].clone().clamp(-1, 1)
    with torch.no_grad():
        weight[~pruned] = kept
    optimizer = MaskedOptimizer({"w": weight}, train)
    optimizer.fill = {"w": fill.clone()}
    generator = torch.Generator().manual_seed(1)
    for step in range(100):
        weight.grad = torch.randn(len(fill), generator=generator)
        weight.grad[pruned] = (math.nan, math.inf, 1.0)[step % 3]
        optimizer.step({"w": pruned})
        assert torch.equal(bits(weight)[pruned], bits(fill)[pruned]), step
    moved = weight.detach()[~pruned]
    assert moved.isfinite().all() and (moved != kept).all()


def test_engines_that_keep_zeros_only_are_refused_for_other_values():
    def recipe(engine: str, mask_0: str) -> Recipe:
        compute = SimpleNamespace(engine=engine)
        made = Recipe.from_dict({"model": {"name": "lenet-300-100"}, "data": {"name": "digits"},
                                 "train": {"iterations": 9, "batch_size": 9, "lr": 0.1},
                                 "prune": {"mask_0": mask_0}})  # fmt: skip
        object.__setattr__(made, "compute", compute)
        made.__post_init__()
        return made

    for mask_0 in catalogue.MASK_0:
        recipe("dense", mask_0)
        if mask_0 in ("mask", "original"):
            recipe("sparse", mask_0)
        else:
            with pytest.raises(RecipeError, match=f"compute.engine must be auto or dense with prune.mask_0 {mask_0}"):
                recipe("sparse", mask_0)
