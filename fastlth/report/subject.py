"""What is reported on: a run, all replicates of a search, or a ticket file.

Nothing is locked and nothing is written, so a search that is still going on can be read too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlth.errors import TicketError
from fastlth.models import skeleton
from fastlth.recipe import Recipe
from fastlth.report import controls
from fastlth.report.controls import Result
from fastlth.search import winning_round
from fastlth.store import ticket as tickets
from fastlth.store.run import METRICS, RECIPE, TICKET, read_recipe, run_folders


@dataclass(frozen=True, eq=False)
class Replicate:
    """One seed's run, as its files tell it."""

    seed: int
    path: Path
    rounds: tuple[Result, ...]
    pruned_at: Mapping[str, NDArray[np.uint8]]
    """per prunable weight, in the order of the net's layers: 0 alive, k = removed in round k"""
    evaluations: tuple[Mapping[str, Any], ...]
    """lines of metrics.jsonl"""
    branches: Mapping[str, tuple[Result, ...]]
    """control runs by name: a result per round or density, and draw"""
    resolved: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Subject:
    """One search: its replicates together."""

    label: str
    recipe: Recipe
    replicates: tuple[Replicate, ...]

    @property
    def title(self) -> str:
        """Model and data set."""
        return f"{self.recipe.model.name} on {self.recipe.data.name}"

    @property
    def rounds(self) -> int:
        """Rounds that at least one replicate has finished."""
        return max(len(r.rounds) for r in self.replicates)

    @property
    def winner(self) -> int | None:
        """The winning ticket's round, from the rounds that all replicates have finished."""
        return winning_round([r.rounds for r in self.replicates])

    def results(self, round: int) -> list[Result]:
        """The round's result of each replicate that has finished it."""
        return [r.rounds[round] for r in self.replicates if round < len(r.rounds)]

    def controls(self) -> dict[str, list[list[Result]]]:
        """Name of a control -> per round, or per density that was asked for, the results of all replicates and draws;
        the densest first."""
        found: dict[str, dict[tuple[int, float | None], list[Result]]] = {}
        for replicate in self.replicates:
            for name, results in replicate.branches.items():
                for r in results:
                    found.setdefault(name, {}).setdefault((r["round"], r[controls.ASKED]), []).append(r)
        return {name: sorted(draws.values(), key=lambda same: -same[0]["density"])
                for name, draws in sorted(found.items())}  # fmt: skip

    def values(self, round: int, field: str) -> list[float | None]:
        """One field of a round's result, per replicate."""
        return [result.get(field) for result in self.results(round)]


def read(paths: Sequence[Path]) -> list[Subject]:
    """The subjects at ``paths``, with labels that tell them apart.

    Each is a run folder r<seed>, its parent (all replicates, the newest of each seed) or a ticket file. Raises
    TicketError for anything else and for what is damaged.
    """
    subjects = [_subject(path) for path in paths]
    return [replace(s, label=label) for s, label in zip(subjects, _labels(subjects, paths), strict=True)]


def _subject(path: Path) -> Subject:
    if path.is_file():
        one = _from_ticket(path)
        return Subject("", one[0], (one[1],))
    if (path / RECIPE).exists():
        recipe, replicate = _from_folder(path)
        return Subject("", recipe, (replicate,))
    newest = {seed: folder for (seed, _), folder in sorted(run_folders(path).items()) if (folder / RECIPE).exists()}
    if not newest:
        raise TicketError(f"there is no run in {path}; give a run folder r<seed>, the folder of all its replicates, or "
                          "a ticket file ('fastlth runs' lists the runs)")  # fmt: skip
    found = [_from_folder(folder) for folder in newest.values()]
    return Subject("", found[0][0], tuple(replicate for _, replicate in found))


def _from_ticket(path: Path) -> tuple[Recipe, Replicate]:
    ticket = tickets.load(path, masks_only=True)
    folder = path.absolute().parent
    beside = path.name == TICKET and (folder / RECIPE).exists()  # the rest of its run
    return ticket.recipe, Replicate(
        seed=ticket.recipe.seeds.base, path=path, rounds=ticket.rounds,
        pruned_at=_in_order(ticket.recipe, ticket.pruned_at), resolved=ticket.resolved,
        evaluations=tuple(evaluations(folder / METRICS)) if beside else (),
        branches=controls.read(folder, ticket.recipe) if beside else {},
    )  # fmt: skip


def _from_folder(folder: Path) -> tuple[Recipe, Replicate]:
    recipe, resolved = read_recipe(folder / RECIPE)
    ticket = tickets.load(folder / TICKET, masks_only=True) if (folder / TICKET).exists() else None
    return recipe, Replicate(
        seed=recipe.seeds.base, path=folder, rounds=ticket.rounds if ticket else (),
        pruned_at=_in_order(recipe, ticket.pruned_at) if ticket else {}, resolved=resolved,
        evaluations=tuple(evaluations(folder / METRICS)), branches=controls.read(folder, recipe),
    )  # fmt: skip


def evaluations(file: Path) -> Iterator[Mapping[str, Any]]:
    """The evaluations in a metrics.jsonl; none if it is not there. A last line still being written is left out."""
    for line in records(file):
        if line.get("event") == "evaluation":
            yield line


def records(file: Path) -> Iterator[Mapping[str, Any]]:
    """Every whole line of a file of JSON objects; nothing if it is not there."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        raise TicketError(f"cannot read {file} ({error.strerror}); check its permissions") from error
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # half a line
        if isinstance(record, dict):
            yield record


def _in_order(recipe: Recipe, pruned_at: Mapping[str, NDArray[np.uint8]]) -> dict[str, NDArray[np.uint8]]:
    """A file's tensors are in alphabetical order; people think from the input to the output."""
    order = {name: i for i, name in enumerate(skeleton(recipe).state_dict())}
    return dict(sorted(pruned_at.items(), key=lambda item: order.get(item[0], len(order))))


def _labels(subjects: Sequence[Subject], paths: Sequence[Path]) -> list[str]:
    """Short names that differ: the pair, then the settings in which recipes of that pair differ, then the paths."""
    if len(subjects) == 1:
        return [subjects[0].title]
    same_pair = len({s.title for s in subjects}) == 1
    labels = []
    for s in subjects:
        rivals = [_flat(o) for o in subjects if o.title == s.title]
        told = [f"{key} {value}" for key, value in _flat(s).items() if any(o.get(key) != value for o in rivals)]
        labels.append(", ".join([*([] if same_pair and told else [s.title]), *told[: controls.MOST_TOLD]]))
    names = _tails(paths)
    return [label if labels.count(label) == 1 else name for label, name in zip(labels, names, strict=True)]


def _tails(paths: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many as are needed to tell them apart."""
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts))):
        tails = ["/".join(p[-count:]) for p in parts]
        if len(set(tails)) == len(set(parts)):
            return tails
    return list(map(str, paths))


def _flat(subject: Subject) -> dict[str, str]:
    """Settings that tell searches apart, without those that change no result or only how far it goes."""
    recipe = subject.recipe
    told = {key: value for section, table in recipe.to_dict().items() if section not in ("store", "compute", "seeds")
            for key, value in table.items() if (section, key) != ("prune", "rounds")}  # fmt: skip
    seeds = "+".join(str(r.seed) for r in subject.replicates)
    return {**{key.replace("_", " "): str(value) for key, value in told.items()}, "seed": seeds}
