"""What finished searches found: what ``run`` returns."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fastlth.analysis import replicate_overlap
from fastlth.recipe import Recipe
from fastlth.search import winning_round
from fastlth.store import atomic, strict_json
from fastlth.store import ticket as tickets


@dataclass(frozen=True)
class Replicate:
    """One seed's finished search."""

    seed: int
    path: Path
    rounds: tuple[Mapping[str, Any], ...]

    @property
    def ticket(self) -> Path:
        """Its ticket file."""
        return self.path / "search.ticket"


@dataclass(frozen=True)
class Search:
    """The result of ``run``. With several replicates, ``rounds`` are their means."""

    recipe: Recipe
    replicates: tuple[Replicate, ...]

    @property
    def ticket(self) -> Path:
        """The first replicate's ticket file."""
        return self.replicates[0].ticket

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """Per round its result, as in ``find-ticket --json``: means where there are several replicates."""
        return _means([r.rounds for r in self.replicates])

    @property
    def winning_round(self) -> int | None:
        """The winning ticket's round, by the means of all replicates, or None."""
        return winning_round([r.rounds for r in self.replicates])

    @functools.cached_property
    def mask_overlap(self) -> list[dict[str, Any]]:
        """Per round, how far the masks of the replicates agree (docs/metrics.md), read from their tickets.

        Empty for one replicate. Raises TicketError where a ticket file has been damaged since.
        """
        if len(self.replicates) == 1:
            return []
        overlap = replicate_overlap([tickets.load(r.ticket, masks_only=True) for r in self.replicates])
        return overlap[: len(self.rounds)]

    def save_overlap(self) -> None:
        """Write ``mask_overlap`` beside the replicates' run folders, a line per round; nothing for one replicate."""
        if overlap := self.mask_overlap:
            seeds = [r.seed for r in self.replicates]
            lines = (strict_json.dumps({"event": "overlap", "seeds": seeds, **line}) + "\n" for line in overlap)
            atomic.write(self.replicates[0].path.parent / "overlap.jsonl", "".join(lines).encode())

    def to_json(self) -> dict[str, Any]:
        """The document of ``find-ticket --json``."""
        document = {
            "run": str(self.replicates[0].path),
            "ticket": str(self.ticket),
            "recipe_digest": self.recipe.digest,
            "rounds": self.rounds,
            "winning_round": self.winning_round,
        }
        if len(self.replicates) > 1:
            document["replicates"] = [{"seed": r.seed, "rounds": [dict(x) for x in r.rounds]} for r in self.replicates]
            document["mask_overlap"] = self.mask_overlap
        return document


def _means(replicates: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    if len(replicates) == 1:
        return [dict(r) for r in replicates[0]]
    return [
        {k: fmean(r[k] for r in same) if isinstance(v, int | float) and k != "round" else v for k, v in same[0].items()}
        for same in zip(*replicates, strict=False)
    ]
