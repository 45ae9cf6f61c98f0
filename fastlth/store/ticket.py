"""search.ticket: a whole search in one small file (docs/ticket-format.md).

The rewind values once, entropy coded; for every prunable weight one byte that says in which round it
was removed, which is all rounds' masks at once; the recipe and each round's result as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlth.catalogue import ACTIONS_VERSION
from fastlth.errors import RecipeError, TicketError
from fastlth.recipe import LAST_ROUND, Recipe
from fastlth.store import codec, container, strict_json
from fastlth.store.container import damaged

FORMAT, SCHEMA = "fastlth ticket", "1"
MAX_TICKET = 1 << 32

Regenerate = Callable[[Recipe], Mapping[str, NDArray[Any]]]
"""makes theta0 again from the recipe's seeds: every parameter and buffer"""

_OPTIONAL = {"fill", "start", "theta0_seed"}
_KEYS = {"all_weights", "metrics_bytes", "pruned_at", "recipe", "resolved", "rewind", "rewind_iteration",
         "rounds", *_OPTIONAL}  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Ticket:
    """Everything a search has found so far, and all it needs to go on after its last finished round."""

    recipe: Recipe
    """as asked for"""
    resolved: Mapping[str, Any]
    """what every ``auto`` became"""
    rewind: Mapping[str, NDArray[Any]]
    """theta_k: every parameter and buffer, logical shapes, the net's own dtypes"""
    rewind_iteration: int
    """k"""
    pruned_at: Mapping[str, NDArray[np.uint8]]
    """per prunable weight: 0 alive, k = removed in round k; may hold the next, untrained round's mask"""
    fill: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    """with a mask-0 action that zeroes, per prunable weight: 0 never, k = its initial value is 0 from round k on"""
    all_weights: int
    """weights of all Linear and Conv layers, pruned or not"""
    rounds: tuple[Mapping[str, Any], ...] = ()
    """result of each finished round, index = round: the objects of ``find-ticket --json``"""
    metrics_bytes: int = 0
    """length of metrics.jsonl when the last round finished"""
    theta0_seed: Mapping[str, int] | None = None
    """{"init_version": v}: a file holds only hashes of theta0, and loading makes it again"""

    def mask(self, round: int) -> dict[str, NDArray[np.bool_]]:
        """Per prunable weight, its shape: True = kept in ``round``.

        ``round`` is 0 up to the first unfinished one, whose mask is the last one's until it is pruned.
        Raises RecipeError for others.
        """
        self._check(round)
        return {name: (at == 0) | (at > round) for name, at in self.pruned_at.items()}

    def trained_mask(self, round: int) -> dict[str, NDArray[np.bool_]]:
        """The weights that ``round`` trains: those of its mask, or all with mask-0 action original."""
        mask = self.mask(round)
        return {n: np.ones_like(m) for n, m in mask.items()} if self.recipe.prune.trains_pruned else mask

    def kept(self, round: int) -> int:
        """Prunable weights kept in ``round``. Raises RecipeError as ``mask`` does."""
        self._check(round)
        counts = removed_per_round(self.pruned_at)
        return int(counts.sum() - counts[1 : round + 1].sum())

    def density(self, round: int) -> float:
        """Kept / all weights of Linear and Conv layers. Raises RecipeError as ``mask`` does."""
        prunable = sum(at.size for at in self.pruned_at.values())
        return (self.all_weights - prunable + self.kept(round)) / self.all_weights

    def _check(self, round: int) -> None:
        last = min(len(self.rounds), LAST_ROUND)
        if not 0 <= round <= last:
            raise RecipeError(f"this ticket has no round {round}; choose one of 0 to {last}")


@dataclass(frozen=True)
class EncodedTheta:
    """Encoded rewind values: they never change, so each round's save uses the same ones."""

    payloads: Mapping[str, NDArray[np.uint8]]
    infos: Mapping[str, codec.Info]

    @staticmethod
    def of(rewind: Mapping[str, NDArray[Any]], *, stored: bool = True) -> EncodedTheta:
        """Encode; with ``stored=False`` (theta0 = "seed") only dtype, shape and sha256 of each."""
        if not stored:
            return EncodedTheta({}, {name: codec.describe(a) for name, a in rewind.items()})
        payloads, infos = _encode(rewind)
        return EncodedTheta(payloads, infos)


def save(path: Path, ticket: Ticket, *, theta: EncodedTheta | None = None) -> None:
    """Write atomically. ``theta`` is ``EncodedTheta.of(ticket.rewind)``, made here if not given.

    Raises OutputError or EnvironmentFailure; ValueError for values that a ticket cannot hold.
    """
    in_seed = ticket.theta0_seed is not None
    if in_seed and ticket.rewind_iteration:
        raise ValueError("a seed stands for theta0 only, not for the weights of a later iteration")
    theta = theta or EncodedTheta.of(ticket.rewind, stored=not in_seed)
    if in_seed == bool(theta.payloads) or theta.infos.keys() != ticket.rewind.keys():
        raise ValueError("theta is not the encoded rewind values of this ticket")
    prune = ticket.recipe.prune
    if ticket.fill.keys() != (ticket.pruned_at.keys() if prune.zeroes else set()):
        raise ValueError(f"a ticket with mask-0 action {prune.mask_0} has {'a' if prune.zeroes else 'no'} fill")
    masks, mask_infos = _encode(ticket.pruned_at)
    fill, fill_infos = _encode(ticket.fill)
    document = {
        "all_weights": ticket.all_weights,
        "metrics_bytes": ticket.metrics_bytes,
        "pruned_at": mask_infos,
        "recipe": ticket.recipe.to_unordered(),
        "resolved": dict(ticket.resolved),
        "rewind": dict(theta.infos),
        "rewind_iteration": ticket.rewind_iteration,
        "rounds": [dict(r) for r in ticket.rounds],
    }
    if ticket.theta0_seed is not None:
        document["theta0_seed"] = dict(ticket.theta0_seed)
    if not prune.rewinds:
        document["start"] = {"version": ACTIONS_VERSION}
    if prune.zeroes:
        document["fill"] = fill_infos
    metadata = {
        "format": FORMAT,
        "schema": SCHEMA,
        "recipe_digest": ticket.recipe.digest,
        "ticket": strict_json.dumps(document),
    }
    payloads = {f"pruned_at/{n}": a for n, a in masks.items()}
    payloads |= {f"fill/{n}": a for n, a in fill.items()}
    payloads |= {f"rewind/{n}": a for n, a in theta.payloads.items()}
    container.write(path, payloads, metadata)


def load(path: Path, regenerate: Regenerate | None = None, *, masks_only: bool = False) -> Ticket:
    """Read and check every byte. ``regenerate`` is needed where the ticket holds only theta0's seed.

    ``masks_only`` leaves ``rewind`` empty, which is quicker and needs no ``regenerate``.

    Raises TicketError for a file that is damaged, of another kind or newer than this program, and
    where regenerated values are not bit for bit those of the search.
    """
    payloads, metadata = container.read(path, MAX_TICKET)
    document, recipe = describe(path, metadata)
    try:
        ticket = _ticket(document, recipe, payloads)
        rewind: Mapping[str, NDArray[Any]] = {}
        if ticket.theta0_seed is None:
            rewind = {} if masks_only else _decode(payloads, "rewind", document["rewind"])
        elif not masks_only:
            rewind = _regenerated(path, document["rewind"], ticket, regenerate)
        return replace(ticket, rewind=rewind)
    except ValueError as error:
        raise damaged(path, error) from error
    except (TypeError, KeyError, AttributeError) as error:
        raise damaged(path, "its description has another structure") from error


def removed_per_round(pruned_at: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.int64]:
    """How many weights have each value: shape [256]; [0] are alive."""
    counts = np.zeros(256, np.int64)
    for at in pruned_at.values():
        flat = at.reshape(-1)
        for start in range(0, flat.size, 1 << 20):  # bincount makes an int64 copy, so a piece at a time
            counts += np.bincount(flat[start : start + (1 << 20)], minlength=256)
    return counts


def _encode(arrays: Mapping[str, NDArray[Any]]) -> tuple[dict[str, NDArray[np.uint8]], dict[str, codec.Info]]:
    encoded = {name: codec.encode(array) for name, array in arrays.items()}
    payloads = {name: np.frombuffer(data, np.uint8) for name, (data, _) in encoded.items()}
    return payloads, {name: info for name, (_, info) in encoded.items()}


def describe(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], Recipe]:
    """The parsed description in a ticket's metadata, and its recipe. Raises TicketError."""
    if metadata.get("format") != FORMAT:
        raise TicketError(f"{path} is not a ticket (its format is {metadata.get('format')!r}); "
                          "give the path of a search.ticket")  # fmt: skip
    if metadata.get("schema") != SCHEMA:
        raise TicketError(f"{path} has schema {metadata.get('schema')!r}, this fastlth reads {SCHEMA!r}; "
                          "update fastlth")  # fmt: skip
    try:
        document = strict_json.loads(metadata["ticket"])
        unknown = sorted(document.keys() - _KEYS)
        if unknown:
            raise TicketError(f"{path} uses {unknown[0]!r}, which this fastlth does not know; update fastlth")
        if _KEYS - document.keys() - _OPTIONAL or any(type(r) is not dict for r in document["rounds"]):
            raise ValueError("its description is not complete")
        version = document.get("start", {"version": ACTIONS_VERSION})["version"]
        if type(version) is not int or version < 1:
            raise ValueError("the version of its starts is not a whole number")
        if version != ACTIONS_VERSION:
            raise TicketError(f"{path} has starts of version {version}, this fastlth makes those of version "
                              f"{ACTIONS_VERSION}; use the fastlth that wrote it")  # fmt: skip
        recipe = Recipe.from_dict(document["recipe"])
        if recipe.digest != metadata["recipe_digest"]:
            raise ValueError("its recipe does not have the digest it names")
        if ("fill" in document, "start" in document) != (recipe.prune.zeroes, not recipe.prune.rewinds):
            raise ValueError("its starts are not those of its recipe's mask-1 and mask-0 actions")
    except (ValueError, RecipeError) as error:
        raise damaged(path, error) from error
    except (TypeError, KeyError, AttributeError) as error:
        raise damaged(path, "its description has another structure") from error
    return document, recipe


def _ticket(document: dict[str, Any], recipe: Recipe, payloads: dict[str, NDArray[Any]]) -> Ticket:
    """The ticket without its rewind values."""
    rewind, masks, seed = document["rewind"], document["pruned_at"], document.get("theta0_seed")
    fill = document.get("fill", {})
    numbers = [document[key] for key in ("all_weights", "metrics_bytes", "rewind_iteration")]
    if "theta0_seed" in document:
        numbers.append(document["theta0_seed"]["init_version"])
        if document["rewind_iteration"]:
            raise ValueError("a seed cannot stand for the weights of a later iteration")
    if any(type(n) is not int or n < 0 for n in numbers) or type(document["resolved"]) is not dict:
        raise ValueError("a count is not a whole number")
    expected = {f"pruned_at/{n}" for n in masks} | {f"fill/{n}" for n in fill}
    expected |= set() if seed else {f"rewind/{n}" for n in rewind}
    if expected != payloads.keys() or any(a.dtype != np.uint8 for a in payloads.values()):
        raise ValueError("it does not hold the tensors it describes")
    if fill.keys() != (masks.keys() if recipe.prune.zeroes else set()):
        raise ValueError("its fill is not of the weights that may be pruned")
    for name, info in [*masks.items(), *fill.items()]:
        if name not in rewind or info["dtype"] != "U8" or info["shape"] != rewind[name]["shape"]:
            raise ValueError(f"the mask of {name!r} does not fit its weights")
    return Ticket(
        recipe=recipe,
        resolved=document["resolved"],
        rewind={},
        rewind_iteration=document["rewind_iteration"],
        pruned_at=_decode(payloads, "pruned_at", masks),
        fill=_decode(payloads, "fill", fill),
        all_weights=document["all_weights"],
        rounds=tuple(document["rounds"]),
        metrics_bytes=document["metrics_bytes"],
        theta0_seed=seed,
    )


def _decode(
    payloads: Mapping[str, NDArray[Any]], kind: str, infos: Mapping[str, codec.Info]
) -> dict[str, NDArray[Any]]:
    arrays = {}
    for name, info in infos.items():
        try:
            arrays[name] = codec.decode(payloads[f"{kind}/{name}"], info)
        except ValueError as error:
            raise ValueError(f"{kind} of {name!r}: {error}") from error
    return arrays


def _regenerated(
    path: Path, infos: Mapping[str, codec.Info], ticket: Ticket, regenerate: Regenerate | None
) -> Mapping[str, NDArray[Any]]:
    if regenerate is None:
        raise TicketError(f"{path} keeps theta0 as a seed only; "
                          "read it with fastlth.load_ticket, which makes it again")  # fmt: skip
    made = regenerate(ticket.recipe)
    wrong = sorted(made.keys() ^ infos.keys())
    wrong += [n for n, a in made.items() if n in infos and codec.describe(a) != infos[n]]
    if wrong:
        version = (ticket.theta0_seed or {}).get("init_version")
        raise TicketError(f"theta0 made again from the seed differs from that of {path} in {wrong[0]!r}; "
                          f"use a fastlth whose initialiser has version {version}")  # fmt: skip
    return made
