"""Printing, for all commands: people read stderr, programs read one JSON document on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from fastlth.results import Search


def json_document(document: Any) -> None:
    """The one document on stdout."""
    json.dump(document, sys.stdout, allow_nan=False)
    sys.stdout.write("\n")


def console() -> Console:
    """For everything a person reads. Wide where it is not a terminal, so that tables are not cut."""
    from rich.console import Console

    plain = Console(stderr=True)
    return plain if plain.is_terminal else Console(stderr=True, width=160)


def teller(out: Console, view: Callable[[Any], None]) -> Callable[[Any], None]:
    """Shows what an experiment has to say: a sentence is printed, anything else goes to ``view``."""
    return lambda what: out.print(what, highlight=False, soft_wrap=True) if isinstance(what, str) else view(what)


def search_result(search: Search, out: Console) -> None:
    """The table of a finished search, its winning ticket, and where the files are."""
    from fastlth.ui import rounds_table

    winner = search.winning_round
    if search.recipe.prune.rewind_to:
        out.print(f"rewound to iteration {search.recipe.prune.rewind_to:,}", highlight=False)
    out.print(rounds_table(search.rounds, winner, spread=len(search.replicates) > 1))
    if len(search.rounds) == 1:
        found = "the dense net alone: no pruned round was asked for"
    elif winner is None:
        found = "no winning ticket: no pruned round was as good as the dense one on validation images, and as quick"
    else:
        r = search.rounds[winner]
        found = (f"winning ticket: round {winner}, density {r['density']:.2%}, "
                 f"test accuracy {r['early_stop_test_accuracy']:.2%} at early stop")  # fmt: skip
    out.print(found, highlight=False)
    if overlap := search.mask_overlap:
        last = overlap[-1]
        out.print(f"masks of the replicates in round {last['round']}: Jaccard {last['jaccard']:.3f}, "
                  f"by chance {last['jaccard_by_chance']:.3f}", highlight=False)  # fmt: skip
    for replicate in search.replicates:
        out.print(f"ticket: {replicate.ticket}", highlight=False, soft_wrap=True)
