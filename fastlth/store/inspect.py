"""What a ticket says about itself, and whether it is true."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlth.errors import TicketError
from fastlth.recipe import LAST_ROUND, Recipe
from fastlth.store import container
from fastlth.store.ticket import MAX_TICKET, Regenerate, Ticket, describe, load, removed_per_round


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a ticket's header says; nothing else of the file was read."""

    recipe: Recipe
    rounds: tuple[Mapping[str, Any], ...]
    theta0_seed: Mapping[str, int] | None
    bytes: Mapping[str, int]
    """masks, theta0, fill, file"""


def summary(path: Path) -> Summary:
    """Recipe, rounds and sizes, quickly, however large the ticket. Raises TicketError."""
    header = container.read_header(path, MAX_TICKET)
    document, recipe = describe(path, header.metadata)
    sizes = {"masks": 0, "theta0": 0, "fill": 0, "file": header.file_bytes}
    kinds = {"pruned_at": "masks", "rewind": "theta0", "fill": "fill"}
    for name, slot in header.slots.items():
        sizes[kinds[name.partition("/")[0]]] += slot.end - slot.begin
    return Summary(
        recipe=recipe,
        rounds=tuple(document["rounds"]),
        theta0_seed=document.get("theta0_seed"),
        bytes=sizes,
    )


def verify(path: Path, regenerate: Regenerate | None = None) -> list[str]:
    """What is wrong with a ticket, one sentence each; empty if nothing is.

    Checks structure and hashes, then that masks and counts agree. (Masks are nested by construction: a
    weight dies once.) Without ``regenerate`` a theta0 that is kept as a seed is not checked.
    """
    try:
        seed_alone = regenerate is None and summary(path).theta0_seed is not None
        return _disagreements(load(path, regenerate, masks_only=seed_alone))
    except TicketError as error:
        return [str(error)]


def _disagreements(ticket: Ticket) -> list[str]:
    problems = []
    counts = removed_per_round(ticket.pruned_at)
    prunable, finished = int(counts.sum()), len(ticket.rounds)
    latest = int(np.flatnonzero(counts)[-1]) if prunable else 0
    if latest > min(finished, LAST_ROUND):
        problems.append(f"weights were removed in round {latest}, but only {finished} rounds are finished")
    if ticket.all_weights < prunable:
        problems.append(f"{prunable} weights can be pruned, but there are only {ticket.all_weights} at all")
    kept = prunable
    for number, result in enumerate(ticket.rounds):
        kept -= int(counts[number]) if number else 0
        if result.get("round") != number:
            problems.append(f"the result at place {number} says that it is of round {result.get('round')}")
        if result.get("kept") != kept:
            problems.append(f"round {number} says it kept {result.get('kept')}, but its mask keeps {kept}")
    return problems + _fill_disagreements(ticket)


def _fill_disagreements(ticket: Ticket) -> list[str]:
    """A weight becomes zero when a round is over, at the latest when it is pruned: it is frozen from then on."""
    problems = []
    for name, fill in ticket.fill.items():
        at = ticket.pruned_at[name]
        if fill.size and fill.max() > min(len(ticket.rounds), LAST_ROUND):
            problems.append(f"{name} says that weights are zero from round {fill.max()} on, which has not begun")
        if ((at > 0) & (fill > at)).any():
            problems.append(f"{name} says that weights became zero after they were pruned")
        if ticket.recipe.prune.mask_0 != "freeze_init_zero_all" and ((fill > 0) & (fill != at)).any():
            problems.append(f"{name} says that weights became zero that were not being pruned")
    return problems
