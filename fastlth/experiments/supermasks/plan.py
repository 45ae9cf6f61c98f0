"""What a supermask experiment is asked to do, and the settings each method starts from. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf
from typing import Any

from fastlth.catalogue import CRITERIA, SIGN_TESTS, model_name
from fastlth.errors import RecipeError, unknown
from fastlth.recipe import Recipe

# Which options a method takes.
OPTIONS = {
    "one-shot": ("criterion", "powers", "signed_constant_multiplier"),
    "learned": ("signed_constant", "signed_constant_multiplier", "rescale", "sigmoid_bias", "rounded", "samples"),
    "edge-popup": ("signed_constant", "signed_constant_multiplier", "rescale", "keep"),
}
METHODS = tuple(OPTIONS)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Raises RecipeError for an option that the method does not have, or a value that is not allowed."""

    method: str
    criterion: str = "large_final_same_sign"
    powers: int = 24
    """one-shot masks of 0 to this many prunings at once"""
    signed_constant: bool = False
    """weights become sign(w) * std(layer)"""
    signed_constant_multiplier: float = 1.0
    """signed constants are this many times std(layer)"""
    rescale: bool = False
    """learned: a layer's weights times size / kept of the step's mask; edge-popup: times sqrt(size / kept)"""
    sigmoid_bias: float = 0.0
    """initial score: a weight is kept with probability sigmoid(score)"""
    rounded: bool = False
    """keep where the probability is at least one half, instead of drawing"""
    samples: int = 10
    """masks drawn for the final accuracy, which is their mean"""
    keep: float = 0.5
    """share of each layer's weights that edge-popup keeps"""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(unknown("--method", self.method, METHODS))
        for f in fields(self)[1:]:
            if f.name not in OPTIONS[self.method] and getattr(self, f.name) != f.default:
                flag = f.name.replace("_", "-")
                others = " and ".join(m for m in METHODS if f.name in OPTIONS[m])
                reason = "which reports both" if f.name == "signed_constant" else "which has no use for it"
                raise RecipeError(f"--{flag} is an option of {others}, not of {self.method}, {reason}; leave it out")
        if self.criterion == "magnitude":
            object.__setattr__(self, "criterion", "large_final")
        if self.criterion not in CRITERIA:
            raise RecipeError(unknown("--criterion", self.criterion, CRITERIA))
        if not 0 <= self.powers <= 254:
            raise RecipeError(f"--powers must be in 0 to 254, got {self.powers}")
        if self.criterion in SIGN_TESTS and self.powers != Plan.__dataclass_fields__["powers"].default:
            raise RecipeError(f"--powers {self.powers} and --criterion {self.criterion} contradict each other: a sign "
                              "test gives one mask; leave out --powers")  # fmt: skip
        if not 0 < self.signed_constant_multiplier < inf:
            raise RecipeError("--signed-constant-multiplier must be greater than 0, got "
                              f"{self.signed_constant_multiplier:g}")  # fmt: skip
        if self.signed_constant_multiplier != 1 and self.method != "one-shot" and not self.signed_constant:
            raise RecipeError(f"--signed-constant-multiplier {self.signed_constant_multiplier:g} goes with "
                              "--signed-constant; give both")  # fmt: skip
        if not -80 <= self.sigmoid_bias <= 80:
            raise RecipeError(f"--sigmoid-bias must be in -80 to 80, got {self.sigmoid_bias:g}")
        if self.samples < 1:
            raise RecipeError(f"--samples must be at least 1, got {self.samples}")
        if self.rounded and self.samples != 10:
            raise RecipeError(f"--samples {self.samples} and --rounded contradict each other: rounding gives one mask")
        if not 0 < self.keep <= 1:
            raise RecipeError(f"--keep must be in (0, 1], got {self.keep:g}")

    @property
    def options(self) -> dict[str, Any]:
        """What the method was told, by the names of the fields."""
        return {name: getattr(self, name) for name in OPTIONS[self.method]}

    @property
    def label(self) -> str:
        """A short name, "learned-signed-constant-rescale", one per training: neither powers nor samples are in it."""
        parts = [self.method]
        for name in (n for n in OPTIONS[self.method] if n not in ("powers", "samples")):
            value, default = getattr(self, name), Plan.__dataclass_fields__[name].default
            if name == "criterion":
                parts.append(value)
            elif value is True:
                parts.append(name.replace("_", "-"))
            elif value != default:
                short = f"{value:g}"
                parts.append(f"{name.replace('_', '-')}{short if float(short) == value else repr(value)}")
        return "-".join(parts)


def settings(method: str, model: str) -> Mapping[str, Any]:
    """Settings of a recipe that a method starts from; what the user gives goes before them.

    Zhou et al. 2019 use pixels / 255; they learn masks by SGD with learning rate 100 (50 for conv-4, 20 for conv-6),
    momentum 0.9 and batch 250, for 2,000 epochs of MNIST where the default here is 20. Edge-popup: Ramanujan et al.
    2020, but with a constant learning rate.
    """
    always = {"data.normalise": "unit", "prune.rewind_to": 0}
    scores = {"train.optimizer": "sgd", "train.momentum": 0.9, "train.iterations": "20ep", "schedule.warmup": 0,
              "schedule.milestones": [], "evaluate.every": 220, **always,
              "compute.precision": "fp32", "compute.compile": "off"}  # fmt: skip
    if method == "learned":
        lr = {"conv-4": 50.0, "conv-6": 20.0}.get(model_name(model), 100.0)
        return {**scores, "train.lr": lr, "train.weight_decay": 0.0, "train.batch_size": 250}
    if method == "edge-popup":
        return {**scores, "train.lr": 0.1, "train.weight_decay": 1e-4, "train.batch_size": 128}
    return always


def check(recipe: Recipe, plan: Plan) -> None:
    """Raises RecipeError for settings that a supermask experiment cannot follow."""
    prune, one_shot = recipe.prune, plan.method == "one-shot"
    if prune.criterion not in ("large_final", plan.criterion if one_shot else "large_final"):
        raise RecipeError(f"prune.criterion must be left alone for supermasks, whose --criterion is {plan.criterion}; "
                          f"got {prune.criterion}")  # fmt: skip
    for name, least in (("rewind_to", 0), ("early_bird", 0.0)):
        if (value := getattr(prune, name)) != least:
            raise RecipeError(f"prune.{name} must be {least:g} for supermasks, which have one round, got {value:g}")
    if not prune.rewinds:
        raise RecipeError("prune.mask_1 and prune.mask_0 must be left alone for supermasks, which have "
                          f"--signed-constant and --rescale; got {prune.mask_1} and {prune.mask_0}")  # fmt: skip
    if recipe.model.dropout:
        raise RecipeError(f"model.dropout must be 0 for supermasks, which draw masks, got {recipe.model.dropout}")
    if not one_shot and recipe.compute.engine not in ("auto", "dense"):
        raise RecipeError(f"compute.engine must be auto or dense for --method {plan.method}, whose scores no other "
                          f"engine trains, got {recipe.compute.engine}")  # fmt: skip
    if recipe.compute.compile == "on":
        raise RecipeError("compute.compile must be off for supermasks, which make new weights at every step")
