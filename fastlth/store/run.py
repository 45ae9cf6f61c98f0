"""The run directory: OUT/<model>-<dataset>-<digest8>/r<seed>[.n]/, one search and all it needs to go on.

    recipe.toml         the recipe as asked for, and [resolved]: what every ``auto`` became
    search.ticket       every finished round
    state.safetensors   the round in progress, if any
    metrics.jsonl       every event
    lock                who is writing

The digest leaves out what is only a prefix (number of rounds, seed), so the same command with more
rounds finds its run and goes on. ``fresh`` starts r<seed>.2, .3, ...; the highest number is the one that
is resumed, and nothing is ever deleted.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fastlth import specs, toml
from fastlth.errors import RecipeError, TicketError
from fastlth.recipe import Recipe
from fastlth.store import atomic, container, inspect, strict_json
from fastlth.store import ticket as tickets
from fastlth.store.lock import Lock
from fastlth.store.ticket import EncodedTheta, Regenerate, Ticket

RECIPE, TICKET, STATE = "recipe.toml", "search.ticket", "state.safetensors"
METRICS, LOCK = "metrics.jsonl", "lock"
SUPERMASKS = "supermask"  # the folder of `fastlth supermask`, beside a search or alone
_FOLDER = re.compile(r"r(\d+)(?:\.(\d+))?")
_STATE_FORMAT = {"format": "fastlth state", "schema": "1"}


@dataclass(frozen=True, eq=False)
class State:
    """A search inside a round."""

    arrays: Mapping[str, NDArray[Any]]
    info: Mapping[str, Any]
    """plain JSON: round, iteration, metrics_bytes, accumulators, best so far; None, not inf, for none yet"""


class Run:
    """A run directory that this process alone writes, from ``open`` or ``reopen`` until ``close``.

    Saving may be done from any thread, one save of a kind at a time.
    """

    path: Path
    recipe: Recipe
    resolved: dict[str, Any] | None
    """what every ``auto`` became; None until ``write_recipe``"""

    def __init__(self, path: Path, recipe: Recipe | None) -> None:
        """Lock and read; ``recipe`` None: the stored one. Use ``open`` or ``reopen``."""
        self.path = path
        self._lock = Lock(path / LOCK)
        try:
            atomic.sweep(path)
            self._read_recipe(recipe)
        except BaseException:
            self._lock.release()
            raise

    @staticmethod
    def open(out: Path, recipe: Recipe, *, fresh: bool = False) -> Run:
        """The run of ``recipe`` and its seed under ``out``, made where it is not there yet.

        Raises OutputError (cannot be written), RunLockedError (another process writes it),
        EnvironmentFailure (disk full), TicketError (a damaged recipe.toml).
        """
        parent = parent_folder(out, recipe)
        seed = recipe.seeds.base
        number = max((n for s, n in run_folders(parent) if s == seed), default=0)
        number = number + 1 if fresh else max(number, 1)
        path = parent / (f"r{seed}" if number == 1 else f"r{seed}.{number}")
        atomic.make_folders(path)
        return Run(path, recipe)

    @staticmethod
    def reopen(path: Path) -> Run:
        """The run at ``path``: an r<seed> folder, a file in it, or its parent if that holds runs of one seed only.

        Raises TicketError where there is no such run, and else as ``open`` does.
        """
        path = path.parent if path.is_file() else path
        if not _FOLDER.fullmatch(path.absolute().name):
            found = run_folders(path)
            if len({seed for seed, _ in found}) != 1:
                names = ", ".join(f.name for f in found.values()) or "none"
                raise TicketError(f"{path} is not one run; give one of the r<seed> folders in it ({names})")
            path = found[max(found)]
        if not os.path.exists(path / RECIPE):
            raise TicketError(f"there is no run in {path} (no {RECIPE}); 'fastlth runs' lists all")
        return Run(path, None)

    @property
    def metrics_path(self) -> Path:
        """Every event of the search, a line each."""
        return self.path / METRICS

    @property
    def ticket_path(self) -> Path:
        """All finished rounds."""
        return self.path / TICKET

    def write_recipe(self, recipe: Recipe, resolved: Mapping[str, Any]) -> None:
        """Write recipe.toml. ``resolved`` holds words, numbers, booleans, lists and tables, no None.

        Raises OutputError or EnvironmentFailure, like every method below that writes.
        """
        tables = {**recipe.to_dict(), "resolved": dict(resolved)}
        atomic.write(self.path / RECIPE, toml.dumps(tables).encode())
        self.recipe, self.resolved = recipe, dict(resolved)

    def ticket(self, regenerate: Regenerate | None = None) -> Ticket | None:
        """All finished rounds, or None before the first save. Raises TicketError if it is damaged."""
        if not self.ticket_path.exists():
            return None
        ticket = tickets.load(self.ticket_path, regenerate)
        self._own(self.ticket_path, ticket.recipe.digest)
        return ticket

    def state(self) -> State | None:
        """The round in progress; None without one, or if its round is not the ticket's next (it is done).

        Raises TicketError if the file is damaged.
        """
        path = self.path / STATE
        if not path.exists():
            return None
        rounds = len(inspect.summary(self.ticket_path).rounds) if self.ticket_path.exists() else 0
        try:
            arrays, metadata = container.read(path)
            if {k: metadata.get(k) for k in _STATE_FORMAT} != _STATE_FORMAT:
                raise TicketError(f"{path} is not a state that this fastlth can read")
            self._own(path, metadata["recipe_digest"])
            info = strict_json.loads(metadata["info"])
            current = info["round"] == rounds
        except (TicketError, ValueError, KeyError, TypeError) as error:
            raise TicketError(
                f"the saved state of round {rounds} cannot be read ({error}); delete {path} to repeat "
                "the round from its start, or start again with --fresh"
            ) from error
        return State(arrays, info) if current else None

    def save_ticket(self, ticket: Ticket, *, theta: EncodedTheta | None = None) -> None:
        """Replace search.ticket; a state of a round it holds is ignored from here on."""
        tickets.save(self.ticket_path, ticket, theta=theta)

    def save_state(self, state: State) -> None:
        """Replace state.safetensors. The arrays must not change meanwhile."""
        info = strict_json.dumps(dict(state.info))
        metadata = {**_STATE_FORMAT, "recipe_digest": self.recipe.digest, "info": info}
        container.write(self.path / STATE, state.arrays, metadata)

    def drop_state(self) -> None:
        """Remove state.safetensors, if it is there."""
        atomic.delete(self.path / STATE)

    def close(self) -> None:
        """Release the lock; nothing happens the second time."""
        self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_recipe(self, asked: Recipe | None) -> None:
        file = self.path / RECIPE
        if not file.exists() and not self.ticket_path.exists() and asked is not None:
            self.recipe, self.resolved = asked, None
            return
        stored, self.resolved = read_recipe(file)
        self.recipe = asked or stored
        self._own(file, stored.digest)
        if self.recipe != stored:  # more rounds, say: a later ``reopen`` should know
            self.write_recipe(self.recipe, self.resolved or {})

    def _own(self, file: Path, digest: str) -> None:
        if digest != self.recipe.digest:
            raise TicketError(
                f"{file} is of another recipe (digest {digest[:8]}, not {self.recipe.digest[:8]}); "
                "put the right file back, or start again with --fresh"
            )


def read_recipe(file: Path) -> tuple[Recipe, dict[str, Any]]:
    """A run's recipe.toml: the recipe as asked for, and [resolved]. Raises TicketError."""
    try:
        tables = tomllib.loads(file.read_bytes().decode())
        resolved = tables.pop("resolved")
        return Recipe.from_dict(tables), dict(resolved)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecipeError) as error:
        raise TicketError(
            f"{file} is damaged ({type(error).__name__}: {error}); put it back, or start again with --fresh"
        ) from error


def parent_folder(out: Path, recipe: Recipe) -> Path:
    """Where the runs of a recipe lie, one folder per seed."""
    return out / f"{_word(recipe.model.name)}-{_word(recipe.data.name)}-{recipe.digest[:8]}"


def _word(name: str) -> str:
    """A name as part of a file name on any system; of an image folder's path the last part."""
    path = specs.folder(name)
    return re.sub(r"[^\w.-]+", "-", name if path is None else re.split(r"[/\\]", path.rstrip("/\\"))[-1])


def run_folders(parent: Path) -> dict[tuple[int, int], Path]:
    """(seed, n) -> run folder; r<seed> is n = 1."""
    named = [(folder, _FOLDER.fullmatch(folder.name)) for folder in entries(parent)]
    return {(int(m[1]), int(m[2] or 1)): folder for folder, m in named if m and folder.is_dir()}


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, by name; nothing if it is not one. Raises TicketError if it is unreadable."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise TicketError(f"cannot read {folder} ({error.strerror}); check its permissions") from error
