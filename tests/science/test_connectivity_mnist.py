"""LeNet on MNIST is stable at initialisation, and two initialisations are not connected (Frankle et al. 2020)."""

from __future__ import annotations

import os

import pytest

from fastlth import running
from fastlth.composition import compose
from fastlth.experiments.connectivity import Plan, connectivity

pytestmark = [pytest.mark.science, pytest.mark.skipif(not os.environ.get("FASTLTH_DATA"), reason="no real MNIST")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The dense net of a 3,000-iteration search, mean/std input."""
    settings = {"prune.rounds": 0, "compute.device": "cpu", "compute.threads": 1}
    recipe = compose("lenet-300-100", "mnist", preset="fast", settings=settings).recipe
    return running.run(recipe, out=tmp_path_factory.mktemp("runs")).replicates[0].path


def test_two_data_orders_from_one_initialisation_stay_connected(run):
    (found,) = connectivity(run, Plan())["rounds"]
    print(f"same initialisation: {found['test_instability']:.2%} on test, {found['train_instability']:.2%} on training")
    assert len(found["alphas"]) == 30
    assert found["test_instability"] < 0.01 and found["train_instability"] < 0.01


def test_two_initialisations_do_not(run):
    (found,) = connectivity(run, Plan(different_init=True))["rounds"]
    print(f"two initialisations: {found['test_instability']:.2%} on test, {found['train_instability']:.2%} on training")
    assert found["test_instability"] > 0.05 and found["train_instability"] > 0.05
