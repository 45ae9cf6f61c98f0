"""From what a person asks for to a recipe: presets against the papers, precedence, schedules, durations, errors."""

import math
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastlth import toml
from fastlth.catalogue import DATASETS, MODELS, OTHER_DATASETS, OTHER_MODELS
from fastlth.composition import PRESETS, Composed, adjust, compose, parse_setting, preset_table, presets_for
from fastlth.errors import RecipeError
from fastlth.recipe import Recipe, exact

DOCS = Path(__file__).resolve().parents[1] / "docs" / "presets.md"


def config(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(*pair: str, **arguments: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        compose(*pair, **arguments)
    assert caught.value.exit_code == 2
    return str(caught.value)


def of(recipe: Recipe, *names: str) -> tuple[Any, ...]:
    return tuple(getattr(getattr(recipe, s), f) for s, f in (n.split(".") for n in names))


# ---- presets: the numbers of Figure 2, and of lecode's table of hyper-parameters -----------------------------------

SETTINGS = ("train.iterations", "train.batch_size", "train.optimizer", "train.lr", "prune.rate", "prune.scale",
            "prune.scope")  # fmt: skip
HALF, CONV = {"output": 0.5}, {"conv*": 0.5, "output": 0.5}

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


# ---- precedence ----------------------------------------------------------------------------------------------------


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


# ---- schedules -----------------------------------------------------------------------------------------------------


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


# ---- durations -----------------------------------------------------------------------------------------------------


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


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("lenet300-100", "mnist"), "unknown model 'lenet300-100' (did you mean 'lenet-300-100'?); "
                                    f"choose one of: {', '.join(MODELS)}, or {OTHER_MODELS}"),
        (("vgg19", "cifar_10"), "unknown dataset 'cifar_10' (did you mean 'cifar-10'?); "
                                f"choose one of: {', '.join(DATASETS)}, or {OTHER_DATASETS}"),
        (("squeezenet", "mnist"), f"unknown model 'squeezenet'; choose one of: {', '.join(MODELS)}, or {OTHER_MODELS}"),
    ],
)  # fmt: skip
def test_unknown_models_and_data_sets_get_a_suggestion(arguments, said):
    assert refused(*arguments).replace(" (did you mean 'lenet-5'?)", "") == said


def test_unknown_presets_get_a_suggestion():
    said = refused("vgg19", "cifar-10", preset="papers")
    assert said == "unknown preset 'papers' (did you mean 'paper'?); choose one of: paper, paper-dropout, lecode, fast"


def test_unknown_settings_get_a_suggestion(tmp_path):
    assert "unknown setting 'prune.rat' (did you mean 'prune.rate'?)" in refused(
        "vgg19", "cifar-10", settings={"prune.rat": 0.1}
    )
    assert "unknown section 'prun' (did you mean 'prune'?)" in refused("vgg19", "cifar-10", settings={"prun.rate": 0.1})
    assert "unknown section 'prun' (did you mean 'prune'?)" in refused(
        "vgg19", "cifar-10", config=config(tmp_path, "[prun]\nrate = 0.1\n")
    )
    assert "unknown setting 'train.learning_rate'" in refused(
        "vgg19", "cifar-10", config=config(tmp_path, "[train]\nlearning_rate = 0.1\n")
    )


def test_a_pair_without_a_preset_says_exactly_what_it_needs(tmp_path):
    needed = {"train.iterations": 10, "train.batch_size": 20, "train.lr": 0.1}
    flags = {"train.iterations": "--iterations (or --epochs)", "train.batch_size": "--batch-size", "train.lr": "--lr"}
    start = "no preset covers vgg19 on mnist; give "
    assert refused("vgg19", "mnist") == start + ", ".join(flags.values())
    for name, flag in flags.items():
        others = {n: v for n, v in needed.items() if n != name}
        assert refused("vgg19", "mnist", settings=others) == start + flag
    composed = compose("vgg19", "mnist", settings=needed)
    assert (composed.preset, composed.verified, composed.notes) == (None, False, ())
    assert of(composed.recipe, *needed) == (10, 20, 0.1)
    from_file = config(tmp_path, '[train]\niterations = "2ep"\nbatch_size = 20\nlr = 0.1\n')
    assert compose("vgg19", "mnist", config=from_file).recipe.train.iterations == 2 * 2_750


def test_a_preset_that_does_not_cover_a_pair_names_those_that_do():
    assert refused("conv-2", "digits", preset="paper") == (
        "preset 'paper' does not cover conv-2 on digits; use --preset fast"
    )
    assert refused("lenet-5", "mnist", preset="paper").endswith("; use --preset fast or lecode")
    assert refused("vgg19", "mnist", preset="paper").endswith("; give the settings without --preset")


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"model.name": "conv-4"}, "model.name is 'conv-4' in the settings but 'conv-2' is asked for"),
        ({"data.name": "mnist"}, "data.name is 'mnist' in the settings but 'cifar-10' is asked for"),
        ({"data.name": 3}, "data.name is 3 in the settings but 'cifar-10' is asked for"),
        ({"data.name": ["mnist"]}, "data.name is ['mnist'] in the settings but 'cifar-10' is asked for"),
    ],
)  # fmt: skip
def test_names_that_contradict_each_other_are_refused(settings, start):
    assert refused("conv-2", "cifar-10", settings=settings).startswith(start)


def test_names_that_agree_are_fine():
    settings = {"model.name": "conv-2", "data.name": "cifar10"}
    assert compose("conv-2", "cifar-10", settings=settings).recipe == compose("conv-2", "cifar10").recipe


@pytest.mark.parametrize(
    "settings", [{"prune.rate": 0.3, "prune.rate.fc1": 0.1}, {"prune.scale": 0.5, "prune.scale.output": 0.5},
                 {"train.lr": 0.1, "train.lr.x": 1}],
)  # fmt: skip
def test_a_pattern_where_there_is_no_table_is_refused(settings):
    name = next(iter(settings))
    assert name in refused("lenet-300-100", "mnist", settings=settings)


def test_a_config_that_is_no_config_is_refused(tmp_path):
    missing = tmp_path / "missing.toml"
    assert refused("vgg19", "cifar-10", config=missing) == f"cannot read --config {missing}: No such file or directory"
    assert refused("vgg19", "cifar-10", config=tmp_path).startswith(f"cannot read --config {tmp_path}: ")
    path = config(tmp_path, "lr = ")
    assert refused("vgg19", "cifar-10", config=path).startswith(f"--config {path} is not TOML: ")
    path.write_bytes(b"\xff\xfe")
    assert refused("vgg19", "cifar-10", config=path).startswith(f"--config {path} is not TOML: ")
    loose = "'lr' stands outside a section; put it under [section]"
    assert refused("vgg19", "cifar-10", config=config(tmp_path, "lr = 0.1\n")) == f"--config {path}: {loose}"
    assert "stands outside a section" in refused("vgg19", "cifar-10", config=config(tmp_path, "[[train]]\nlr = 0.1\n"))


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("prune.rate=0.3", ("prune.rate", 0.3)),
        (" prune.rate = 0.3 ", ("prune.rate", 0.3)),
        ("train.lr=1e-3", ("train.lr", 1e-3)),
        ("train.drop_last=false", ("train.drop_last", False)),
        ("schedule.milestones=[1, 2]", ("schedule.milestones", [1, 2])),
        ('prune.scale={"conv*" = 0.5}', ("prune.scale", {"conv*": 0.5})),
        ("prune.scale.conv*=0.5", ("prune.scale.conv*", 0.5)),
        ('model.bias_init="zero"', ("model.bias_init", "zero")),
        ("prune.criterion=magnitude", ("prune.criterion", "magnitude")),
        ("compute.compile=on", ("compute.compile", "on")),
        ("compute.device=cuda:1", ("compute.device", "cuda:1")),
        ("train.iterations=2ep", ("train.iterations", "2ep")),
        ("data.name=", ("data.name", "")),
        ("a.b=c=d", ("a.b", "c=d")),
    ],
)
def test_set_takes_toml_values_and_bare_words(text, parsed):
    key, value = parse_setting(text)
    assert (key, value) == parsed
    assert type(value) is type(parsed[1])


@pytest.mark.parametrize("text", ["prune.rate", "rate=0.3", "=", ""])
def test_set_without_section_or_value_shows_how(text):
    with pytest.raises(RecipeError) as caught:
        parse_setting(text)
    assert str(caught.value) == f"--set takes section.field=value (for example prune.rate=0.3), got '{text}'"


# ---- a run's own recipe, and adjusting one -------------------------------------------------------------------------


def written(composed: Composed, folder: Path) -> Path:
    resolved = {"device": "cpu", "compile": "off", "threads": 2, "environment": {"torch": "9"}, "images": {"a b": 1.5}}
    return config(folder, toml.dumps({**composed.recipe.to_dict(), "resolved": resolved}))


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


# ---- docs/presets.md says what the presets say ---------------------------------------------------------------------

HEADER = ("model, data set", "iterations", "batch", "optimizer", "schedule", "rates", "scope", "rounds", "evaluate",
          "input", "batch norm", "biases")  # fmt: skip


def rate(recipe: Recipe, layer: str) -> str:
    factor = next((f for pattern, f in recipe.prune.scale.items() if fnmatchcase(layer, pattern)), 1.0)
    return f"{float(exact(recipe.prune.rate) * exact(factor)):g}"


def row(pair: str, preset: str) -> list[str]:
    """What docs/presets.md must say of one preset."""
    model, dataset = pair.split()
    recipe = compose(model, dataset, preset=preset).recipe
    train, schedule = recipe.train, recipe.schedule
    optimizer = f"{train.optimizer} {train.lr:g}"
    optimizer += f", momentum {train.momentum:g}" if train.momentum else ""
    optimizer += f", weight decay {train.weight_decay:g}" if train.weight_decay else ""
    steps = [f"{schedule.warmup:,}"] if schedule.warmup else []
    steps += [f"{m:,}" for m in schedule.milestones]
    per_epoch = train.iterations_per_epoch(recipe.data.train_images)
    epochs = f" ({train.iterations // per_epoch} epochs)" if train.iterations % per_epoch == 0 else ""
    deep = model.startswith(("vgg", "resnet"))
    layers = ("-" if model.startswith("lenet-300") else "conv1", "-" if deep else "fc1", "output")
    augment = "" if recipe.data.augment == "none" else f", {recipe.data.augment}"
    norm = "yes" if recipe.model.batch_norm or deep else "no"
    return [
        f"{model}, {dataset}", f"{train.iterations:,}{epochs}", str(train.batch_size), optimizer,
        "; ".join(steps) or "-", " / ".join("-" if n == "-" else rate(recipe, n) for n in layers),
        recipe.prune.scope, str(recipe.prune.rounds), str(recipe.evaluate.every),
        recipe.data.normalise + augment, norm, recipe.model.bias_init,
    ]  # fmt: skip


def rows(section: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_page_about_presets_is_true(preset):
    text = DOCS.read_text(encoding="utf-8")
    section = re.split(rf"^## {preset}$", text, flags=re.MULTILINE)[1].partition("\n## ")[0]
    header, _, *body = rows(section)
    assert header == list(HEADER)
    assert body == [row(pair, preset) for pair in preset_table(preset)]


def test_the_page_about_presets_is_true_of_the_counts_it_names():
    """lecode's epochs over 50,000 images, and over the 45,000 that are left to train on."""
    text = " ".join(DOCS.read_text(encoding="utf-8").split())
    vgg, conv_2 = (compose(m, "cifar-10", preset="lecode").recipe.train for m in ("vgg19", "conv-2"))
    theirs = 112 * math.ceil(50_000 / 64), 20 * math.ceil(50_000 / 60)
    assert f"VGG-19: {vgg.iterations:,}, not {theirs[0]:,}; Conv-2: {conv_2.iterations:,}, not {theirs[1]:,}" in text
