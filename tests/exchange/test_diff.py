"""ticket diff: the numbers against a plain count."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from fastlth.composition import compose
from fastlth.errors import TicketError
from fastlth.exchange.diff import diff
from fastlth.store.ticket import Ticket, load
from tests.exchange.making import CONV, make_ticket
from tests.helpers import small_recipe


@pytest.fixture
def a(tmp_path: Path) -> Ticket:
    return make_ticket(tmp_path / "a.ticket")


def test_a_ticket_is_identical_to_itself(a: Ticket) -> None:
    document = diff(a, a)
    assert document["identical"] and document["theta0_identical"] and document["rounds"] == [4, 4]
    assert [layer["name"] for layer in document["layers"]] == ["fc1.weight", "fc2.weight", "output.weight"]
    for layer in document["layers"]:
        assert layer["rounds"] == [{"round": k, "jaccard": 1.0, "hamming": 0.0} for k in range(4)]
        assert layer["theta0_identical"] and layer["theta0_relative_difference"] == 0.0


def test_overlap_of_other_masks_and_another_seed(a: Ticket, tmp_path: Path) -> None:
    b = make_ticket(tmp_path / "b.ticket", small_recipe(seeds__base=9), seed=2)
    document = diff(a, b)
    assert not document["identical"] and not document["theta0_identical"]
    for layer in document["layers"]:
        name = layer["name"]
        for k, found in enumerate(layer["rounds"]):
            p, q = (set(np.flatnonzero(t.mask(k)[name])) for t in (a, b))
            assert found == {"round": k, "jaccard": len(p & q) / len(p | q),
                             "hamming": len(p ^ q) / a.pruned_at[name].size}  # fmt: skip
        x, y = a.rewind[name].astype(float), b.rewind[name].astype(float)
        norm = max(np.sqrt((x**2).sum()), np.sqrt((y**2).sum()))
        assert layer["theta0_relative_difference"] == pytest.approx(np.sqrt(((x - y) ** 2).sum()) / norm)
        assert not layer["theta0_identical"]
    assert diff(b, a)["layers"] == document["layers"], "it does not matter which one comes first"


def test_one_bit_of_a_bias_is_a_difference(a: Ticket) -> None:
    bias = a.rewind["fc1.bias"].copy()
    bias[0] = -0.0
    document = diff(a, dataclasses.replace(a, rewind={**a.rewind, "fc1.bias": bias}))
    assert not document["identical"] and not document["theta0_identical"]
    assert all(layer["theta0_identical"] for layer in document["layers"])


def test_more_rounds_are_a_difference_and_the_next_mask_is_none(a: Ticket) -> None:
    shorter = dataclasses.replace(a, rounds=a.rounds[:2])
    document = diff(a, shorter)
    assert not document["identical"] and document["rounds"] == [4, 2]
    assert all(len(layer["rounds"]) == 2 for layer in document["layers"])
    # the mask of the untrained next round is not compared
    none_next = {n: np.where(at == 4, 0, at).astype(np.uint8) for n, at in a.pruned_at.items()}
    assert diff(a, dataclasses.replace(a, pruned_at=none_next))["identical"]


def test_empty_masks_and_layers_that_only_one_may_prune(a: Ticket) -> None:
    gone = {**a.pruned_at, "fc1.weight": np.ones_like(a.pruned_at["fc1.weight"])}
    empty = dataclasses.replace(a, pruned_at=gone)
    assert diff(empty, empty)["layers"][0]["rounds"][1] == {"round": 1, "jaccard": 1.0, "hamming": 0.0}
    kept = a.mask(1)["fc1.weight"].mean()
    assert diff(a, empty)["layers"][0]["rounds"][1] == {"round": 1, "jaccard": 0.0, "hamming": pytest.approx(kept)}
    fewer = dataclasses.replace(a, pruned_at={n: at for n, at in a.pruned_at.items() if n != "output.weight"})
    output = diff(a, fewer)["layers"][-1]
    assert output["name"] == "output.weight" and output["rounds"][1]["jaccard"] == a.mask(1)["output.weight"].mean()


def test_values_that_are_not_finite_can_still_be_written_as_json(a: Ticket) -> None:
    weights = np.full_like(a.rewind["fc2.weight"], np.nan)
    document = diff(a, dataclasses.replace(a, rewind={**a.rewind, "fc2.weight": weights}))
    assert document["layers"][1]["theta0_relative_difference"] is None
    json.dumps(document, allow_nan=False)


def test_layers_come_in_the_order_of_the_net(tmp_path: Path) -> None:
    vgg = make_ticket(tmp_path / "a.ticket", compose("vgg19", "cifar-10").recipe, rounds=1)
    names = [layer["name"] for layer in diff(load(tmp_path / "a.ticket"), vgg)["layers"]]
    assert names == [f"conv{i}.weight" for i in range(1, 17)] + ["output.weight"]


def test_other_nets_are_refused(a: Ticket, tmp_path: Path) -> None:
    conv = make_ticket(tmp_path / "b.ticket", small_recipe(**CONV))
    with pytest.raises(TicketError, match=r"has fc1.weight \[300, 64\].*has fc1.weight \[256, 1024\].*the same net"):
        diff(a, conv)
    with pytest.raises(TicketError, match="has no conv1"):
        diff(dataclasses.replace(conv, rewind={n: v for n, v in conv.rewind.items() if n != "conv1.weight"}), conv)
