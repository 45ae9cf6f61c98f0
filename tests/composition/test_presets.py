"""Presets: the numbers of Figure 2, and of lecode's table of hyper-parameters."""

from __future__ import annotations

from typing import Any

import pytest

from fastlth.composition import PRESETS, adjust, compose, preset_table, presets_for
from tests.composition.asking import HALF, of, written

SETTINGS = ("train.iterations", "train.batch_size", "train.optimizer", "train.lr", "prune.rate", "prune.scale",
            "prune.scope")  # fmt: skip
CONV = {"conv*": 0.5, **HALF}

PAPER = {
    "lenet-300-100 mnist": (50_000, 60, "adam", 1.2e-3, 0.2, HALF, "layer"),
    "conv-2 cifar-10": (20_000, 60, "adam", 2e-4, 0.2, CONV, "layer"),
    "conv-4 cifar-10": (25_000, 60, "adam", 3e-4, 0.2, CONV, "layer"),
    "conv-6 cifar-10": (30_000, 60, "adam", 3e-4, 0.2, {"conv*": 0.75, "output": 0.5}, "layer"),
    "vgg19 cifar-10": (112_480, 64, "sgd", 0.1, 0.2, {"output": 0.0}, "global"),
    "resnet-20 cifar-10": (30_000, 128, "sgd", 0.03, 0.2, {"*shortcut": 0.0, "output": 0.0}, "global"),
    "vgg16 cifar-10": (63_000, 128, "sgd", 0.1, 0.2, {"output": 0.0}, "global"),
}
# Of those with batch norm, momentum 0.9 and weight decay 1e-4: warm-up, milestones, rewind point.
DEEP = {
    "vgg19 cifar-10": (10_000, (80 * 703, 120 * 703), 0),
    "resnet-20 cifar-10": (20_000, (20_000, 25_000), 0),
    "vgg16 cifar-10": (0, (32_000, 48_000), 1_000),
}
# 55,000 MNIST images make 917 batches of 60, 45,000 CIFAR-10 images 750 of 60 or 704 of 64.
LECODE = {
    "lenet-300-100 mnist": (50 * 917, 60, "adam", 1.2e-3, 0.2, HALF, "layer"),
    "lenet-5 mnist": (50 * 917, 60, "adam", 1.2e-3, 0.2, CONV, "layer"),
    "conv-2 cifar-10": (20 * 750, 60, "adam", 2e-4, 0.2, CONV, "layer"),
    "conv-4 cifar-10": (25 * 750, 60, "adam", 3e-4, 0.2, CONV, "layer"),
    "conv-6 cifar-10": (30 * 750, 60, "adam", 3e-4, 0.2, {"conv*": 0.75, "output": 0.5}, "layer"),
    "vgg19 cifar-10": (112 * 704, 64, "adam", 3e-4, 0.2, {"output": 0.0}, "layer"),
}


@pytest.mark.parametrize("pair", PAPER)
def test_paper_presets_are_the_papers(pair):
    """Figure 2 of Frankle & Carbin 2019; VGG-16 of Frankle et al. 2020."""
    recipe = compose(*pair.split()).recipe  # the default where a paper covers the pair
    assert of(recipe, *SETTINGS) == PAPER[pair]
    assert of(recipe, "train.drop_last", "data.validation", "evaluate.every") == (True, 5_000, 100)
    assert of(recipe, "prune.criterion", "schedule.gamma") == ("large_final", 0.1)
    assert of(recipe, "model.batch_norm", "model.bias_init", "data.normalise") == (False, "zero", "mean-std")
    open_lths = pair == "vgg16 cifar-10"
    assert of(recipe, "model.weight_init", "model.norm_init") == (
        ("kaiming", "uniform") if open_lths else ("glorot", "one")
    )
    deep = pair in DEEP
    assert recipe.data.augment == ("flip-crop" if deep else "none")
    assert of(recipe, "train.momentum", "train.weight_decay") == ((0.9, 1e-4) if deep else (0.0, 0.0))
    schedule = of(recipe, "schedule.warmup", "schedule.milestones", "prune.rewind_to")
    assert schedule == DEEP.get(pair, (0, (), 0))


def test_lenets_of_other_widths_are_trained_as_lenet_300_100_is():
    own = compose("lenet-300-100", "mnist").recipe
    other = compose("lenet-25-9", "mnist")
    assert other.preset == "paper"
    assert adjust(other.recipe, {"model.name": "lenet-300-100"}) == own
    assert compose("lenet-300-100", "digits").verified and not compose("lenet-900-300", "digits").verified
    assert presets_for("lenet-5", "digits") == []


def test_a_presets_rewind_point_is_scaled_and_a_tickets_is_not():
    composed = compose("vgg16", "cifar-10", settings={"train.iterations": 630})
    assert of(composed.recipe, "prune.rewind_to", "schedule.milestones") == (10, (320, 480))
    assert "prune.rewind_to 1000 -> 10, scaled with train.iterations 63000 -> 630" in composed.notes
    asked = compose("vgg16", "cifar-10", settings={"train.iterations": 630, "prune.rewind_to": 5}).recipe
    assert asked.prune.rewind_to == 5
    assert adjust(composed.recipe, {"train.iterations": 63}).prune.rewind_to == 10


@pytest.mark.parametrize(("alias", "name"), [("vgg-16", "vgg16"), ("vgg-19", "vgg19"), ("resnet20", "resnet-20")])
def test_other_spellings_are_the_same_recipe(alias, name, tmp_path):
    named = compose(name, "cifar-10")
    assert compose(alias, "cifar-10").recipe == named.recipe
    assert compose(alias, "cifar-10", config=written(named, tmp_path)).recipe == named.recipe
    assert compose(name, "cifar-10", settings={"model.name": alias}).recipe == named.recipe


def test_vgg19_trains_for_160_epochs_of_703_whole_batches():
    recipe = compose("vgg19", "cifar-10").recipe
    assert recipe.train.iterations_per_epoch(recipe.data.train_images) == 703
    assert recipe.train.iterations == 160 * 703 == 112_480
    assert compose("vgg19", "cifar-10", settings={"train.iterations": "160ep"}).recipe == recipe


@pytest.mark.parametrize("pair", LECODE)
def test_lecode_presets_are_lecodes(pair):
    recipe = compose(*pair.split(), preset="lecode").recipe
    assert of(recipe, *SETTINGS) == LECODE[pair]
    assert of(recipe, "train.drop_last", "train.weight_decay", "prune.rounds") == (False, 0.0, 19)
    assert of(recipe, "schedule.warmup", "schedule.milestones") == (0, ())
    assert recipe.model.bias_init == "uniform"
    assert recipe.model.batch_norm == (pair.split()[0] in ("lenet-5", "conv-2", "conv-4", "conv-6"))
    colour = pair.endswith("cifar-10")
    assert of(recipe, "data.augment", "data.normalise") == (("lecode", "half") if colour else ("none", "unit"))


def test_presets_cover_these_pairs_and_no_others():
    assert preset_table("paper").keys() == PAPER.keys()
    assert preset_table("lecode").keys() == LECODE.keys()
    assert preset_table("paper-dropout").keys() == {"conv-2 cifar-10", "conv-4 cifar-10", "conv-6 cifar-10"}
    assert preset_table("fast").keys() == {
        "lenet-300-100 digits", "lenet-300-100 mnist", "lenet-5 mnist", "lenet-5 cifar-10", "conv-2 digits",
        "conv-2 mnist", "conv-2 cifar-10", "conv-4 cifar-10", "conv-6 cifar-10", "vgg19 cifar-10", "vgg11 cifar-10",
        "vgg13 cifar-10", "vgg16 cifar-10", "resnet-8 cifar-10", "resnet-20 cifar-10", "resnet-32 cifar-10",
        "resnet-56 cifar-10", "resnet-18 cifar-10",
    }  # fmt: skip


@pytest.mark.parametrize(("model", "lr"), [("conv-2", 3e-4), ("conv-4", 2e-4), ("conv-6", 2e-4)])
def test_the_papers_dropout_runs_are_three_times_as_long(model, lr):
    paper = compose(model, "cifar-10").recipe
    dropout = compose(model, "cifar-10", preset="paper-dropout").recipe
    assert of(dropout, "model.dropout", "train.lr", "train.iterations") == (0.5, lr, 3 * paper.train.iterations)
    same = {"model.dropout": 0.0, "train.lr": paper.train.lr, "train.iterations": paper.train.iterations}
    assert adjust(dropout, same) == paper


@pytest.mark.parametrize(("preset", "pair"), [(p, pair) for p in PRESETS for pair in preset_table(p)])
def test_every_preset_makes_a_recipe_that_fits_its_model(preset, pair):
    from fastlth.models import skeleton, weight_names
    from fastlth.pruning import layer_rates

    recipe = compose(*pair.split(), preset=preset).recipe
    assert layer_rates(weight_names(skeleton(recipe)), recipe.prune)
    evaluations = recipe.train.iterations / recipe.evaluate.every
    assert evaluations >= 10  # enough of them to find an early-stop iteration


@pytest.mark.parametrize("pair", preset_table("fast"))
def test_fast_is_shorter_than_paper(pair):
    fast = compose(*pair.split(), preset="fast").recipe
    steps = fast.train.iterations * (fast.prune.rounds + 1)
    assert steps <= 80_000
    if pair in PAPER:
        paper = compose(*pair.split(), preset="paper").recipe
        assert steps * 5 < paper.train.iterations * (paper.prune.rounds + 1)
        assert of(fast, *SETTINGS[1:]) == of(paper, *SETTINGS[1:])


@pytest.mark.parametrize("model", ["vgg19", "vgg16", "resnet-20"])
def test_fast_keeps_the_proportions_of_the_papers_schedule(model):
    fast = compose(model, "cifar-10", preset="fast").recipe
    scaled = compose(model, "cifar-10", settings={"train.iterations": fast.train.iterations}).recipe
    assert (fast.schedule, fast.prune.rewind_to) == (scaled.schedule, scaled.prune.rewind_to)


@pytest.mark.parametrize(("of_one", "others"), [
    ("vgg16", ("vgg11", "vgg13")), ("resnet-20", ("resnet-8", "resnet-32", "resnet-56", "resnet-18")),
])  # fmt: skip
def test_fast_has_one_row_for_a_family(of_one, others):
    table = preset_table("fast")
    assert all(table[f"{model} cifar-10"] == table[f"{of_one} cifar-10"] for model in others)


def test_nothing_is_called_verified_without_a_result_and_nothing_changed_is():
    for pair in preset_table("fast"):
        assert compose(*pair.split(), preset="fast").verified == bool(preset_table("fast")[pair].get("verified"))
    assert not compose("lenet-300-100", "digits", settings={"train.lr": 2e-3}).verified


def test_verified_is_a_note_not_a_setting(monkeypatch):
    table = {"lenet-300-100 digits": {"verified": True, "train": {"iterations": 9, "batch_size": 9, "lr": 0.1}}}
    monkeypatch.setattr("fastlth.composition.preset_table", lambda preset: table if preset == "fast" else {})
    assert compose("lenet-300-100", "digits").verified
    assert not compose("lenet-300-100", "digits", settings={"seeds.base": 1}).verified


def test_the_default_preset_is_paper_then_fast_then_none(monkeypatch):
    def default(model: str, dataset: str, **settings: Any) -> str | None:
        return compose(model, dataset, settings={k.replace("__", "."): v for k, v in settings.items()}).preset

    assert default("conv-2", "cifar-10") == "paper"
    assert default("conv-2", "cifar10") == "paper"
    assert default("conv-2", "digits") == "fast"
    assert default("lenet-5", "mnist") == "fast"  # lecode covers it too, and is never the default
    assert default("conv-4", "mnist", train__iterations=9, train__batch_size=9, train__lr=0.1) is None
    assert presets_for("conv-2", "cifar-10") == ["paper", "fast", "lecode", "paper-dropout"]
    monkeypatch.setattr("fastlth.composition.presets_for", lambda *_: ["paper-dropout"])
    assert default("conv-2", "digits", train__iterations=9, train__batch_size=9, train__lr=0.1) is None
