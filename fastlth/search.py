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

from fastlth import copies
from fastlth import masks as mask_tools
from fastlth.composition import with_own
from fastlth.copies import Arrays
from fastlth.data.sources import Source, load_for
from fastlth.errors import DivergedError
from fastlth.masks import Masks
from fastlth.models import drawn
from fastlth.pruning import actions, layer_rates, prune
from fastlth.recipe import LAST_ROUND, ComputeSection, Recipe
from fastlth.store.run import State
from fastlth.store.ticket import Ticket
from fastlth.training.early_bird import EarlyBird, MaskDrawn
from fastlth.training.engines.base import Engine
from fastlth.training.engines.make import make_engine, make_splits
from fastlth.training.gradients import gradients
from fastlth.training.resolve import resolve
from fastlth.training.trainer import ChunkDone, Evaluated, Progress, train


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
    found = _Found(recipe, settled, images, engine, ticket)

    while not over(recipe, found.results):
        round = len(found.results)
        progress = Progress(recipe.prune.rewind_to if round else 0)
        masks = found.masks()
        start = found.start()
        engine.set_masks(mask_tools.full(masks) if recipe.prune.trains_pruned else masks)
        engine.rewind(start)
        bird = found.early_bird(masks, start) if recipe.prune.early_bird else None
        if state is not None:
            if bird is not None:
                bird.load_state(state.arrays)
            engine.load_state(copies.tensors(state.arrays))
            progress = Progress.from_json(state.info["progress"])
            found.rewind = _with_prefix("rewind/", state.arrays) or found.rewind
            state = None
        kept, prunable, density = found.counts(masks)
        yield RoundStarted(round, kept, prunable, density, progress.iteration)
        yield from _said(engine)

        for event in _training(engine, recipe, progress, round, bird):
            if round == 0 and event.iteration == recipe.prune.rewind_to:  # the first of its events: all have theta_k
                found.rewind = copies.arrays(engine.weights())
            yield InRound(round, event, functools.partial(_state, engine, progress, round, recipe, found.rewind, bird))
            yield from _said(engine)

        if round < LAST_ROUND:
            found.prune(masks, found.initial(start), engine.weights())
        found.results.append(round_result(engine, recipe, progress, round, density, kept))
        yield RoundFinished(round, found.results[-1], found.ticket(), lambda: copies.arrays(engine.weights()))


class _Found:
    """What a search has found so far: theta_k, after which round each weight went, and every round's result."""

    def __init__(self, recipe: Recipe, settled: Recipe, source: Source, engine: Engine, ticket: Ticket | None) -> None:
        """``settled`` is the recipe without ``auto``; a search that goes on has a ``ticket``."""
        self._recipe, self._settled, self._source = recipe, settled, source
        weights = {n: engine.weights()[n] for n in engine.weight_names}
        prunable = {n: weights[n] for n in layer_rates(weights, recipe.prune)}
        self._device = weights[engine.weight_names[0]].device
        self._numbers = {n: i for i, n in enumerate(weights)}
        self._key = recipe.seeds.key("prune")
        self._all_weights = sum(w.numel() for w in weights.values())
        self.rewind = copies.arrays(engine.weights())
        """theta_k: until round 0 passes the rewind point theta0"""
        self._pruned_at = {n: np.zeros(w.shape, np.uint8) for n, w in prunable.items()}
        zeroes = recipe.prune.zeroes
        self._zero_from = {n: torch.zeros(w.shape, dtype=torch.uint8) for n, w in prunable.items() if zeroes}
        self.results: list[dict[str, Any]] = []
        if ticket is not None:
            self.rewind, self.results = dict(ticket.rewind), [dict(r) for r in ticket.rounds]
            self._pruned_at = {n: at.copy() for n, at in ticket.pruned_at.items()}
            self._zero_from = copies.tensors(ticket.fill)

    def masks(self) -> Masks:
        """Of the next round, on the engine's device."""
        return {n: torch.from_numpy(at == 0).to(self._device) for n, at in self._pruned_at.items()}

    def counts(self, masks: Masks) -> tuple[int, int, float]:
        """Prunable weights kept, all of them, and the density (kept / all weights)."""
        kept, prunable = mask_tools.kept(masks), sum(m.numel() for m in masks.values())
        return kept, prunable, (kept + self._all_weights - prunable) / self._all_weights

    def start(self) -> dict[str, Tensor]:
        """What the next round starts with: every parameter and buffer."""
        return actions.start(self._recipe.prune, copies.tensors(self.rewind), copies.tensors(self._pruned_at),
                             self._zero_from, numbers=self._numbers, round=len(self.results), key=self._key,
                             draw=functools.partial(drawn, self._recipe))  # fmt: skip

    def initial(self, start: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """w_i of the round that ``start`` begins: in round 0 theta_k, also where that began earlier."""
        return start if self.results else copies.tensors(self.rewind)

    def early_bird(self, masks: Masks, start: Mapping[str, Tensor]) -> EarlyBird:
        """What watches the mask that the round is heading for."""
        prune, epoch = self._recipe.prune, self._recipe.train.iterations_per_epoch(self._recipe.data.train_images)

        def draw(iteration: int, trained: Mapping[str, Tensor]) -> Masks:
            at_rewind_point = not self.results and iteration == prune.rewind_to  # theta_k is about to be copied
            return self._pruned(masks, trained if at_rewind_point else self.initial(start), trained)

        return EarlyBird(prune.early_bird, epoch, masks, draw, not_before=prune.rewind_to)

    def prune(self, masks: Masks, initial: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
        """The round that ended is pruned; ``initial`` and ``trained`` are its weights before and after."""
        new, round = self._pruned(masks, initial, trained), len(self.results) + 1
        self._zero_from = actions.zeroed(self._recipe.prune, self._zero_from, masks, new, initial, trained,
                                         numbers=self._numbers, round=round, key=self._key)  # fmt: skip
        for name, mask in masks.items():
            self._pruned_at[name][(mask & ~new[name]).cpu().numpy()] = round

    def _pruned(self, masks: Masks, initial: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> Masks:
        def of_loss() -> dict[str, Tensor]:
            return gradients(self._settled, make_splits(self._settled, self._source)["train"], initial)

        return prune(self._recipe.prune, masks, initial, trained, numbers=self._numbers,
                     round=len(self.results) + 1, key=self._key, gradients=of_loss)  # fmt: skip

    def ticket(self) -> Ticket:
        """All of it, in copies."""
        prune = self._recipe.prune
        return Ticket(
            recipe=self._recipe, resolved={}, rewind=self.rewind, rewind_iteration=prune.rewind_to,
            pruned_at={n: at.copy() for n, at in self._pruned_at.items()}, fill=copies.arrays(self._zero_from),
            rounds=tuple(self.results), all_weights=self._all_weights,
        )  # fmt: skip


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


def winning_or_last(rounds: Sequence[Mapping[str, Any]]) -> int:
    """The round that is meant where none is named: the winning ticket's, or the last one if there is none."""
    winner = winning_round([rounds])
    return max(len(rounds) - 1, 0) if winner is None else winner


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
    arrays = copies.arrays(engine.state()) | (bird.state() if bird else {})
    if round == 0 and 0 < recipe.prune.rewind_to <= progress.iteration:  # theta_k is in no ticket yet
        arrays |= {f"rewind/{n}": a for n, a in rewind.items()}
    return State(arrays=arrays, info={"round": round, "progress": progress.to_json()})


def _with_prefix(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
