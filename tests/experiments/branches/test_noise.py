"""Noise on the values that a ticket starts with, against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastlth import running
from fastlth.errors import RecipeError
from fastlth.experiments.branch import branch
from fastlth.experiments.control import Control
from fastlth.experiments.workbench import NOISE, draw_key
from fastlth.models.init import normal
from fastlth.tickets import load_ticket
from tests.experiments.branches.by_hand import LAYERS, assert_same_masks, recipe_of
from tests.helpers import assert_same_bits, small_recipe


def test_noise_is_added_to_the_rewind_values_in_units_of_the_layers_own_spread(run, starts):
    """Mean, spread and independence of what was added, against Glorot's formula; biases stay as they are."""
    ticket = load_ticket(run / "search.ticket")
    theta0, drawn = ticket.rewind(), {}
    for sigma in (0.5, 3.0):
        seen = starts(run, Control(kind="noise", sigma=sigma), rounds=[1, 3], trials=2)
        assert [(k, t) for k, t, _ in seen] == [(1, 0), (1, 1), (3, 0), (3, 1)]
        for k, t, start in seen:
            assert_same_masks(start.masks, ticket.mask(k))
            assert start.first == 0
            assert_same_bits({n: start.values[n] for n in theta0 if "bias" in n},
                             {n: theta0[n] for n in theta0 if "bias" in n})  # fmt: skip
            for name in LAYERS:
                noise = (start.values[name] - theta0[name]).double()
                std = sigma * math.sqrt(2 / sum(noise.shape))
                assert float(noise.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * noise.numel()))
                assert abs(float(noise.mean())) < 5 * std / math.sqrt(noise.numel())
            drawn[sigma, k, t] = (start.values["fc1.weight"] - theta0["fc1.weight"]).flatten()
    joined = torch.stack([*(d for (s, _, _), d in drawn.items() if s == 0.5), theta0["fc1.weight"].flatten()])
    assert float((torch.corrcoef(joined) - torch.eye(5)).abs().max()) < 0.05
    assert torch.allclose(drawn[3.0, 1, 0], 6 * drawn[0.5, 1, 0], atol=1e-5)  # one draw, at both sizes
    again = starts(run, Control(kind="noise", sigma=0.5), rounds=[3], trials=1)
    assert torch.equal((again[0][2].values["fc1.weight"] - theta0["fc1.weight"]).flatten(), drawn[0.5, 3, 0])


def test_noise_on_values_of_a_given_spread(tmp_path, starts):
    """model.weight_std 0.4 and noise of half of it: the sum has 0.4 * sqrt(1.25)."""
    recipe = recipe_of(model__weight_std=0.4, prune__rounds=1, train__iterations=2)
    path = running.run(recipe, out=tmp_path).replicates[0].path
    (_, _, start), *_ = starts(path, Control(kind="noise", sigma=0.5), rounds=[1], trials=1)
    assert float(start.values["fc1.weight"].std()) == pytest.approx(0.4 * math.sqrt(1.25), rel=0.03)
    (_, _, start), *_ = starts(path, Control(kind="random-reinit"), rounds=[1], trials=1)
    assert float(start.values["fc1.weight"].std()) == pytest.approx(0.4, rel=0.03)


def test_noise_on_an_own_nets_values_is_in_units_of_their_spread(tmp_path, starts):
    """nn.Linear draws uniformly from +-1/sqrt(inputs); Glorot's spread would be more than twice as wide."""
    recipe = small_recipe("tests.training.ranks:own_of_one_dimension", prune__rounds=1, train__iterations=2)
    path = running.run(recipe, out=tmp_path).replicates[0].path
    theta0 = load_ticket(path / "search.ticket").rewind()["2.weight"]
    (_, _, start), *_ = starts(path, Control(kind="noise", sigma=0.5), rounds=[1], trials=1)
    noise = (start.values["2.weight"] - theta0).double()
    drawn = normal(0, 640, draw_key(recipe.seeds, NOISE, 1, 0)).reshape(10, 64)
    assert np.allclose(noise.numpy(), 0.5 * np.std(theta0.double().numpy()) * drawn, atol=1e-6)
    assert float(noise.std()) == pytest.approx(0.5 * (1 / 8) / math.sqrt(3), rel=0.15)


def test_noise_trains(run):
    found = branch(run, Control(kind="noise", sigma=1.0), rounds=[2], trials=2)
    assert [t["density"] for t in found.trials] == [found.trials[0]["density"]] * 2
    assert found.trials[0]["early_stop_validation_loss"] != found.trials[1]["early_stop_validation_loss"]
    assert found.to_json()["sigma"] == 1.0 and found.folder.name.startswith("noise-")


@pytest.mark.parametrize(("kind", "options", "said"), [
    ("noise", {}, "noise needs --sigma, a number greater than 0 such as 0.5"),
    ("noise", {"sigma": 0.0}, "noise needs --sigma, a number greater than 0 such as 0.5, got 0.0"),
    ("noise", {"sigma": float("nan")}, "noise needs --sigma, a number greater than 0 such as 0.5, got nan"),
    ("noise", {"sigma": 1.0, "reinit": True}, "--reinit goes with random-prune, one-shot, not with noise"),
    ("one-shot", {"sigma": 1.0}, "--sigma goes with noise, not with one-shot; leave it out"),
])  # fmt: skip
def test_noise_is_refused_where_it_makes_no_sense(kind, options, said):
    with pytest.raises(RecipeError) as caught:
        Control(kind=kind, **options)
    assert str(caught.value).startswith(said)
