"""One supermask experiment with its files, in OUT/<model>-<dataset>-<digest8>/r<seed>/supermask/.

recipe.toml        what every ``auto`` became
dense/             the trained net that one-shot masks are read off, made once for all criteria
<label>/           the trained scores of a learned mask
<label>.json       the result
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fastlth.data.sources import Source, load_for
from fastlth.experiments.settled import settled
from fastlth.experiments.supermasks import one_shot
from fastlth.experiments.supermasks.net import SupermaskNet, supermask_engine, supermask_net
from fastlth.experiments.supermasks.plan import Plan, check
from fastlth.experiments.trial import Show, Start, Stop, Trial
from fastlth.models import build, state, weight_names
from fastlth.pruning import layer_rates
from fastlth.recipe import Recipe
from fastlth.store import atomic, strict_json
from fastlth.store.run import SUPERMASKS, parent_folder
from fastlth.training.engines.make import make_engine, make_splits
from fastlth.training.gradients import gradients


def supermask(
    recipe: Recipe, plan: Plan, *, out: str | Path = "runs", data_dir: str | Path | None = None,
    stopped: Stop = lambda: None, show: Show = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """The document of ``supermask --json``, also written beside the trained net or scores.

    The same call goes on where it stopped. Raises RecipeError, Stopped, DivergedError, RunLockedError.
    """
    check(recipe, plan)
    source = load_for(recipe.data, data_dir)
    folder = place(out, recipe)

    if plan.method == "one-shot":
        ready = settled(recipe, folder, lambda candidate: make_engine(candidate, source))
        found = _one_shot(ready, recipe.digest, plan, source, folder, stopped, show)
    else:
        ready = settled(recipe, folder, lambda candidate: supermask_engine(candidate, source, plan)[0])
        found = _trained(ready, recipe.digest, plan, source, folder, stopped, show)
    document = {
        "folder": str(folder), "model": recipe.model.name, "dataset": recipe.data.name, "method": plan.method,
        "recipe_digest": recipe.digest, "seed": recipe.seeds.base, **plan.options, **found,
    }  # fmt: skip
    atomic.write(folder / f"{plan.label}.json", strict_json.dumps(document).encode() + b"\n")
    return document


def place(out: str | Path, recipe: Recipe) -> Path:
    """The folder of all supermasks of a recipe and its seed."""
    return parent_folder(Path(out), recipe) / f"r{recipe.seeds.base}" / SUPERMASKS


def _one_shot(
    recipe: Recipe, digest: str, plan: Plan, source: Source, folder: Path, stopped: Stop, show: Show
) -> dict[str, Any]:
    net = build(recipe)
    theta = state(net)
    numbers = {n: i for i, n in enumerate(weight_names(net))}
    engine = make_engine(recipe, source)
    trial = Trial(folder / "dense", digest, 0)
    dense = {n: torch.ones(theta[n].shape, dtype=torch.bool) for n in layer_rates(numbers, recipe.prune)}
    result = trial.run(recipe, engine, lambda: Start(dense, theta, 0), keep=True, show=show, stopped=stopped)
    final = trial.trained(dense)
    show(f"the trained net: test accuracy {result['test_accuracy']:.2%}")
    images = make_splits(recipe, source)["train"]
    rows = []
    for power, masks in one_shot.one_shot_masks(recipe.prune, plan, theta, final, numbers, recipe.seeds.key("prune"),
                                                lambda: gradients(recipe, images, theta)):  # fmt: skip
        rows.append(one_shot.evaluated(engine, theta, plan.signed_constant_multiplier, power, masks))
    return {
        "seconds": result["seconds"], "trained_test_accuracy": result["test_accuracy"],
        "best": {which: one_shot.best(rows, which) for which in ("init", "signed_constant")}, "rows": rows,
    }  # fmt: skip


def _trained(
    recipe: Recipe, digest: str, plan: Plan, source: Source, folder: Path, stopped: Stop, show: Show
) -> dict[str, Any]:
    engine, net = supermask_engine(recipe, source, plan)
    trial = Trial(folder / plan.label, f"{digest} {plan.label}", 0)
    begin = Start({}, supermask_net(recipe, plan).state_dict(), 0)
    result = trial.run(recipe, engine, lambda: begin, keep=True, show=show, stopped=stopped)
    engine.rewind(trial.trained({}))

    random = plan.method == "learned" and not plan.rounded
    accuracies = []
    layers: dict[str, list[int]] = {}
    for sample in range(plan.samples if random else 1):
        net.sample.fill_(sample)
        accuracies.append(engine.evaluate("test").accuracy)
        for name, kept in _kept(net).items():
            layers.setdefault(name, []).append(kept)
    sizes = {n: s.numel() for n, s in zip(layers, net.scores, strict=True)}
    means = {n: fmean(counts) for n, counts in layers.items()}
    return {
        "iterations": recipe.train.iterations, "seconds": result["seconds"],
        "test_accuracy": fmean(accuracies), "test_accuracies": accuracies,
        "density": sum(means.values()) / sum(sizes.values()),
        "layers": [{"name": n, "size": sizes[n], "kept": means[n]} for n in means],
    }  # fmt: skip


@torch.no_grad()
def _kept(net: SupermaskNet) -> Mapping[str, int]:
    """Weights kept per layer by the mask of the present sample."""
    net.eval()
    masks = net.masks()
    net.train()
    return {n: int(m.sum()) for n, m in zip(net.weights, masks, strict=True)}
