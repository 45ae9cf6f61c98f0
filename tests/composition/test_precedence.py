"""Preset, config, set, flag: which wins, and a run's own recipe as config."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
from typer.testing import CliRunner

from fastlth.composition import adjust, compose, preset_table
from fastlth.errors import RecipeError
from fastlth.recipe import Recipe
from tests.composition.asking import HALF, config, of, refused, written


def test_settings_win_over_config_which_wins_over_the_preset(tmp_path):
    path = config(tmp_path, '[train]\nlr = 0.5\nbatch_size = 50\n[prune]\nscope = "global"\nscale = {}\n')
    plain = compose("lenet-300-100", "mnist").recipe
    middle = compose("lenet-300-100", "mnist", config=path).recipe
    above = compose("lenet-300-100", "mnist", config=path, settings={"train.lr": 0.25}).recipe
    names = ("train.lr", "train.batch_size", "train.iterations", "prune.scope", "prune.scale")
    assert of(plain, *names) == (1.2e-3, 60, 50_000, "layer", HALF)
    assert of(middle, *names) == (0.5, 50, 50_000, "global", {})
    assert of(above, *names) == (0.25, 50, 50_000, "global", {})


def test_flags_win_over_set_and_config(tmp_path, monkeypatch):
    """Through the command itself: --lr over --set over --config over the preset."""
    from fastlth.cli.main import app

    seen: list[Recipe] = []

    def run(recipe: Recipe, **_: Any) -> None:
        seen.append(recipe)
        raise RecipeError("enough")

    monkeypatch.setattr("fastlth.experiments.rewind_points.run", run)
    path = config(tmp_path, "[train]\nlr = 0.5\nbatch_size = 50\neps = 1e-4\n")
    arguments = ["find-ticket", "lenet-300-100", "mnist", "--config", str(path), "--out", str(tmp_path / "runs")]
    CliRunner().invoke(app, [*arguments, "--set", "train.lr=0.25", "--set", "train.batch_size=25", "--lr", "0.125"])
    assert [of(r, "train.lr", "train.batch_size", "train.eps", "train.iterations") for r in seen] == [
        (0.125, 25, 1e-4, 50_000)
    ]


def test_a_pattern_set_by_itself_leaves_the_presets_other_patterns():
    """prune.scale.output names one layer's factor; the convolutions keep the paper's half rate."""
    recipe = compose("conv-2", "cifar-10", settings={"prune.scale.output": 1.0}).recipe
    assert recipe.prune.scale == {"conv*": 0.5, "output": 1.0}


def test_a_new_pattern_set_by_itself_comes_before_the_presets_patterns():
    """The first match wins: conv1=0.1 would say nothing after conv*."""
    recipe = compose("conv-2", "cifar-10", settings={"prune.scale.conv1": 0.1}).recipe
    first = next(f for pattern, f in recipe.prune.scale.items() if fnmatchcase("conv1", pattern))
    assert (first, recipe.prune.scale.get("conv*"), recipe.prune.scale.get("output")) == (0.1, 0.5, 0.5)


def test_a_whole_scale_replaces_the_presets():
    recipe = compose("conv-2", "cifar-10", settings={"prune.scale": {"output": 1.0}}).recipe
    assert recipe.prune.scale == {"output": 1.0}


def test_patterns_set_one_by_one_come_together():
    recipe = compose("lenet-300-100", "digits", settings={"prune.scale.fc1": 0.25, "prune.scale.output": 0.75}).recipe
    assert recipe.prune.scale == {"fc1": 0.25, "output": 0.75}


@pytest.mark.parametrize(
    ("pair", "preset", "settings"),
    [
        ("vgg19 cifar-10", "paper", {}),
        ("vgg19 cifar-10", "fast", {"train.iterations": 999, "prune.rewind_to": "1it"}),  # read with paper as the base
        ("lenet-5 mnist", "lecode", {}),
        ("conv-2 cifar-10", "lecode", {"prune.scale": {}, "compute.threads": 1, "seeds.order": 4}),
        ("conv-4 digits", None, {"train.iterations": "3ep", "train.batch_size": 20, "train.lr": 0.1}),
    ],
)
def test_a_runs_recipe_works_as_config_and_gives_the_same_run(tmp_path, pair, preset, settings):
    composed = compose(*pair.split(), preset=preset, settings=settings)
    again = compose(*pair.split(), config=written(composed, tmp_path))
    assert again.recipe == composed.recipe
    assert again.recipe.digest == composed.recipe.digest


def test_a_runs_recipe_for_another_pair_is_refused(tmp_path):
    path = written(compose("lenet-300-100", "mnist"), tmp_path)
    assert refused("lenet-300-100", "digits", config=path).startswith("data.name is 'mnist' in the settings")
    assert refused("lenet-5", "mnist", config=path).startswith("model.name is 'lenet-300-100' in the settings")


def test_adjusting_changes_what_is_named_and_scales_the_schedule():
    recipe = compose("vgg19", "cifar-10").recipe
    changed = adjust(recipe, {"train.iterations": "16ep", "prune.rounds": 3})
    assert of(changed, "train.iterations", "prune.rounds") == (11_248, 3)
    assert of(changed, "schedule.warmup", "schedule.milestones") == (1_000, (5_624, 8_436))
    assert adjust(recipe, {}) == recipe
    assert recipe == compose("vgg19", "cifar-10").recipe
    with pytest.raises(RecipeError, match=r"unknown setting 'train\.lrr' \(did you mean 'train\.lr'\?\)"):
        adjust(recipe, {"train.lrr": 1.0})


def test_composing_leaves_the_settings_it_was_given_as_they_are():
    settings = {"prune.scale": {"output": 1.0}, "prune.scale.fc1": 0.5, "schedule.milestones": ["1ep"]}
    before = repr(settings)
    compose("lenet-300-100", "mnist", settings=settings)
    assert repr(settings) == before


def test_composing_writes_nothing(tmp_path, monkeypatch):
    path = config(tmp_path, "[prune]\nrate = 0.3\n")
    monkeypatch.chdir(tmp_path)
    compose("lenet-300-100", "mnist", config=path)
    for wrong in ({"prune.rate": 2.0}, {"nothing.at_all": 1}, {"prune.rewind_to": "x"}):
        refused("lenet-300-100", "mnist", config=path, settings=wrong)
    assert [p.name for p in tmp_path.rglob("*")] == ["config.toml"]
    assert path.read_text() == "[prune]\nrate = 0.3\n"


def test_presets_are_read_anew_every_time():
    preset_table("paper")["vgg19 cifar-10"]["train"]["lr"] = 99.0
    compose("vgg19", "cifar-10").recipe.prune.scale["conv1"] = 99.0
    assert of(compose("vgg19", "cifar-10").recipe, "train.lr", "prune.scale") == (0.1, {"output": 0.0})
