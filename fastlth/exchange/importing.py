"""A search.ticket from masks that another program found, or from our own export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlth.composition import adjust, compose
from fastlth.errors import RecipeError, TicketError, unknown
from fastlth.exchange import foreign, matching, target
from fastlth.exchange.foreign import Foreign
from fastlth.masks import Masks, nested
from fastlth.models import skeleton, state, weight_names
from fastlth.recipe import LAST_ROUND, Recipe
from fastlth.store import ticket as files
from fastlth.store.ticket import Ticket
from fastlth.tickets import theta0

FORMATS: dict[str, Callable[[Path], Foreign]] = {
    "torch-prune": foreign.torch_prune,
    "open-lth": foreign.open_lth,
    "safetensors": foreign.safetensors,
}

# Of a round's result in ``find-ticket --json``, what only training would tell.
UNMEASURED = (
    "early_stop_iteration", "early_stop_validation_loss", "early_stop_validation_accuracy",
    "early_stop_test_accuracy", "test_accuracy", "train_accuracy", "engine", "seconds", "images_per_second",
)  # fmt: skip


@dataclass(frozen=True)
class Imported:
    """What ``import_ticket`` made."""

    ticket: Ticket
    notes: tuple[str, ...]
    """sentences a user should read: where the rewind values come from"""


def import_ticket(
    source: Path, out: Path, *, format: str, model: str | None = None, dataset: str | None = None,
    settings: Mapping[str, Any] | None = None, force: bool = False,
) -> Imported:  # fmt: skip
    """Write a ticket file whose round 0 is dense and whose next rounds have the masks found in ``source``.

    ``model``, ``dataset`` and ``settings`` name the net and its recipe; our own safetensors bring theirs. Results
    of training are null. Raises TicketError for a file that is damaged, holds more than tensors, does not fit the
    net, or whose masks are not nested; RecipeError; OutputError where ``out`` is taken or cannot be written.
    """
    if format not in FORMATS:
        raise RecipeError(unknown("format", format, FORMATS))
    target.check(out, source=source, force=force)
    found = FORMATS[format](source)
    recipe = _recipe(found, format, model, dataset, settings or {})
    if not recipe.prune.rewinds:
        raise RecipeError(f"the recipe has actions {recipe.prune.mask_1} (mask-1) and {recipe.prune.mask_0} (mask-0), "
                          "but an imported ticket is of rewind values and masks alone; give --set prune.mask_1=none "
                          "--set prune.mask_0=mask, and the file's values become the rewind values")  # fmt: skip
    try:
        ticket, notes = _ticket(found, recipe)
    except TicketError as error:
        raise TicketError(f"{source} does not make a ticket of {recipe.model.name} on {recipe.data.name}: "
                          f"{error}") from error  # fmt: skip
    with target.writing(out):
        files.save(out, ticket)
    return Imported(ticket, (*found.notes, *notes))


def _recipe(found: Foreign, format: str, model: str | None, dataset: str | None, settings: Mapping[str, Any]) -> Recipe:
    if found.recipe is None:
        if model is None or dataset is None:
            raise RecipeError(f"--format {format} needs --model and --dataset, since such files do not name them; "
                              "give both")  # fmt: skip
        return compose(model, dataset, settings=settings).recipe
    named = {"model.name": model, "data.name": dataset, **settings}
    recipe = adjust(found.recipe, {key: value for key, value in named.items() if value is not None})
    if (recipe.model, recipe.data.name) != (found.recipe.model, found.recipe.data.name):
        raise RecipeError(f"the file is of {found.recipe.model.name} on {found.recipe.data.name}, and so is its "
                          "recipe; leave out --model and --dataset")  # fmt: skip
    return recipe


def _ticket(found: Foreign, recipe: Recipe) -> tuple[Ticket, list[str]]:
    net = skeleton(recipe)
    rounds = matching.masks(found, net)
    pruned_at = _pruned_at(rounds)
    notes = []
    if found.state:
        values = matching.rewind(found, net)
    elif recipe.prune.rewind_to == 0:
        values = theta0(recipe)
        notes.append(f"it has no rewind values: theta0 is that of seed {recipe.seeds.base}, made by fastlth")
    else:
        raise TicketError(f"it has no rewind values, and a seed gives those of iteration 0 only; "
                          f"leave out prune.rewind_to={recipe.prune.rewind_to}")  # fmt: skip
    shapes = state(net)
    ticket = Ticket(
        recipe=recipe, resolved={}, rewind=values, rewind_iteration=recipe.prune.rewind_to, pruned_at=pruned_at,
        all_weights=sum(shapes[name].numel() for name in weight_names(net)), rounds=({},) * len(rounds),
    )  # fmt: skip
    results = tuple(
        {"round": k, "density": ticket.density(k), "kept": ticket.kept(k), **dict.fromkeys(UNMEASURED)}
        for k in range(len(rounds))
    )
    return dataclasses.replace(ticket, rounds=results), notes


def _pruned_at(rounds: Sequence[Masks]) -> dict[str, NDArray[np.uint8]]:
    if len(rounds) > LAST_ROUND + 1:
        raise TicketError(f"it has {len(rounds) - 1} rounds of pruning, a ticket at most {LAST_ROUND}; "
                          "give fewer levels")  # fmt: skip
    pruned_at = {name: np.zeros(mask.shape, np.uint8) for name, mask in rounds[0].items()}
    for k, (before, after) in enumerate(pairwise(rounds), start=1):
        if not nested(after, before):
            raise TicketError(f"the mask of round {k} keeps weights that round {k - 1} had removed, and a ticket's "
                              "masks are nested; give the rounds of one search")  # fmt: skip
        for name, at in pruned_at.items():
            at[(before[name] & ~after[name]).numpy()] = k
    return pruned_at
