"""Schedules that scale with the iterations; iterations, epochs and other durations."""

from __future__ import annotations

import pytest

from fastlth.composition import compose
from tests.composition.asking import config, of, refused


def test_fewer_iterations_scale_warm_up_and_milestones_and_say_so():
    composed = compose("vgg19", "cifar-10", settings={"train.iterations": 11_248})
    assert of(composed.recipe, "schedule.warmup", "schedule.milestones") == (1_000, (5_624, 8_436))
    assert composed.notes == (
        "schedule.warmup 10000 -> 1000, scaled with train.iterations 112480 -> 11248",
        "schedule.milestones [56240, 84360] -> [5624, 8436], scaled with train.iterations 112480 -> 11248",
    )


def test_more_iterations_scale_too_and_epochs_like_iterations():
    composed = compose("vgg19", "cifar-10", settings={"train.iterations": "320ep"})
    assert of(composed.recipe, "schedule.warmup", "schedule.milestones") == (20_000, (112_480, 168_720))


def test_scaling_can_be_switched_off_and_is_no_part_of_the_name():
    settings = {"train.iterations": 90_000, "schedule.scale": False}
    composed = compose("vgg19", "cifar-10", settings=settings)
    assert of(composed.recipe, "schedule.warmup", "schedule.milestones") == (10_000, (56_240, 84_360))
    assert composed.notes == ()
    spelled_out = {"train.iterations": 90_000, "schedule.warmup": 10_000, "schedule.milestones": [56_240, 84_360]}
    assert compose("vgg19", "cifar-10", settings=spelled_out).recipe.digest == composed.recipe.digest


def test_what_is_asked_for_is_not_scaled(tmp_path):
    settings = {"train.iterations": 11_248, "schedule.warmup": 7}
    assert of(compose("vgg19", "cifar-10", settings=settings).recipe, "schedule.warmup", "schedule.milestones") == (
        7, (5_624, 8_436),
    )  # fmt: skip
    path = config(tmp_path, "[schedule]\nmilestones = [9]\n")
    composed = compose("vgg19", "cifar-10", config=path, settings={"train.iterations": 11_248})
    assert of(composed.recipe, "schedule.warmup", "schedule.milestones") == (1_000, (9,))


def test_the_same_number_of_iterations_scales_nothing():
    composed = compose("vgg19", "cifar-10", settings={"train.iterations": 112_480})
    assert composed.notes == ()
    assert composed.recipe == compose("vgg19", "cifar-10").recipe


def test_milestones_that_fall_together_become_one():
    composed = compose("vgg19", "cifar-10", settings={"train.iterations": 1})
    assert of(composed.recipe, "schedule.warmup", "schedule.milestones") == (0, (1,))


def test_a_preset_without_a_schedule_has_nothing_to_scale():
    composed = compose("lenet-300-100", "mnist", settings={"train.iterations": 5_000})
    assert of(composed.recipe, "schedule.warmup", "schedule.milestones") == (0, ())
    assert composed.notes == ()


@pytest.mark.parametrize(
    ("given", "expected"),
    [(7, 7), ("7", 7), ("7it", 7), (" 7 it ", 7), ("1ep", 703), ("2ep", 1_406), ("0.5ep", 352), ("2 ep", 1_406)],
)
def test_durations_become_iterations(given, expected):
    """Half of 703 is rounded to the even 352."""
    recipe = compose("vgg19", "cifar-10", settings={"train.iterations": given}).recipe
    assert recipe.train.iterations == expected


@pytest.mark.parametrize("given", ["", "ep", "two", "2 epochs", "1.5it", "1.5", "-2ep", "1e3", "2epit"])
def test_other_durations_are_refused(given):
    said = refused("vgg19", "cifar-10", settings={"prune.rewind_to": given})
    assert said == f"prune.rewind_to must be iterations (500, 500it) or epochs (2ep), got {given!r}"


@pytest.mark.parametrize(
    ("settings", "per_epoch"),
    [
        ({}, 703), ({"train.drop_last": False}, 704), ({"train.batch_size": 100}, 450), ({"data.validation": 1}, 781),
        ({"data.validation": 1, "train.drop_last": False}, 782),
        ({"data.validation": 49_900, "train.batch_size": 33}, 3),
    ],
)  # fmt: skip
def test_an_epoch_is_what_the_recipe_at_hand_makes_it(settings, per_epoch):
    recipe = compose("vgg19", "cifar-10", settings={**settings, "train.iterations": "3ep"}).recipe
    assert recipe.train.iterations == 3 * per_epoch


def test_warm_up_milestones_and_rewind_point_may_be_epochs_everywhere(tmp_path):
    path = config(tmp_path, '[schedule]\nwarmup = "1ep"\nmilestones = ["2ep", 9_000, "20ep"]\n')
    recipe = compose("vgg19", "cifar-10", config=path, settings={"prune.rewind_to": "2ep"}).recipe
    assert of(recipe, "schedule.warmup", "schedule.milestones") == (703, (1_406, 9_000, 14_060))
    assert recipe.prune.rewind_to == 1_406


def test_a_presets_epochs_follow_the_batch_size():
    recipe = compose("conv-2", "cifar-10", preset="lecode", settings={"train.batch_size": 64}).recipe
    assert recipe.train.iterations == 20 * 704


def test_epochs_and_iterations_make_the_same_name():
    one = compose("vgg19", "cifar-10", settings={"train.iterations": "2ep", "prune.rewind_to": "1ep"}).recipe
    other = compose("vgg19", "cifar-10", settings={"train.iterations": 1_406, "prune.rewind_to": "703it"}).recipe
    assert one.digest == other.digest


@pytest.mark.parametrize(("settings", "notes"), [
    ({"schedule.milestones": [5, 60, 70]}, ("schedule.milestones [60, 70] are not reached in 60 iterations",)),
    ({"schedule.warmup": 61}, ("schedule.warmup 61 does not end in 60 iterations",)),
    ({"schedule.gamma": 0.5}, ("schedule.gamma 0.5 does nothing without schedule.milestones",)),
    ({"schedule.milestones": [59], "schedule.gamma": 0.5, "schedule.warmup": 60}, ()),
    ({"schedule.milestones": [], "schedule.gamma": 0.1}, ()),
    ({"prune.criterion": "large_final_diff_sign_single", "prune.rate": 0.3},
     ("prune.rate 0.3 does nothing with criterion large_final_diff_sign_single, which prunes by signs alone",)),
    ({"prune.criterion": "large_final_diff_sign_single", "prune.rate": 0.2}, ()),  # as in a run's own recipe.toml
    ({"prune.criterion": "large_final_same_sign", "prune.rate": 0.3}, ()),
])  # fmt: skip
def test_what_comes_to_nothing_is_said(settings, notes):
    """And taken: a run's own settings, shortened, must make a recipe."""
    assert compose("lenet-300-100", "digits", settings={"train.iterations": 60, **settings}).notes == notes
