"""docs/presets.md says what the presets say."""

from __future__ import annotations

import math
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from fastlth.composition import PRESETS, compose, preset_table
from fastlth.recipe import Recipe, exact

DOCS = Path(__file__).resolve().parents[2] / "docs" / "presets.md"
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
