"""Settings: what is refused and in which words, what the digest depends on, and the way to TOML and back."""

import copy
import dataclasses
import hashlib
import json
import tomllib
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlth import toml
from fastlth.catalogue import CRITERIA, DATASETS, MASK_0, MASK_1, MODELS, OTHER_DATASETS, OTHER_MODELS
from fastlth.composition import compose, preset_table
from fastlth.errors import RecipeError
from fastlth.recipe import FACTS, LAST_ROUND, SECTIONS, STREAMS, Recipe, SeedsSection, TrainSection, exact

Tables = dict[str, dict[str, Any]]

BASE: Tables = {
    "model": {"name": "conv-2"},
    "data": {"name": "cifar-10"},
    "train": {"iterations": 1_000, "batch_size": 60, "lr": 0.01, "optimizer": "sgd", "momentum": 0.9},
}


def tables(**changes: Any) -> Tables:
    """BASE with ``section__field=value`` changed."""
    made = copy.deepcopy(BASE)
    for name, value in changes.items():
        section, _, field = name.partition("__")
        made.setdefault(section, {})[field] = value
    return made


def recipe(**changes: Any) -> Recipe:
    return Recipe.from_dict(tables(**changes))


def refused(**changes: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe(**changes)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is refused: the message names the setting, what is allowed, and the value --------------------------------

NAN, INF = float("nan"), float("inf")

RULES = [
    ("model__name", "conv-3", "unknown model 'conv-3' (did you mean 'conv-6'?); choose one of: " + ", ".join(MODELS)
     + f", or {OTHER_MODELS}"),
    ("model__bias_init", "ones", "unknown model.bias_init 'ones'; choose one of: zero, uniform"),
    ("model__dropout", 1.0, "model.dropout must be in [0, 1), the share that is dropped, got 1.0"),
    ("model__dropout", -0.5, "model.dropout must be in [0, 1), the share that is dropped, got -0.5"),
    ("model__dropout", NAN, "model.dropout must be in [0, 1), the share that is dropped, got nan"),
    ("data__name", "cifar-1000", "unknown dataset 'cifar-1000' (did you mean 'cifar-100'?); choose one of: "
                                 + ", ".join(DATASETS) + f", or {OTHER_DATASETS}"),
    ("data__validation", 0, "data.validation must leave images to train on and to validate on (1 to 49999), got 0"),
    ("data__validation", -2, "data.validation must leave images to train on and to validate on (1 to 49999), got -2"),
    ("data__validation", 50_000, "data.validation must leave images to train on and to validate on (1 to 49999), "
                                 "got 50000"),
    ("data__normalise", "z", "unknown data.normalise 'z'; choose one of: mean-std, unit, half"),
    ("data__augment", "flip", "unknown data.augment 'flip' (did you mean 'flip-crop'?); "
                              "choose one of: none, flip-crop, lecode, resized-crop, photo-crop"),
    ("train__iterations", 0, "train.iterations must be at least 1, got 0"),
    ("train__batch_size", 0, "train.batch_size must be at least 1, got 0"),
    ("train__batch_size", 45_001, "train.batch_size must be at most the 45000 training images, got 45001"),
    ("train__lr", 0.0, "train.lr must be a finite number greater than 0, got 0.0"),
    ("train__lr", -0.1, "train.lr must be a finite number greater than 0, got -0.1"),
    ("train__lr", NAN, "train.lr must be a finite number greater than 0, got nan"),
    ("train__lr", INF, "train.lr must be a finite number greater than 0, got inf"),
    ("train__optimizer", "lion", "unknown train.optimizer 'lion'; choose one of: adam, adamw, sgd"),
    ("train__optimizer", "adam", "train.momentum must be 0 with optimizer adam, which has betas (--momentum 0, or "
                                "--set train.momentum=0), got 0.9"),
    ("train__optimizer", "adamw", "train.momentum must be 0 with optimizer adamw, which has betas (--momentum 0, or "
                                 "--set train.momentum=0), got 0.9"),
    ("train__betas", [0.5, 0.9], "train.betas must be left at (0.9, 0.999) with optimizer sgd, which has momentum, "
                                 "got (0.5, 0.9)"),
    ("train__eps", 0.1, "train.eps must be left at 1e-08 with optimizer sgd, which has momentum, got 0.1"),
    ("model__norm_init", "uniform", "model.norm_init must be left out for conv-2, which has no batch norm here, got "
                                    "'uniform'"),
    ("train__momentum", 1.0, "train.momentum must be in [0, 1), got 1.0"),
    ("train__momentum", -0.1, "train.momentum must be in [0, 1), got -0.1"),
    ("train__momentum", NAN, "train.momentum must be in [0, 1), got nan"),
    ("train__weight_decay", -1e-4, "train.weight_decay must be at least 0, got -0.0001"),
    ("train__weight_decay", INF, "train.weight_decay must be at least 0, got inf"),
    ("train__betas", [0.9, 1.0], "train.betas must be in [0, 1), got (0.9, 1.0)"),
    ("train__betas", [-0.1, 0.9], "train.betas must be in [0, 1), got (-0.1, 0.9)"),
    ("train__eps", 0.0, "train.eps must be in (0, 1), got 0.0"),
    ("train__eps", 1.0, "train.eps must be in (0, 1), got 1.0"),
    ("schedule__warmup", -1, "schedule.warmup must be at least 0, got -1"),
    ("schedule__milestones", [5, 3], "schedule.milestones must be increasing and positive, got [5, 3]"),
    ("schedule__milestones", [5, 5], "schedule.milestones must be increasing and positive, got [5, 5]"),
    ("schedule__milestones", [0, 5], "schedule.milestones must be increasing and positive, got [0, 5]"),
    ("schedule__gamma", 0.0, "schedule.gamma must be in (0, 1], got 0.0"),
    ("schedule__gamma", 1.5, "schedule.gamma must be in (0, 1], got 1.5"),
    ("prune__rounds", -1, "prune.rounds must be in 0 to 254, got -1"),
    ("prune__rounds", 255, "prune.rounds must be in 0 to 254, got 255"),
    ("prune__to_density", 0.0, "prune.to_density must be in (0, 1), got 0.0"),
    ("prune__to_density", 1.0, "prune.to_density must be in (0, 1), got 1.0"),
    ("prune__rate", 0.0, "prune.rate must be in (0, 1), the share removed per round, got 0.0"),
    ("prune__rate", 1.0, "prune.rate must be in (0, 1), the share removed per round, got 1.0"),
    ("prune__rate", 20.0, "prune.rate must be in (0, 1), the share removed per round, got 20.0"),
    ("prune__rate", NAN, "prune.rate must be in (0, 1), the share removed per round, got nan"),
    ("prune__scale", {"output": -0.5},
     "prune.scale.output must be at least 0 and, times prune.rate 0.2, below 1, got -0.5"),
    ("prune__scale", {"conv*": 0.5, "output": 5.0},
     "prune.scale.output must be at least 0 and, times prune.rate 0.2, below 1, got 5.0"),
    ("prune__scale", {"output": NAN},
     "prune.scale.output must be at least 0 and, times prune.rate 0.2, below 1, got nan"),
    ("prune__scale", {"output": INF},
     "prune.scale.output must be at least 0 and, times prune.rate 0.2, below 1, got inf"),
    ("prune__scope", "net", "unknown prune.scope 'net'; choose one of: layer, global"),
    ("prune__criterion", "largest", "unknown prune.criterion 'largest' (did you mean 'large_init'?); "
                                    "choose one of: " + ", ".join(CRITERIA)),
    ("prune__mask_1", "rewind", "unknown prune.mask_1 'rewind'; choose one of: " + ", ".join(MASK_1)),
    ("prune__mask_0", "zero", "unknown prune.mask_0 'zero'; choose one of: " + ", ".join(MASK_0)),
    ("prune__mask_1", "mask_init", "prune.mask_0 must be original with mask_1 mask_init, which trains the pruned "
                                   "weights from zero; every other action would freeze them, got 'mask'"),
    ("prune__formulas", "zhou", "unknown prune.formulas 'zhou'; choose one of: paper, code"),
    ("prune__formulas", "code", "prune.formulas must be paper with criterion large_final, of which paper and program "
                                "say the same, got 'code'"),
    ("prune__alpha", 0.0, "prune.alpha must be greater than 0, got 0.0"),
    ("prune__alpha", NAN, "prune.alpha must be greater than 0, got nan"),
    ("prune__alpha", 2.0, "prune.alpha must be 1 with criterion large_final, whose formula has no alpha, got 2.0"),
    ("prune__constant", 0.0, "prune.constant must be greater than 0, got 0.0"),
    ("prune__constant", 0.1, "prune.constant must be left out with mask_1 none; only the actions named constant use "
                             "it, got 0.1"),
    ("prune__rewind_to", -1, "prune.rewind_to must be at least 0, got -1"),
    ("prune__early_bird", 1.0, "prune.early_bird must be in [0, 1), a share of the kept weights, got 1.0"),
    ("prune__rewind_to", 1_000, "prune.rewind_to must be below train.iterations (1000), got 1000"),
    ("evaluate__every", 0, "evaluate.every must be at least 1, got 0"),
    ("evaluate__test", "never", "unknown evaluate.test 'never'; choose one of: minimum, always"),
    *((f"seeds__{s}", v, f"seeds.{s} must be in 0 to 2**32 - 1, got {v}")
      for s in ("base", *STREAMS) for v in (-1, 2**32)),
    ("compute__device", "gpu", "compute.device must be auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
    ("compute__device", "cuda:x", "compute.device must be auto, cpu, cuda, cuda:N or mps, got 'cuda:x'"),
    ("compute__device", "cuda:-1", "compute.device must be auto, cpu, cuda, cuda:N or mps, got 'cuda:-1'"),
    ("compute__device", "cpu:0", "compute.device must be auto, cpu, cuda, cuda:N or mps, got 'cpu:0'"),
    ("compute__device", "cuda:", "compute.device must be auto, cpu, cuda, cuda:N or mps, got 'cuda:'"),
    ("compute__precision", "fp16", "unknown compute.precision 'fp16' (did you mean 'bf16'?); "
                                   "choose one of: auto, fp32, bf16"),
    ("compute__compile", "yes", "unknown compute.compile 'yes'; choose one of: auto, on, off"),
    ("compute__channels_last", "1", "unknown compute.channels_last '1'; choose one of: auto, on, off"),
    ("compute__loader", "torch", "unknown compute.loader 'torch'; choose one of: auto, resident, ffcv, pillow"),
    ("compute__engine", "fast", "unknown compute.engine 'fast'; choose one of: auto, dense, sparse, graph"),
    ("compute__kernels", "cuda", "unknown compute.kernels 'cuda'; choose one of: auto, torch, triton"),
    ("compute__break_even", 1.5, "compute.break_even must be in 0 to 1, or -1 to have it measured, got 1.5"),
    ("compute__compact", -0.5, "compute.compact must be in 0 to 1, or -1 to have it measured, got -0.5"),
    ("compute__shifted", ["auto", "conv1.weight"],
     "compute.shifted must be auto alone or name gradients, got ['auto', 'conv1.weight']"),
    ("compute__threads", -1, "compute.threads must be in 0 to 4096, got -1"),
    ("compute__threads", 4_097, "compute.threads must be in 0 to 4096, got 4097"),
    ("store__theta0", "hash", "unknown store.theta0 'hash'; choose one of: stored, seed"),
    ("store__keep_weights", "first", "unknown store.keep_weights 'first'; choose one of: none, last, all"),
    ("store__save_every", 0.0, "store.save_every must be greater than 0, got 0.0"),
    ("store__save_every", NAN, "store.save_every must be greater than 0, got nan"),
    ("store__save_every", INF, "store.save_every must be greater than 0, got inf"),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "value", "message"), RULES, ids=[f"{s}={v}" for s, v, _ in RULES])
def test_a_value_that_is_not_allowed_is_refused_in_one_sentence(setting, value, message):
    assert refused(**{setting: value}) == message


def test_nesterov_needs_momentum():
    assert refused(train__nesterov=True, train__momentum=0.0) == (
        "train.nesterov must be false without train.momentum, got True"
    )


def test_colour_augmentation_needs_colour():
    said = refused(data__name="mnist", data__augment="lecode")
    assert said == "data.augment must be none or flip-crop for images without colour, got 'lecode'"


def test_a_seed_cannot_stand_for_weights_after_some_training():
    said = refused(store__theta0="seed", prune__rewind_to=10)
    assert said == "store.theta0 must be stored with prune.rewind_to 10, since a seed is theta0 only, got 'seed'"
    assert recipe(store__theta0="seed").store.theta0 == "seed"


def test_values_at_the_edge_are_allowed():
    made = recipe(
        data__validation=49_940, train__batch_size=60, **ADAM, train__betas=[0.0, 0.0],
        schedule__gamma=1.0, schedule__milestones=[1], prune__rounds=LAST_ROUND, prune__rate=0.999,
        prune__scale={"output": 1.001}, prune__rewind_to=999, seeds__base=2**32 - 1, seeds__init=0,
        compute__device="cuda:13", compute__threads=4_096,
    )  # fmt: skip
    assert (made.data.train_images, made.prune.rounds, made.seeds.base) == (60, 254, 2**32 - 1)
    assert recipe(prune__rounds=0).prune.rounds == 0


TYPES = [
    ("train__iterations", 1.5, "train.iterations must be a whole number, got 1.5"),
    ("train__iterations", True, "train.iterations must be a whole number, got True"),
    ("train__lr", "fast", "train.lr must be a number, got 'fast'"),
    ("train__lr", True, "train.lr must be a number, got True"),
    ("train__drop_last", 1, "train.drop_last must be true or false, got 1"),
    ("train__drop_last", "yes", "train.drop_last must be true or false, got 'yes'"),
    ("train__betas", 0.9, "train.betas must be a list of 2, got 0.9"),
    ("train__betas", ["a", "b"], "train.betas must be a number, got 'a'"),
    ("schedule__milestones", 5, "schedule.milestones must be a list, got 5"),
    ("schedule__milestones", [1.5], "schedule.milestones must be a whole number, got 1.5"),
    ("prune__scale", 0.5, "prune.scale must be a table, got 0.5"),
    ("prune__scale", {"output": "half"}, "prune.scale.output must be a number, got 'half'"),
    ("prune__to_density", "low", "prune.to_density must be a number, got 'low'"),
    ("seeds__init", 1.0, "seeds.init must be a whole number, got 1.0"),
    ("model__name", 2, "model.name must be a word, got 2"),
]


@pytest.mark.parametrize(("setting", "value", "message"), TYPES, ids=[f"{s}={v}" for s, v, _ in TYPES])
def test_a_value_of_another_kind_is_never_cast(setting, value, message):
    assert refused(**{setting: value}) == message


@pytest.mark.parametrize("betas", [[0.9], [0.9, 0.99, 0.999], []])
def test_a_list_of_the_wrong_length_says_how_long_it_must_be(betas):
    said = refused(train__betas=betas)
    assert "train.betas" in said
    assert repr(betas) in said
    assert "2" in said.replace(repr(betas), "") or "two" in said


def test_whole_numbers_are_numbers():
    made = recipe(train__lr=1, prune__scale={"output": 0})
    assert type(made.train.lr) is float
    assert type(made.prune.scale["output"]) is float


def test_unknown_names_suggest():
    assert refused(trian__lr=0.1).startswith("unknown section 'trian' (did you mean 'train'?); choose one of: model, ")
    assert refused(prune__rat=0.1).startswith("unknown setting 'prune.rat' (did you mean 'prune.rate'?); choose one of")


@pytest.mark.parametrize("name", ["model.name", "data.name", "train.iterations", "train.batch_size", "train.lr"])
def test_a_missing_setting_says_how_to_give_it(name):
    section, _, field = name.partition(".")
    without = tables()
    del without[section][field]
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(without)
    assert str(caught.value) == f"{name} is not set; give it with --set {name}=..."
    without.pop(section)
    with pytest.raises(RecipeError, match=f"^{section}\\..* is not set; give it with --set"):
        Recipe.from_dict(without)


# ---- small facts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "fraction"),
    [(0.1, (1, 10)), (0.29, (29, 100)), (1.2e-3, (3, 2500)), (1e-07, (1, 10**7)), (1, (1, 1))],
)
def test_exact_takes_a_decimal_as_it_is_written(value, fraction):
    assert exact(value) == Fraction(*fraction)


@pytest.mark.parametrize(
    ("images", "batch", "drop_last", "expected"),
    [(45_000, 64, True, 703), (45_000, 64, False, 704), (45_000, 60, True, 750), (45_000, 60, False, 750),
     (55_000, 60, True, 916), (55_000, 60, False, 917), (5, 5, True, 1)],
)  # fmt: skip
def test_iterations_per_epoch(images, batch, drop_last, expected):
    section = TrainSection(iterations=1, batch_size=batch, lr=0.1, drop_last=drop_last)
    assert section.iterations_per_epoch(images) == expected


def test_validation_has_the_default_of_its_data_set():
    assert {n: recipe(data__name=n).data.validation for n in DATASETS} == {
        "mnist": 5_000, "fashion-mnist": 5_000, "cifar-10": 5_000, "cifar-10a": 2_500, "cifar-10b": 2_500,
        "cifar-100": 5_000, "svhn": 5_000, "digits": 300,
    }  # fmt: skip


def test_names_become_canonical():
    assert recipe(data__name="cifar10") == recipe(data__name="cifar-10")
    assert recipe(prune__criterion="magnitude") == recipe(prune__criterion="large_final")


def test_streams_have_numbers_that_never_change():
    assert STREAMS == {"init": 1, "split": 2, "order": 3, "augment": 4, "prune": 5, "dropout": 6, "branch": 7}
    derived = SeedsSection(base=7)
    assert [derived.key(s) for s in STREAMS] == [(7, 1), (7, 2), (7, 3), (7, 4), (7, 5), (7, 6), (7, 7)]
    single = SeedsSection(base=7, order=0)
    assert [single.key(s) for s in STREAMS] == [(7, 1), (7, 2), (0, 3), (7, 4), (7, 5), (7, 6), (7, 7)]


def test_recipes_are_frozen():
    made = recipe()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.train = made.train
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.train.lr = 1.0


# ---- the digest ----------------------------------------------------------------------------------------------------

# Digests name run directories and are stored in tickets: a change here orphans every run that people have. New
# settings with a default, and new words for old settings, must not move them.
PAPER_DIGESTS = {
    "lenet-300-100 mnist": "c43be567d2539435c53e388f83bd06cb6620e3e3692fdeda10cfe953e1eee837",
    "conv-2 cifar-10": "4e2c0b8818a33d3d563d0486d233c6d25664f843cfd2a42fb7d288f5ebf1abeb",
    "conv-4 cifar-10": "db72ee89b521b6b5854008a453d1b7d5ad689f796a006fdced8bc142f2c8ff21",
    "conv-6 cifar-10": "57f03f370356803221f1140bf85fbbf3acb9def7345d529b594004de11f7b4d1",
    "vgg19 cifar-10": "2997fc996099d3f00f5ec5c9132f27ac0d725d02a9b7f3e6fe962f6fb2fda21b",
    "resnet-20 cifar-10": "d27e59fd73c613602bb61660dd4a397ed7b8f01b5d9786d154c11a08e13dd469",
    "vgg16 cifar-10": "155333fba3790d1f54872de6fa7a89d693c42fc552876df3e3e9ab77701bf8de",
}

# Another allowed value for every setting. A new setting belongs in here, and in WITHOUT if it is no part of the name.
OTHER: dict[str, Any] = {
    "model.name": "conv-4", "model.batch_norm": True, "model.bias_init": "uniform", "model.dropout": 0.5,
    "model.weight_init": "kaiming", "model.weight_std": 0.1, "model.norm_init": "uniform",
    "data.name": "mnist", "data.validation": 4_999, "data.normalise": "unit", "data.augment": "flip-crop",
    "train.iterations": 1_001, "train.batch_size": 61, "train.lr": 0.02, "train.momentum": 0.8,
    "train.nesterov": True, "train.weight_decay": 1e-4, "train.betas": [0.9, 0.99], "train.eps": 1e-7,
    "train.drop_last": False,
    "schedule.warmup": 1, "schedule.milestones": [500], "schedule.gamma": 0.2, "schedule.scale": False,
    "prune.rounds": 30, "prune.to_density": 0.05, "prune.rate": 0.3, "prune.scale": {"output": 0.5},
    "prune.scope": "global", "prune.rewind_to": 1,
    "prune.only": ["conv*"], "prune.never": ["output"],
    "prune.criterion": "movement", "prune.mask_1": "signed_reinit", "prune.mask_0": "freeze_init",
    "evaluate.every": 200, "evaluate.test": "always",
    "seeds.base": 1, "seeds.init": 1, "seeds.split": 1, "seeds.order": 1, "seeds.augment": 1, "seeds.prune": 1,
    "seeds.dropout": 1, "seeds.branch": 1,
    "compute.device": "cpu", "compute.precision": "fp32", "compute.compile": "off", "compute.channels_last": "off",
    "compute.loader": "resident", "compute.engine": "dense", "compute.threads": 1,
    "compute.kernels": "torch", "compute.deterministic": True,
    "compute.break_even": 0.5, "compute.compact": 0.5, "compute.shifted": ["conv1.weight"],
    "compute.kept": {"fc1": 0.5}, "compute.together": "alone",
    "store.save_every": 1.0, "store.theta0": "seed", "store.keep_weights": "last",
}  # fmt: skip
WITHOUT = {
    "prune.rounds", "prune.to_density", "seeds.base", "schedule.scale",
    "store.save_every", "store.theta0", "store.keep_weights",
}  # fmt: skip
# Other values of these do not go with BASE; tested by themselves.
ELSEWHERE = {
    "train.optimizer",
    "prune.early_bird",
    "prune.alpha",
    "prune.formulas",
    "prune.actions",
    "prune.reinit",
    "prune.constant",
} | {
    # of one's own nets and data alone
    "model.init",
    "model.content",
    "data.image_size",
    *(f"data.{fact}" for fact in FACTS),
}

ALL = [f"{section}.{f.name}" for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)]


# What must be there for a setting to act.
ADAM = {"train__optimizer": "adam", "train__momentum": 0.0}
BESIDE: dict[str, dict[str, Any]] = {
    "model.norm_init": {"model__batch_norm": True}, "train.betas": ADAM, "train.eps": ADAM,
}  # fmt: skip


def beside(name: str) -> Recipe:
    return recipe(**BESIDE.get(name, {}))


def changed(name: str) -> Recipe:
    return recipe(**BESIDE.get(name, {}), **{name.replace(".", "__"): OTHER[name]})


def test_every_setting_is_covered_here():
    assert set(ALL) == {*OTHER, *ELSEWHERE}
    assert set(ALL) >= WITHOUT


@pytest.mark.parametrize("name", OTHER)
def test_the_digest_changes_with_every_setting_but_prefixes_and_storage(name):
    one, other = beside(name), changed(name)
    assert one != other
    assert (one.digest == other.digest) == (name in WITHOUT)


def test_the_digest_changes_with_the_optimizer():
    assert len({recipe(train__momentum=0.0, train__optimizer=o).digest for o in ("sgd", "adam", "adamw")}) == 3


BOTH = {"prune__criterion": "large_init_large_final"}


def test_the_digest_changes_with_options_of_criteria_and_actions():
    one, constant = recipe(**BOTH), recipe(prune__mask_1="signed_constant")
    assert len({one.digest, recipe(**BOTH, prune__alpha=2.0).digest,
                recipe(**BOTH, prune__formulas="code").digest}) == 3  # fmt: skip
    assert len({constant.digest, recipe(prune__mask_1="signed_constant", prune__constant=0.1).digest,
                recipe(prune__mask_1="signed_constant", prune__actions="code").digest}) == 3  # fmt: skip
    drawn = {"prune__mask_1": "random_reinit", "prune__reinit": "draw"}
    assert recipe(**drawn).digest != recipe(prune__mask_1="random_reinit").digest


def test_no_two_changes_have_one_digest():
    digests = [changed(name).digest for name in OTHER if name not in WITHOUT]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("name", ALL)
def test_a_default_written_down_changes_no_digest(name):
    made = recipe()
    section, _, field = name.partition(".")
    value = made.to_dict()[section].get(field)
    assert recipe(**({} if value is None else {f"{section}__{field}": value})).digest == made.digest


def test_all_defaults_written_down_change_no_digest():
    assert Recipe.from_dict(recipe().to_dict()).digest == recipe().digest
    assert recipe(data__validation=5_000).digest == recipe(data__validation=-1).digest == recipe().digest


def test_the_digest_does_not_depend_on_the_order_of_sections_and_settings():
    backwards = {s: dict(reversed(v.items())) for s, v in reversed(tables().items())}
    assert Recipe.from_dict(backwards).digest == recipe().digest


def test_the_order_of_the_patterns_in_prune_scale_is_part_of_the_name():
    """The first match wins: "fc*" before "fc1" halves fc1's rate, after it fc1 is never pruned."""
    one = recipe(prune__scale={"fc*": 0.5, "fc1": 0.0})
    other = recipe(prune__scale={"fc1": 0.0, "fc*": 0.5})
    assert one.digest != other.digest


def test_a_whole_number_given_from_python_names_the_same_run():
    """Sections are made directly in Python; what recipe.toml says of them must lead back to the same digest."""
    made = recipe()
    made = dataclasses.replace(made, train=dataclasses.replace(made.train, lr=1))
    assert made.digest == recipe(train__lr=1.0).digest
    assert Recipe.from_dict(tomllib.loads(toml.dumps(made.to_dict()))).digest == made.digest


@pytest.mark.parametrize("pair", PAPER_DIGESTS)
def test_digests_of_the_paper_presets_never_change(pair):
    assert compose(*pair.split(), preset="paper").recipe.digest == PAPER_DIGESTS[pair]


def test_every_paper_preset_has_a_digest_here():
    assert preset_table("paper").keys() == PAPER_DIGESTS.keys()


def test_the_digest_is_that_of_the_canonical_text():
    """The definition, once by hand."""
    text = (
        '{"data":{"name":"cifar-10"},"model":{"name":"conv-2"},'
        '"train":{"batch_size":60,"iterations":1000,"lr":0.01,"momentum":0.9,"optimizer":"sgd"}}'
    )
    assert recipe().digest == hashlib.sha256(text.encode()).hexdigest()


# ---- to TOML and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHER)
def test_every_setting_survives_dict_json_and_toml(name):
    made = changed(name)
    for plain in (
        made.to_dict(), json.loads(json.dumps(made.to_dict())), tomllib.loads(toml.dumps(made.to_dict())),
    ):  # fmt: skip
        again = Recipe.from_dict(plain)
        assert again == made
        assert again.digest == made.digest


@pytest.mark.parametrize("preset", ["paper", "lecode", "fast"])
def test_every_preset_survives_toml(preset):
    for pair in preset_table(preset):
        made = compose(*pair.split(), preset=preset).recipe
        again = Recipe.from_dict(tomllib.loads(toml.dumps(made.to_dict())))
        assert again == made
        assert list(again.prune.scale) == list(made.prune.scale)  # the first match wins
        assert again.digest == made.digest


share = st.floats(0, 1, exclude_min=True, exclude_max=True)


@settings(deadline=None)
@given(
    lr=st.floats(0, 1e6, exclude_min=True), rate=share, density=share,
    scale=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.floats(0, 1), max_size=4),
    milestones=st.sets(st.integers(1, 10**9)).map(sorted), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_recipe_survives_toml(lr, rate, density, scale, milestones, seed):
    made = recipe(
        train__lr=lr, prune__rate=rate, prune__to_density=density, prune__scale=scale,
        schedule__milestones=milestones, seeds__prune=seed,
    )  # fmt: skip
    again = Recipe.from_dict(tomllib.loads(toml.dumps(made.to_dict()).encode().decode()))
    assert again == made
    assert list(again.prune.scale.items()) == list(made.prune.scale.items())
    assert again.digest == made.digest
