"""Train the ticket of one round again, from its rewind values and on its mask."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastlth import copies
from fastlth import masks as mask_tools
from fastlth.composition import adjust
from fastlth.data.sources import load_for
from fastlth.errors import TicketError
from fastlth.experiments.settled import as_known, compute_of
from fastlth.search import round_result, winning_or_last
from fastlth.tickets import LoadedTicket, theta0
from fastlth.training.engines.make import make_engine
from fastlth.training.trainer import Progress, train


def retrain(
    ticket: LoadedTicket, *, round: int | None = None, settings: Mapping[str, Any] | None = None,
    data_dir: str | Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The round's result, in the form of ``find-ticket --json``, after training it again.

    ``round`` is the winning ticket's where not given (the last one's if there is none); ``settings`` change the
    recipe. With none changed, on the same machine and versions, the result is the one of the search, unless an early
    bird ended the round: it is trained to its last iteration. Raises RecipeError for a round that is not there.
    """
    round = winning_or_last(ticket.rounds) if round is None else round
    masks = ticket.mask(round)
    prune = ticket.recipe.prune
    whole = dataclasses.replace(ticket.recipe, prune=dataclasses.replace(prune, early_bird=0.0))
    recipe = adjust(whole, settings or {})
    source = load_for(recipe.data, data_dir)
    # what auto became in the search is part of its bits: threads, precision, which layers run from kept weights
    known = ticket.file.resolved if recipe.compute == ticket.recipe.compute else {}
    resolved = as_known(recipe, lambda candidate: make_engine(candidate, source), known)
    engine = make_engine(dataclasses.replace(recipe, compute=compute_of(resolved)), source)
    engine.set_masks(ticket.trained_mask(round))
    start, first = _start(ticket, round)
    engine.rewind(start)
    progress = Progress(first)
    for _ in train(engine, recipe, progress):
        pass
    result = round_result(engine, recipe, progress, round, ticket.file.density(round), mask_tools.kept(masks))
    return {**result, "iterations": progress.iteration} if prune.early_bird else result


def _start(ticket: LoadedTicket, round: int) -> tuple[Mapping[str, Tensor], int]:
    """What a round was trained from, and from which iteration on: the dense net from theta0, rewound late or not."""
    first = ticket.file.rewind_iteration
    if round or not first:
        return ticket.start(round), first
    if ticket.rounds[0]["seconds"] is None:
        raise TicketError(f"round 0 was trained from theta0, and this ticket of another program holds the weights of "
                          f"iteration {first} alone; give --round 1 or later")  # fmt: skip
    return copies.tensors(theta0(ticket.recipe)), 0
