"""The lottery: train, prune, rewind, repeat. A generator of events that writes nothing.

Who consumes the events writes metrics, saves tickets and shows progress; see ``running.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlth import masks as mask_tools
from fastlth.composition import with_own
from fastlth.data.sources import Source, load_for
from fastlth.errors import DivergedError
from fastlth.pruning import Gradients, actions, layer_rates, prune
from fastlth.recipe import ComputeSection, Recipe
from fastlth.store.run import State
from fastlth.store.ticket import Ticket
from fastlth.training.early_bird import EarlyBird, MaskDrawn
from fastlth.training.engines.base import Engine
from fastlth.training.engines.make import make_engine, make_splits
from fastlth.training.gradients import gradients
from fastlth.training.resolve import resolve
from fastlth.training.trainer import ChunkDone, Evaluated, Progress, train

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class RoundStarted:
    """A round begins, or goes on. Counts and density (kept / all weights) are those it trains with."""

    round: int
    kept: int
    prunable: int
    density: float
    iteration: int
    """steps already done in this round: 0, the rewind point, or where a stopped round goes on"""


@dataclass(frozen=True)
class InRound:
    """An evaluation or a safe point. ``state()`` copies all that a resume needs; call it before the next event."""

    round: int
    event: Evaluated | MaskDrawn | ChunkDone
    state: Callable[[], State]


@dataclass(frozen=True)
class RoundFinished:
    """``result`` is the round's entry in ``find-ticket --json``; ``ticket`` holds everything found so far."""

    round: int
    result: dict[str, Any]
    ticket: Ticket
    trained: Callable[[], Arrays]
    """copies the weights as the round left them; call it before the next event"""


@dataclass(frozen=True)
class Said:
    """Something that the engine had to do otherwise; the search goes on."""

    text: str


Event = RoundStarted | InRound | RoundFinished | Said


def find_tickets(
    recipe: Recipe, source: Source | None = None, compute: ComputeSection | None = None,
    *, ticket: Ticket | None = None, state: State | None = None, engine: Engine | None = None,
    model: str | Callable[..., Any] | None = None, data: str | Callable[..., Any] | None = None,
) -> Iterator[Event]:  # fmt: skip
    """Search to the recipe's last round, or to its target density.

    ``source`` is the recipe's data set, loaded where not given; ``compute`` is the recipe's section without ``auto``,
    resolved where not given. With ``ticket`` (and ``state``, if a round was under way) the search goes on from there,
    bit for bit as if never stopped. ``engine`` is one made already for this recipe and ``compute``; ``model`` and
    ``data`` take the place of the recipe's, as in ``run``. Raises DivergedError if a loss is not finite.
    """
    recipe = with_own(recipe, model, data)
    images = source or load_for(recipe.data)
    compute = compute or resolve(recipe, lambda candidate: make_engine(candidate, images)).compute
    settled = dataclasses.replace(recipe, compute=compute)
    engine = engine or make_engine(settled, images)
    weights = {n: engine.weights()[n] for n in engine.weight_names}
    numbers = {n: i for i, n in enumerate(weights)}
    all_weights = sum(w.numel() for w in weights.values())
    prunable = {n: weights[n] for n in layer_rates(weights, recipe.prune)}

    rewind = _arrays(engine.weights())  # theta0, until round 0 passes the rewind point
    pruned_at = {n: np.zeros(w.shape, np.uint8) for n, w in prunable.items()}
    zero_from = {n: torch.zeros(w.shape, dtype=torch.uint8) for n, w in prunable.items() if recipe.prune.zeroes}
    key = recipe.seeds.key("prune")
    results: list[Mapping[str, Any]] = []
    if ticket is not None:
        rewind, results = dict(ticket.rewind), list(ticket.rounds)
        pruned_at = {n: at.copy() for n, at in ticket.pruned_at.items()}
        zero_from = _tensors(ticket.fill)
    masks = {n: torch.from_numpy(pruned_at[n] == 0).to(w.device) for n, w in prunable.items()}

    while not over(recipe, results):
        round = len(results)
        progress = Progress(recipe.prune.rewind_to if round else 0)
        start = actions.start(recipe.prune, _tensors(rewind), masks, zero_from, numbers=numbers, round=round, key=key)
        engine.set_masks(mask_tools.full(masks) if recipe.prune.trains_pruned else masks)
        engine.rewind(start)
        bird = None
        if recipe.prune.early_bird:
            draw = functools.partial(prune, recipe.prune, masks, start, numbers=numbers, round=round + 1, key=key,
                                     gradients=_gradients(settled, images, start))  # fmt: skip
            bird = EarlyBird(recipe.prune.early_bird, recipe.train.iterations_per_epoch(recipe.data.train_images),
                             masks, draw, not_before=recipe.prune.rewind_to)  # fmt: skip
        if state is not None:
            if bird is not None:
                bird.load_state(state.arrays)
            engine.load_state(_tensors(state.arrays))
            progress = Progress.from_json(state.info["progress"])
            rewind = _with_prefix("rewind/", state.arrays) or rewind
            state = None
        kept = mask_tools.kept(masks)
        unpruned = all_weights - sum(w.numel() for w in prunable.values())
        density = (kept + unpruned) / all_weights
        yield RoundStarted(round, kept, all_weights - unpruned, density, progress.iteration)
        yield from _said(engine)

        for event in _training(engine, recipe, progress, round, bird):
            if round == 0 and recipe.prune.rewind_to and event == ChunkDone(recipe.prune.rewind_to):
                rewind = _arrays(engine.weights())
            yield InRound(round, event, functools.partial(_state, engine, progress, round, recipe, rewind, bird))
            yield from _said(engine)

        initial = start if round else _tensors(rewind)  # theta_k also where round 0 began earlier
        new = prune(recipe.prune, masks, initial, engine.weights(), numbers=numbers, round=round + 1, key=key,
                    gradients=_gradients(settled, images, initial))  # fmt: skip
        zero_from = actions.zeroed(recipe.prune, zero_from, masks, new, initial, engine.weights(),
                                   numbers=numbers, round=round + 1, key=key)  # fmt: skip
        for name, mask in masks.items():
            pruned_at[name][(mask & ~new[name]).cpu().numpy()] = round + 1
        masks = new
        result = round_result(engine, recipe, progress, round, density, kept)
        results.append(result)
        found = Ticket(
            recipe=recipe, resolved={}, rewind=rewind, rewind_iteration=recipe.prune.rewind_to,
            pruned_at={n: at.copy() for n, at in pruned_at.items()}, fill=_arrays(zero_from), rounds=tuple(results),
            all_weights=all_weights,
        )  # fmt: skip
        yield RoundFinished(round, result, found, lambda: _arrays(engine.weights()))


def asked(recipe: Recipe, results: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Of a search's rounds those that the recipe asks for; another time it may have been asked for more."""
    return results[: recipe.prune.asked([r["density"] for r in results])]


def over(recipe: Recipe, results: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last round, or one at or below the target density, is done."""
    return len(results) >= recipe.prune.asked([r["density"] for r in results])


def winning_round(replicates: Sequence[Sequence[Mapping[str, Any]]]) -> int | None:
    """The sparsest round (not the dense one) that is no worse and no slower than the dense round, or None.

    Validation accuracy at early stop must be at least round 0's and the early-stop iteration no later, as means
    over the replicates: tickets are chosen on validation images and reported on test images. Rounds that were not
    measured, as in an imported ticket, win nothing.
    """

    def mean(field: str, round: int) -> float:
        values = [r[round][field] for r in replicates]
        return math.nan if None in values else fmean(values)  # a comparison with NaN is false

    accuracy, iteration = "early_stop_validation_accuracy", "early_stop_iteration"
    winners = [
        k
        for k in range(1, min(map(len, replicates)))
        if mean(accuracy, k) >= mean(accuracy, 0) and mean(iteration, k) <= mean(iteration, 0)
    ]
    return max(winners, default=None)


def _said(engine: Engine) -> Iterator[Said]:
    while engine.said:
        yield Said(engine.said.pop(0))


def _training(
    engine: Engine, recipe: Recipe, progress: Progress, round: int, bird: EarlyBird | None
) -> Iterator[Evaluated | MaskDrawn | ChunkDone]:
    try:
        yield from train(engine, recipe, progress, pause_at=0 if round else recipe.prune.rewind_to, bird=bird)
    except DivergedError as error:
        raise DivergedError(f"round {round}: {error}") from None


def round_result(
    engine: Engine, recipe: Recipe, progress: Progress, round: int, density: float, kept: int
) -> dict[str, Any]:
    """A finished round in the form of ``find-ticket --json``: accuracies and densities are fractions, times seconds.

    ``train_accuracy`` is at the end, over all training images, or over as many as the round has made steps for:
    a run of thirty steps should not spend most of its time on it.
    """
    return {
        "round": round,
        "density": density,
        "kept": kept,
        "early_stop_iteration": progress.early_stop_iteration,
        "early_stop_validation_loss": progress.early_stop_validation_loss,
        "early_stop_validation_accuracy": progress.early_stop_validation_accuracy,
        "early_stop_test_accuracy": progress.early_stop_test_accuracy,
        "test_accuracy": progress.test_accuracy,
        "train_accuracy": engine.evaluate("train", progress.iteration * recipe.train.batch_size).accuracy,
        "engine": engine.name,
        "layers": engine.layers,
        "seconds": progress.seconds,
        "images_per_second": progress.images / max(progress.training_seconds, 1e-9),
        **({"iterations": progress.iteration} if recipe.prune.early_bird else {}),
    }


def _state(
    engine: Engine, progress: Progress, round: int, recipe: Recipe, rewind: Arrays, bird: EarlyBird | None
) -> State:
    arrays = _arrays(engine.state()) | (bird.state() if bird else {})
    if round == 0 and 0 < recipe.prune.rewind_to <= progress.iteration:  # theta_k is in no ticket yet
        arrays |= {f"rewind/{n}": a for n, a in rewind.items()}
    return State(arrays=arrays, info={"round": round, "progress": progress.to_json()})


def _gradients(recipe: Recipe, data: Source, values: Mapping[str, Tensor]) -> Gradients:
    return lambda: gradients(recipe, make_splits(recipe, data)["train"], values)


def _arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    return {n: t.detach().to("cpu", copy=True).contiguous().numpy() for n, t in tensors.items()}


def _tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    return {n: torch.from_numpy(np.array(a)) for n, a in arrays.items()}


def _with_prefix(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
