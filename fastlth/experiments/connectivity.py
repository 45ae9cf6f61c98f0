"""Linear mode connectivity: is the outcome of training settled at step k?

Two copies are trained from the same theta_k (and mask), each with its own data order and augmentation. Along

    W(alpha) = (1 - alpha) W_1 + alpha W_2,    alpha in [0, 1]

the classification error is measured; instability is its maximum minus the mean of the two ends, and a net is called
stable below 2 % (Frankle et al. 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", section 2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastlth import models
from fastlth.composition import iterations
from fastlth.data.normalise import normalise, table
from fastlth.errors import RecipeError
from fastlth.experiments.trial import Show, Start, Stop, Trial
from fastlth.experiments.workbench import Workbench
from fastlth.masks import Masks
from fastlth.models import build, loaded, skeleton
from fastlth.recipe import Recipe
from fastlth.store import atomic, strict_json
from fastlth.tickets import LoadedTicket
from fastlth.training import host
from fastlth.training.engines.make import make_engine, make_splits

STABLE = 0.02
"""error above the ends, as a fraction, below which a net is called stable"""

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared, and how finely. Raises RecipeError for what contradicts itself."""

    rounds: tuple[int, ...] | None = None
    """None: all finished ones"""
    at_iteration: int | str | None = None
    """k, or a text such as 1ep; None: where the search rewinds to"""
    different_init: bool = False
    """the second copy starts from another theta0: the negative control"""
    seeds: tuple[int, int] = (1, 2)
    """of data order and augmentation, one per copy; with different_init the second is also that of theta0"""
    points: int = 30
    batch_norm: str = "interpolate"
    """running statistics between the ends: interpolate them too, or recompute them on the training images"""
    train_images: int | None = None
    """how many training images the error is measured on; None: all"""
    whole: bool = False
    """the copies train for the whole schedule after step k, from its beginning, and not for what is left of it"""

    def __post_init__(self) -> None:
        if self.points < 3:
            raise RecipeError(f"--points must be at least 3, so that one lies between the ends, got {self.points}")
        if self.batch_norm not in ("interpolate", "recompute"):
            raise RecipeError(f"--batch-norm must be interpolate or recompute, got '{self.batch_norm}'")
        if self.train_images is not None and self.train_images < 1:
            raise RecipeError(f"--train-images must be at least 1, got {self.train_images}")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise RecipeError(f"--seeds must be in 0 to 2**32 - 1, got {seed}")
        if self.seeds[0] == self.seeds[1] and not self.different_init:
            raise RecipeError(f"--seeds {self.seeds[0]},{self.seeds[1]} makes two equal copies; give two that differ")


def connectivity(
    run: Path, plan: Plan, *, data_dir: str | Path | None = None, stopped: Stop = lambda: None,
    show: Show = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """The document of ``connectivity --json``. Each round's part is also written to RUN/connectivity, where the trained
    copies stay too, so that the same call uses them again. ``show`` gets events and sentences.

    Raises RecipeError and TicketError for what the run does not have, RunLockedError, Stopped, DivergedError.
    """
    bench = Workbench(run, data_dir, show, stopped)
    ticket = bench.finished()
    at = ticket.file.rewind_iteration if plan.at_iteration is None else plan.at_iteration
    k = iterations("--at-iteration", at, ticket.recipe)
    rounds = plan.rounds if plan.rounds is not None else tuple(range(len(ticket.rounds)))
    _check(ticket, plan, k, rounds)
    copies = _Copies(bench, ticket, plan, k)
    about = {
        "run": str(bench.path), "recipe_digest": ticket.recipe.digest, "iteration": k,
        "from_init": "different" if plan.different_init else "same", "seeds": list(plan.seeds),
        "batch_norm": plan.batch_norm, "train_images": plan.train_images, "whole_schedule": plan.whole,
    }  # fmt: skip
    results = []
    for round in rounds:
        result = copies.compare(round)
        name = f"round-{round}-it{k}-seeds{plan.seeds[0]}-{plan.seeds[1]}{_suffix(plan, k)}.json"
        atomic.write(copies.folder / name, strict_json.dumps({**about, "rounds": [result]}).encode() + b"\n")
        results.append(result)
    return {**about, "rounds": results}


def instability(errors: Sequence[float]) -> float:
    """The highest error along the line minus the mean of its ends."""
    return max(errors) - (errors[0] + errors[-1]) / 2


def line(first: State, second: State, points: int) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """(alpha, state) for ``points`` evenly spaced alphas from 0 to 1. The ends are the copies, bit for bit; what is
    not a float (batch counts) is the first copy's in between. Pruned weights, 0 in both, stay +0.0."""
    for i in range(points):
        alpha = i / (points - 1)
        if i in (0, points - 1):
            yield alpha, dict(second if i else first)
        else:
            yield alpha, {n: torch.lerp(a, second[n], alpha) if a.is_floating_point() else a for n, a in first.items()}


@torch.no_grad()
def recomputed(
    recipe: Recipe, state: State, pixels: NDArray[np.uint8], ask: Callable[[], None] = lambda: None
) -> dict[str, Tensor]:
    """``state`` with every batch norm's running statistics set to their plain mean over batches of ``pixels``
    uint8 [N, H, W, C], in order and not augmented. The recipe's batch size, on its device, in float32. A last
    batch of one image, which has no variance, is left out. ``ask`` is called before every batch."""
    model = loaded(recipe, state)
    compute, device = recipe.compute, torch.device(recipe.compute.device)
    model.to(device).eval()
    for norm in norms(model):
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # torch's way to say: a plain mean
    values = table(recipe.data.facts, recipe.data.normalise).to(device)
    with (
        host.settings(compute.threads or torch.get_num_threads()),
        host.algorithms(device, deterministic=compute.deterministic),
    ):
        for images in torch.split(torch.from_numpy(pixels), recipe.train.batch_size):
            if len(images) == 1 < len(pixels):
                continue
            ask()
            model(normalise(images.to(device).permute(0, 3, 1, 2), values))
    return models.state(model)


def norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Its batch norms, of any dimension, that keep running statistics."""
    every = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return [norm for norm in every if norm.track_running_stats]


def copy_name(k: int, seed: int, *, whole: bool = False) -> str:
    """The folder in RUN/connectivity of a copy that parts at step k and has its own data order; with ``whole`` it
    trains the whole schedule from there on."""
    return f"it{k}{_whole(whole, k)}-order{seed}"


def theta_name(k: int) -> str:
    """The folder in RUN/connectivity of the training that gives theta_k, where the search has another one."""
    return f"theta-{k}"


class _Copies:
    """The copies of one plan, and the line between them."""

    def __init__(self, bench: Workbench, ticket: LoadedTicket, plan: Plan, k: int) -> None:
        self._bench, self._ticket, self._plan, self._k = bench, ticket, plan, k
        self._recipe = bench.settle(bench.recipe, bench.path / "connectivity")
        self._theta: State | None = None
        self.folder = bench.path / "connectivity"

    def compare(self, round: int) -> dict[str, Any]:
        """Train both copies on a round's mask and go along the line between them: the round's entry in ``--json``."""
        masks, plan, density = self._ticket.mask(round), self._plan, self._ticket.file.density(round)
        states, scores, seconds = [], [], 0.0
        for copy, seed in enumerate(plan.seeds):
            theta, init = self._theta_of(copy)
            recipe = _with_seeds(self._recipe, order=seed, augment=seed, dropout=seed)
            name = copy_name(self._k, seed, whole=plan.whole) + init
            result, state = self._trained(name, round, recipe, masks, theta, first=0 if plan.whole else self._k)
            states.append(state)
            seconds += result["seconds"]
            scores.append({"seed": seed, "test_accuracy": result["test_accuracy"]})
            self._bench.show(f"round {round}, copy {copy + 1} of 2: test accuracy {result['test_accuracy']:.2%}")
        alphas, errors = self._errors(masks, *states)
        test, train = instability(errors["test"]), instability(errors["train"])
        self._bench.show(f"round {round}, density {density:.2%}: instability {test:.2%} on test and {train:.2%} on "
                         f"training images; {'stable' if test < STABLE else 'not stable'}")  # fmt: skip
        return {
            "round": round, "density": density, "copies": scores, "seconds": seconds, "alphas": alphas,
            "test_error": errors["test"], "train_error": errors["train"],
            "test_instability": test, "train_instability": train, "stable": test < STABLE,
        }  # fmt: skip

    def _theta_of(self, copy: int) -> tuple[State, str]:
        """theta_k of a copy, and what the name of its folder says of it."""
        if copy == 1 and self._plan.different_init:
            seed = self._plan.seeds[1]
            return models.state(build(_with_seeds(self._recipe, init=seed))), f"-init{seed}"
        if self._theta is None:
            self._theta = self._theta_k()
        return self._theta, ""

    def _theta_k(self) -> State:
        """The dense net of the search after k steps, made again where the ticket does not hold it."""
        k = self._k
        if k == self._ticket.file.rewind_iteration:
            return self._ticket.rewind()
        if k == 0:
            return self._bench.theta0()
        until_k = dataclasses.replace(  # the schedule stays that of the whole training
            self._recipe, train=dataclasses.replace(self._recipe.train, iterations=k),
            prune=dataclasses.replace(self._recipe.prune, rewind_to=0),
        )  # fmt: skip
        return self._trained(theta_name(k), 0, until_k, self._ticket.mask(0), self._bench.theta0())[1]

    def _trained(
        self, name: str, round: int, recipe: Recipe, masks: Masks, theta: State, first: int = 0
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Result and net of one training, from its folder where it is done."""
        trial = Trial(self.folder / name, f"{self._bench.recipe.digest} {name}", round)
        result = trial.result()
        if result is None:
            result = trial.run(recipe, make_engine(recipe, self._bench.source), lambda: Start(masks, theta, first),
                               keep=True, show=self._bench.show, stopped=self._bench.stopped)  # fmt: skip
        return result, trial.trained(masks)

    def _errors(self, masks: Masks, first: State, second: State) -> tuple[list[float], dict[str, list[float]]]:
        recipe, plan = self._recipe, self._plan
        engine = make_engine(recipe, self._bench.source)
        engine.set_masks(masks)
        alphas: list[float] = []
        errors: dict[str, list[float]] = {"train": [], "test": []}
        pixels = None
        if plan.batch_norm == "recompute":
            pixels = np.asarray(make_splits(recipe, self._bench.source)["train"].pixels)
        for alpha, state in line(first, second, plan.points):
            self._bench.ask()
            if pixels is not None and 0 < alpha < 1:
                state = recomputed(recipe, state, pixels, self._bench.ask)
            engine.rewind(state)
            alphas.append(alpha)
            errors["train"].append(1 - engine.evaluate("train", plan.train_images).accuracy)
            errors["test"].append(1 - engine.evaluate("test").accuracy)
        return alphas, errors


def _with_seeds(recipe: Recipe, **seeds: int) -> Recipe:
    return dataclasses.replace(recipe, seeds=dataclasses.replace(recipe.seeds, **seeds))


def _check(ticket: LoadedTicket, plan: Plan, k: int, rounds: Sequence[int]) -> None:
    prune = ticket.recipe.prune
    if not prune.rewinds:
        raise RecipeError("connectivity needs rounds that start with theta_k and keep pruned weights at zero; this "
                          f"run has mask_1 {prune.mask_1} and mask_0 {prune.mask_0}")  # fmt: skip
    last = ticket.recipe.train.iterations
    if not 0 <= k < last:
        raise RecipeError(f"--at-iteration must be in 0 to {last - 1}, before the end of training, got {k}")
    if plan.different_init and k and plan.at_iteration is not None:
        raise RecipeError(f"--at-iteration {plan.at_iteration} and --from-init different contradict each other: "
                          "two initialisations have no common theta_k; use --at-iteration 0")  # fmt: skip
    if plan.different_init and k:
        raise RecipeError(f"--from-init different needs --at-iteration 0: this run rewinds to iteration {k}, "
                          "and two initialisations have no common theta_k")  # fmt: skip
    own = ticket.recipe.seeds.key("init")[0]
    if plan.different_init and plan.seeds[1] == own:
        raise RecipeError(f"--seeds {plan.seeds[0]},{own}: with --from-init different the second seed must not be "
                          f"the run's own, {own}")  # fmt: skip
    images = ticket.recipe.data.train_images
    if plan.train_images is not None and plan.train_images > images:
        raise RecipeError(f"--train-images must be at most the {images:,} training images, got {plan.train_images}")
    if plan.batch_norm == "recompute" and not norms(skeleton(ticket.recipe)):
        raise RecipeError(f"--batch-norm recompute: {ticket.recipe.model.name} has no batch norm whose running "
                          "statistics could be recomputed; leave it out")  # fmt: skip
    for round in rounds:
        if not 0 <= round < len(ticket.rounds):
            raise RecipeError(f"this run has no round {round}; choose from 0 to {len(ticket.rounds) - 1}")


def _suffix(plan: Plan, k: int) -> str:
    different = "-different-init" if plan.different_init else ""
    recomputed = "-recompute" if plan.batch_norm == "recompute" else ""
    points = f"-points{plan.points}" if plan.points != Plan.points else ""
    images = f"-images{plan.train_images}" if plan.train_images is not None else ""
    return _whole(plan.whole, k) + different + recomputed + points + images


def _whole(whole: bool, k: int) -> str:
    return "-whole" if whole and k else ""  # from step 0 on, the whole schedule is what is left of it
