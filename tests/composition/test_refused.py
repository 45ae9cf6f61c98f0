"""Names and settings that are refused, with a suggestion; how --set reads values."""

from __future__ import annotations

import pytest

from fastlth import toml
from fastlth.catalogue import DATASETS, MODELS, OTHER_DATASETS, OTHER_MODELS
from fastlth.composition import compose, parse_setting
from fastlth.errors import RecipeError
from tests.composition.asking import config, of, refused


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


@pytest.mark.parametrize(("pair", "settings", "says"), [
    ("resnet-20 cifar-10", {"model.batch_norm": True}, "model.batch_norm must be left out for resnet-20, which always "
                                                       "has it, got True"),
    ("vgg19 cifar-10", {"model.batch_norm": False}, "model.batch_norm must be left out for vgg19, which always has it, "
                                                    "got False"),
    ("lenet-300-100 digits", {"model.norm_init": "uniform"}, "model.norm_init must be left out for lenet-300-100, "
                                                             "which has no batch norm here, got 'uniform'"),
])  # fmt: skip
def test_settings_that_would_do_nothing_are_refused(pair, settings, says):
    assert refused(*pair.split(), settings=settings) == says


def test_the_same_settings_where_they_act():
    for pair, settings in (
        ("conv-2 cifar-10", {"model.batch_norm": True, "model.norm_init": "uniform"}),
        ("lenet-300-100 digits", {"train.optimizer": "adamw", "train.betas": [0.5, 0.9], "train.eps": 0.1}),
        ("lenet-300-100 digits", {"train.iterations": 60, "schedule.milestones": [59], "schedule.gamma": 0.5,
                                  "schedule.warmup": 60}),
    ):  # fmt: skip
        assert compose(*pair.split(), settings=settings).recipe != compose(*pair.split()).recipe


@pytest.mark.parametrize("pair", ["vgg19 cifar-10", "resnet-20 cifar-10", "conv-2 cifar-10", "lenet-300-100 digits"])
def test_a_recipes_own_file_holds_all_settings_and_may_be_shortened(tmp_path, pair):
    whole = compose(*pair.split()).recipe
    path = config(tmp_path, toml.dumps(whole.to_dict()))
    assert compose(*pair.split(), config=path).recipe == whole
    assert compose(*pair.split(), config=path, settings={"train.iterations": 50}).recipe.train.iterations == 50


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
