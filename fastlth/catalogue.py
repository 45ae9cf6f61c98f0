"""Facts about the data sets and the names of the models, known without importing torch.

Sizes are needed before any file is read: epochs become iterations before a recipe gets its digest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fastlth import specs
from fastlth.errors import RecipeError, unknown


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """What is fixed about a data set. ``mean`` and ``std`` are of the training images in [0, 1]."""

    shape: tuple[int, int, int]
    """(channels, height, width)"""
    classes: int
    train: int
    """training images, the held-out ones included"""
    test: int
    validation: int
    """images held out of ``train`` by default (Frankle & Carbin, Figure 2: 5,000)"""
    mean: tuple[float, ...]
    std: tuple[float, ...]


DATASETS: dict[str, DatasetFacts] = {
    "mnist": DatasetFacts(
        shape=(1, 28, 28), classes=10, train=60_000, test=10_000, validation=5_000,
        mean=(0.1307,), std=(0.3081,),
    ),
    "cifar-10": DatasetFacts(
        shape=(3, 32, 32), classes=10, train=50_000, test=10_000, validation=5_000,
        mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616),
    ),
    # The halves of CIFAR-10's training images, 2,500 per class (Morcos et al. 2019): of each class the first 2,500 in
    # the order of the files are a, the others b. Both have all test images, and the whole set's mean and std.
    "cifar-10a": DatasetFacts(
        shape=(3, 32, 32), classes=10, train=25_000, test=10_000, validation=2_500,
        mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar-10b": DatasetFacts(
        shape=(3, 32, 32), classes=10, train=25_000, test=10_000, validation=2_500,
        mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar-100": DatasetFacts(
        shape=(3, 32, 32), classes=100, train=50_000, test=10_000, validation=5_000,
        mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762),
    ),
    "fashion-mnist": DatasetFacts(
        shape=(1, 28, 28), classes=10, train=60_000, test=10_000, validation=5_000,
        mean=(0.2860,), std=(0.3530,),
    ),
    "svhn": DatasetFacts(  # without its 531,131 extra images
        shape=(3, 32, 32), classes=10, train=73_257, test=26_032, validation=5_000,
        mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970),
    ),
    # 1,797 handwritten digits that ship inside scikit-learn; every fifth one is a test image.
    "digits": DatasetFacts(
        shape=(1, 8, 8), classes=10, train=1_437, test=360, validation=300,
        mean=(0.3053,), std=(0.3762,),
    ),
}  # fmt: skip

DATASET_ALIASES = {
    "cifar10": "cifar-10", "cifar10a": "cifar-10a", "cifar10b": "cifar-10b", "cifar100": "cifar-100",
    "fashionmnist": "fashion-mnist", "fmnist": "fashion-mnist",
}  # fmt: skip

MODELS = (
    "lenet-300-100", "lenet-5", "conv-2", "conv-4", "conv-6", "vgg11", "vgg13", "vgg16", "vgg19",
    "resnet-8", "resnet-20", "resnet-32", "resnet-56", "resnet-18",
)  # fmt: skip
MODEL_ALIASES = {
    **{f"vgg-{n}": f"vgg{n}" for n in (11, 13, 16, 19)}, **{f"resnet{n}": f"resnet-{n}" for n in (8, 20, 32, 56, 18)},
}  # fmt: skip
OTHER_MODELS = (
    "lenet-A-B with hidden layers of A and B units (1 to 9999), "
    "or your own net: package.module:function, torchvision:NAME or timm:NAME"
)
OTHER_DATASETS = "your own data: package.module:function or imagefolder:PATH"

# Zhou et al. 2019, by the names of their program; docs/criteria.md has the formulas.
CRITERIA = (
    "large_final", "small_final", "large_init", "small_init", "large_init_large_final", "small_init_small_final",
    "magnitude_increase", "movement", "random", "large_final_same_sign", "large_final_diff_sign",
    "magnitude_increase_same_sign", "magnitude_increase_diff_sign", "large_final_same_sign_single",
    "large_final_diff_sign_single", "snip", "grad",
)  # fmt: skip
SIGN_TESTS = ("large_final_same_sign_single", "large_final_diff_sign_single")
"""criteria that are the new mask by themselves and ask for no rate"""
UNTRAINED = ("large_init", "small_init", "random", "snip", "grad")
"""criteria that do not look at the weights a round ends with"""
MASK_1 = (
    "none", "random_reinit", "signed_reinit", "random_reshuffle", "signed_reshuffle", "signed_constant",
    "rand_signed_constant", "random_reinit_rescaling", "signed_reinit_rescaling", "signed_constant_rescaling",
    "rand_signed_constant_rescaling", "mask_init",
)  # fmt: skip
MASK_0 = (
    "mask", "original", "freeze_init", "freeze_reinit", "freeze_init_zero_mask", "freeze_init_zero_all",
    "freeze_init_zero_reshuffle", "freeze_init_zero_rev",
)  # fmt: skip
ACTIONS_VERSION = 1
"""Raised when any value changes that a round starts with under some action; tickets that need it name it."""


def dataset_name(name: str) -> str:
    """Canonical name of a data set, ours or one that ``specs`` can follow. Raises RecipeError for an unknown one."""
    canonical = DATASET_ALIASES.get(name.lower(), name.lower())
    if canonical in DATASETS:
        return canonical
    return _own("dataset", name, DATASETS, OTHER_DATASETS)


def model_name(name: str) -> str:
    """Canonical name of a model, ours or one that ``specs`` can follow. Raises RecipeError for an unknown one."""
    canonical = MODEL_ALIASES.get(name.lower(), name.lower())
    if canonical in MODELS or lenet_widths(canonical) is not None:
        return canonical
    return _own("model", name, MODELS, OTHER_MODELS)


def has_batch_norm(name: str) -> bool:
    """Whether a model of ``MODELS`` has batch norm in any case, asked for or not."""
    return name.startswith(("vgg", "resnet"))


def lenet_widths(name: str) -> tuple[int, int] | None:
    """(300, 100) of lenet-300-100: units of the two hidden layers; None if ``name`` is no such LeNet's."""
    match = re.fullmatch(r"lenet-([1-9][0-9]{0,3})-([1-9][0-9]{0,3})", name)
    return None if match is None else (int(match[1]), int(match[2]))


def _own(kind: str, name: str, ours: Iterable[str], others: str) -> str:
    group = specs.MODELS_GROUP if kind == "model" else specs.DATASETS_GROUP
    found = specs.canonical(name, group)
    if found is None:
        raise RecipeError(f"{unknown(kind, name, [*ours, *specs.registered(group)])}, or {others}")
    return found
