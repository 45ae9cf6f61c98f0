"""What a run directory no longer needs: found first, removed only when told to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastlth.errors import RunLockedError, TicketError
from fastlth.store import atomic, container, strict_json, weights
from fastlth.store.inspect import verify
from fastlth.store.listing import list_runs
from fastlth.store.run import STATE, TICKET, Run


@dataclass(frozen=True)
class Waste:
    """One file, its size, and why it is not needed."""

    path: Path
    bytes: int
    why: str


def find(out: Path, *, trained: bool = False) -> list[Waste]:
    """What finished runs under ``out`` no longer need.

    The state of a round that is done; with ``trained``, kept weights too, which ``fastlth train`` can make again.
    Runs that are unfinished, damaged or being written are left alone.
    """
    found: list[Waste] = []
    for info in list_runs(out):
        if info.problem or info.rounds_done < info.rounds_asked:
            continue
        state = info.path / STATE
        if state.exists() and _round(state) != info.rounds_done:  # another time more rounds may have been asked for
            found.append(Waste(state, state.stat().st_size, "state of a round that is done"))
        if trained:
            files = [weights.path(info.path, k) for k in weights.rounds(info.path)]
            found += [Waste(f, f.stat().st_size, "trained weights; the ticket can be trained again") for f in files]
    return found


def _round(state: Path) -> int | None:
    """The round that a saved state is of; None if it cannot be read."""
    try:
        return int(strict_json.loads(container.read_header(state).metadata["info"])["round"])
    except (TicketError, KeyError, TypeError, ValueError):
        return None


def remove(waste: list[Waste]) -> list[Waste]:
    """Remove what ``find`` found, each under its run's lock and only beside a whole ticket; returns what is gone."""
    gone = []
    for item in waste:
        folder = item.path.parent if item.path.name == STATE else item.path.parent.parent
        try:
            with Run.reopen(folder) as run:
                if verify(run.path / TICKET):
                    continue
                atomic.delete(item.path)
                gone.append(item)
        except (RunLockedError, TicketError):
            continue
    return gone
