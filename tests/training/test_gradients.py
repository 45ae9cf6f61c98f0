"""The gradient of the mean training loss, against one backward pass over the whole set in float64."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from fastlth.data.normalise import normalise, table
from fastlth.data.sources import Images
from fastlth.models import build, weight_names
from fastlth.training import gradients as module
from fastlth.training.gradients import gradients
from tests.helpers import assert_close_by_norm, assert_same_bits, random_source, small_recipe


def whole(recipe, images: Images, values, train: bool):
    model = build(recipe).double().train(train)
    model.load_state_dict(values)
    x = normalise(torch.from_numpy(images.pixels).permute(0, 3, 1, 2), table("digits", "mean-std"), torch.float32)
    F.cross_entropy(model(x.double()), torch.from_numpy(images.labels)).backward()
    parameters = dict(model.named_parameters())
    return {n: parameters[n].grad for n in weight_names(model)}


@pytest.mark.parametrize(("name", "batch_norm"), [("lenet-300-100", False), ("conv-2", False), ("conv-2", True)])
def test_it_is_that_of_the_whole_set(name, batch_norm, monkeypatch):
    recipe = small_recipe(name, "digits", model__batch_norm=batch_norm)
    images = random_source("digits", train=130).train
    if not batch_norm:
        monkeypatch.setattr(module, "BATCH", 40)  # in 4 parts of 33, 33, 32 and 32
    values = {n: t.clone() for n, t in build(recipe).state_dict().items()}
    before = {n: t.clone() for n, t in values.items()}
    found, wanted = gradients(recipe, images, values), whole(recipe, images, values, train=batch_norm)
    assert list(found) == list(wanted)
    for n in wanted:
        assert_close_by_norm(found[n].double(), wanted[n], 1e-5)
    assert_same_bits(values, before)
    assert_same_bits(found, gradients(recipe, images, values))


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_algorithms_are_those_that_the_recipe_asks_for(deterministic, monkeypatch):
    seen = []

    @contextmanager
    def algorithms(device, *, deterministic):
        seen.append((device.type, deterministic, "in"))
        yield
        seen.append((device.type, deterministic, "out"))

    def loss(*arguments, **options):
        seen.append("loss")
        return cross_entropy(*arguments, **options)

    cross_entropy = F.cross_entropy
    monkeypatch.setattr(module.host, "algorithms", algorithms)
    monkeypatch.setattr(module.F, "cross_entropy", loss)
    recipe = small_recipe(compute__deterministic=deterministic)
    gradients(recipe, random_source("digits", train=40).train, build(recipe).state_dict())
    assert seen == [("cpu", deterministic, "in"), "loss", ("cpu", deterministic, "out")]


def test_a_pruned_weight_has_a_gradient_too():
    """The criterion looks at kept weights alone; but that the net was masked shows in all of them."""
    recipe, images = small_recipe(), random_source("digits", train=40).train
    values = {n: t.clone() for n, t in build(recipe).state_dict().items()}
    one = gradients(recipe, images, values)
    values["fc1.weight"][::2] = 0.0
    other = gradients(recipe, images, values)
    assert (other["fc2.weight"] != one["fc2.weight"]).any()
