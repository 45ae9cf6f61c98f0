"""Zhou et al. 2019, "Deconstructing Lottery Tickets" (arXiv 1905.01067): criteria, mask actions, supermasks.

Their nets see pixels / 255 and train for whole epochs; 24 rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastlth.experiments.figures.declare import Against, Arm, Figure, Stated, Table
from fastlth.experiments.supermasks.plan import Plan, settings

SOURCE = "Zhou et al. 2019, arXiv 1905.01067"
ROUNDS, REPLICATES = 24, 5

NETS = {
    "lenet-300-100": ("LeNet", "mnist", "55ep", "2000ep"),
    "conv-2": ("Conv-2", "cifar-10", "27ep", "600ep"),
    "conv-4": ("Conv-4", "cifar-10", "34ep", "1000ep"),
    "conv-6": ("Conv-6", "cifar-10", "40ep", "800ep"),
}
"""model -> panel, data set, length of training, length of learning a mask"""

CRITERIA = (
    "large_final", "magnitude_increase", "large_init_large_final", "movement", "large_init", "random",
    "small_init", "small_final", "small_init_small_final",
)  # fmt: skip
MASK_1 = {
    "rewound": "none", "redrawn": "random_reinit", "redrawn, signs kept": "signed_reinit",
    "reshuffled": "random_reshuffle", "reshuffled, signs kept": "signed_reshuffle",
    "constants": "rand_signed_constant", "constants, signs kept": "signed_constant",
}  # fmt: skip
MASK_0 = {
    "zero": "mask", "frozen at initial values": "freeze_init", "variant 1": "freeze_init_zero_mask",
    "variant 2": "freeze_init_zero_all",
}  # fmt: skip
MASKS = {
    "": Plan(method="one-shot"),
    "learned": Plan(method="learned"),
    "learned, signed constants": Plan(method="learned", signed_constant=True),
    "learned, rescaled": Plan(method="learned", rescale=True),
    "learned, rescaled, signed constants": Plan(method="learned", rescale=True, signed_constant=True),
}


def search(model: str, label: str, given: Mapping[str, Any], panel: str = "{}") -> Arm:
    """A search with the settings ``given``; ``{}`` in the panel's name stands for the net."""
    name, dataset, length, _ = NETS[model]
    return Arm(
        label=label, panel=panel.format(name), model=model, dataset=dataset, rounds=ROUNDS, replicates=REPLICATES,
        settings={"data.normalise": "unit", "train.iterations": length, **given}, small=model == "lenet-300-100",
    )  # fmt: skip


def mask(model: str, label: str, plan: Plan) -> Arm:
    """A supermask of a net: masks alone are learned, or taken in one shot after a training."""
    name, dataset, length, learning = NETS[model]
    given = settings(plan.method, model)
    return Arm(
        label=label, panel=name, model=model, dataset=dataset, replicates=4, supermask=plan,
        settings={**given, "train.iterations": length if plan.method == "one-shot" else learning},
        small=model == "lenet-300-100",
    )  # fmt: skip


def _stated() -> tuple[Stated, ...]:
    """The cells of the paper's table that a second source confirms."""
    cells = (
        ("LeNet", "one-shot, signed constants", 0.863), ("LeNet", "learned", 0.953),
        ("LeNet", "learned, rescaled, signed constants", 0.980),
        ("Conv-2", "learned, rescaled, signed constants", 0.660), ("Conv-2", "trained", 0.692),
        ("Conv-4", "learned", 0.654),
        ("Conv-4", "learned, rescaled, signed constants", 0.725), ("Conv-4", "trained", 0.754),
        ("Conv-6", "one-shot, signed constants", 0.410), ("Conv-6", "learned, rescaled, signed constants", 0.765),
        ("Conv-6", "trained", 0.783),
    )  # fmt: skip
    return tuple(Stated(panel=p, line=line, quantity="test_accuracy", value=value) for p, line, value in cells)


FIGURES = (
    Figure(
        name="zhou-criteria", what="nine criteria for what stays: accuracy at early stop against density",
        source=SOURCE, pictures=(Against("early_stop_test_accuracy"),),
        arms=tuple(search(model, c, {"prune.criterion": c}) for model in NETS for c in CRITERIA),
    ),
    Figure(
        name="zhou-actions", what="what kept weights start with (mask-1) and what pruned ones are kept at (mask-0)",
        source=SOURCE, pictures=(Against("early_stop_test_accuracy"),),
        arms=(
            *(search(model, label, {"prune.mask_1": action}, "{}, kept weights")
              for model in NETS for label, action in MASK_1.items()),
            *(search(model, label, {"prune.mask_0": action}, "{}, pruned weights")
              for model in NETS for label, action in MASK_0.items()),
        ),
    ),
    Figure(
        name="zhou-supermasks", what="accuracy of masks on nets whose weights are never trained", source=SOURCE,
        pictures=(Table("test_accuracy"),), stated=_stated(),
        arms=tuple(mask(model, label, plan) for model in NETS for label, plan in MASKS.items()),
        note="Beside the paper stand those of its numbers that a second source confirms.",
    ),
)  # fmt: skip
