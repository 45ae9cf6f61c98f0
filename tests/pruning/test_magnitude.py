"""Pruning by the kernel removes the very weights that the scores |w| rank lowest; here by its reference."""

from __future__ import annotations

import pytest
import torch

import fastlth.pruning
from fastlth.errors import EnvironmentFailure
from fastlth.pruning import layer_rates, magnitude, prune
from fastlth.pruning.select import remove_lowest
from fastlth.recipe import PruneSection
from tests.helpers import half_masks

SHAPES = {"conv1.weight": (6, 3, 3, 3), "conv2.weight": (40, 6, 3, 3), "fc.weight": (33, 70), "output.weight": (10, 33)}
NUMBERS = {n: 2 * i + 1 for i, n in enumerate(SHAPES)}
KEY = (2**32 - 1, 7)


def weights(seed: int, few: bool) -> dict[str, torch.Tensor]:
    """Random ones, or so few different ones that most are tied: signed zeros, denormals and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    some = torch.tensor([0.0, -0.0, 1e-42, -1e-42, 0.5, -0.5, 2.0, float("inf"), -float("inf")])
    return {n: some[torch.randint(0, len(some), shape, generator=generator)] if few
            else torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}  # fmt: skip


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("count", [0, 1, 500, 2_000, None])
def test_the_same_weights_go_as_by_scores(few, count):
    for seed in range(3):
        final = {n: w.to(memory_format=torch.channels_last) if w.dim() == 4 else w
                 for n, w in weights(seed, few).items()}  # fmt: skip
        masks = half_masks(final, 0.7, seed)
        every = sum(int(m.sum()) for m in masks.values())
        arguments = {"numbers": NUMBERS, "round": 9, "key": KEY}
        gone = every if count is None else count
        scores = {n: w.abs() for n, w in final.items()}
        expected = remove_lowest(scores, masks, list(SHAPES), gone, **arguments)
        found = magnitude.remove_smallest(final, masks, list(SHAPES), gone, **arguments)
        assert found.keys() == expected.keys()
        for n, mask in expected.items():
            assert torch.equal(found[n], mask) and found[n] is not masks[n] and found[n].is_contiguous()
        assert sum(int((masks[n] & ~m).sum()) for n, m in found.items()) == gone


@pytest.mark.parametrize("wrong", ["one more", "one less", "one came back", "a larger one"])
def test_a_kernel_that_removes_others_is_found_out(monkeypatch, wrong):
    final = weights(0, False)
    masks = half_masks(final, 0.7)
    real = magnitude.prune_lowest

    def broken(lying, bits, count, numbers, round, key):
        real(lying, bits, count + (wrong == "one more") - (wrong == "one less"), numbers, round, key)
        word, row = bits[2][0], lying[2][0]  # of fc.weight
        kept = [i for i in range(32) if int(word[0]) >> i & 1]
        gone = [i for i in range(32) if not int(word[0]) >> i & 1]
        if wrong == "one came back":
            word[0] |= 1 << gone[0]
            word[0] &= ~(1 << kept[0])
        elif wrong == "a larger one":  # in place of one that went now
            largest = max(kept, key=lambda i: abs(float(row[i])))
            fell = next(i for i in gone if bool(masks["fc.weight"][0, i]))
            word[0] = (int(word[0]) | 1 << fell) & ~(1 << largest)

    monkeypatch.setattr(magnitude, "prune_lowest", broken)
    with pytest.raises(EnvironmentFailure, match="removed other weights than the smallest"):
        magnitude.remove_smallest(final, masks, list(SHAPES), 500, numbers=NUMBERS, round=1, key=KEY)


@pytest.mark.parametrize("section", [
    PruneSection(rate=0.3, scope="layer", scale={"output": 0.5, "conv1": 0.0}), PruneSection(rate=0.3, scope="global"),
])  # fmt: skip
def test_whole_rounds_are_the_same_either_way(monkeypatch, section):
    tickets = []
    for device in (False, True):
        monkeypatch.setattr(magnitude, "usable", lambda *_, device=device: device)
        monkeypatch.setattr(fastlth.pruning, "remove_lowest", pytest.fail if device else remove_lowest)
        masks = {n: torch.ones(SHAPES[n], dtype=torch.bool) for n in layer_rates(SHAPES, section)}
        for round in range(1, 6):
            final = {n: w * masks[n] if n in masks else w for n, w in weights(round, round % 2 == 0).items()}
            final = {n: w.nan_to_num() for n, w in final.items()}
            masks = prune(section, masks, final, final, numbers=NUMBERS, round=round, key=KEY)
        tickets.append(masks)
    assert all(torch.equal(tickets[0][n], m) for n, m in tickets[1].items())


def test_who_is_ranked_by_it():
    final = weights(0, False)
    assert not magnitude.usable(PruneSection(), final)  # not on a GPU
    on_gpu = {n: torch.empty(w.shape, device="meta") for n, w in final.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magnitude, "on_gpu", lambda t: t.device.type == "meta")
        assert magnitude.usable(PruneSection(), on_gpu) and magnitude.usable(PruneSection(scope="global"), on_gpu)
        assert not magnitude.usable(PruneSection(), {**on_gpu, "fc.weight": final["fc.weight"]})
        assert not magnitude.usable(PruneSection(), {n: w.double() for n, w in on_gpu.items()})
        assert not magnitude.usable(PruneSection(criterion="movement"), on_gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("few", [False, True])
def test_on_a_gpu_the_same_weights_go_as_on_a_cpu(few):
    final = weights(1, few)
    masks = half_masks(final, 0.7)
    section, arguments = PruneSection(rate=0.3, scope="global"), {"numbers": NUMBERS, "round": 2, "key": KEY}
    expected = prune(section, masks, final, final, **arguments)
    there = [{n: t.to("cuda") for n, t in part.items()} for part in (masks, final)]
    assert magnitude.usable(section, there[1])
    found = prune(section, *there, there[1], **arguments)
    assert all(torch.equal(found[n].cpu(), m) for n, m in expected.items())
