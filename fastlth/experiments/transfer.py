"""Ticket transfer (Morcos et al. 2019, "One ticket to win them all"): a ticket found on one data set or with one
optimizer, trained on another.

A ticket is mask and rewind values; it is trained with the whole schedule from iteration 0. Layers whose shape the
other data changes (the output layer for another number of classes, the first fully connected one for another image
size) are drawn fresh and kept whole. The control is a random ticket: all masks permuted together, over all layers,
and every value drawn fresh.

    RUN/branches/transfer-<digest8>/round-<k>/trial-0/
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fastlth_kernels.philox import Key
from torch import Tensor

from fastlth.catalogue import dataset_name
from fastlth.composition import adjust, without_effect
from fastlth.data.sources import load_for
from fastlth.errors import RecipeError
from fastlth.experiments.settled import settled
from fastlth.experiments.trial import Show, Start, Stop, Trial
from fastlth.experiments.workbench import branch_name
from fastlth.masks import Masks
from fastlth.models import draw, skeleton, state, weight_names
from fastlth.pruning import layer_rates
from fastlth.pruning.draws import permutation
from fastlth.recipe import Recipe
from fastlth.search import winning_or_last
from fastlth.store import strict_json
from fastlth.tickets import LoadedTicket
from fastlth.training.engines.make import make_engine

# What another optimizer brings of its own where it is not given (Morcos et al. 2019, section 3).
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {
        "train.lr": 0.1,
        "train.momentum": 0.9,
        "train.nesterov": False,
        "train.betas": (0.9, 0.999),  # for the others alone, and so at their defaults
        "train.eps": 1e-8,
    },
    "adam": {"train.lr": 3e-4, "train.momentum": 0.0, "train.nesterov": False},
    "adamw": {"train.lr": 3e-4, "train.momentum": 0.0, "train.nesterov": False},
}
_SHUFFLE = 18  # the last word of the counters, apart from pruning/draws.py; never renumber


def transfer(
    ticket: LoadedTicket, dataset: str, *, round: int | None = None, random_ticket: bool = False,
    settings: Mapping[str, Any] | None = None, data_dir: str | Path | None = None,
    stopped: Stop = lambda: None, show: Show = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """The document of ``transfer --json``: one round in the form of ``find-ticket --json``.

    ``round`` is the winning ticket's where not given, the last one's if there is none. The recipe is the ticket's own
    but for the data set and ``settings``. The same call goes on where it stopped. Raises RecipeError for settings that
    do not fit the other data or a round that is not there, Stopped, DivergedError, RunLockedError.
    """
    round = winning_or_last(ticket.rounds) if round is None else round
    recipe = target(ticket.recipe, dataset, settings or {})
    for note in without_effect(settings or {}, recipe):
        show(note)
    start, fresh = random_start(ticket, recipe, round) if random_ticket else carried(ticket, recipe, round)
    for name, (before, now) in fresh.items():
        show(f"{name} is drawn fresh and kept whole: its weights are {now} for {recipe.data.name}, not {before}")

    digest = transfer_digest(ticket.recipe, recipe, random_ticket)
    folder = ticket.folder / "branches" / branch_name("transfer", digest)
    source = load_for(recipe.data, data_dir)
    known = ticket.file.resolved if recipe.compute == ticket.recipe.compute else None
    ready = settled(recipe, folder, lambda candidate: make_engine(candidate, source), known)
    result = Trial(folder, digest, round).run(ready, make_engine(ready, source), lambda: start,
                                              show=show, stopped=stopped)  # fmt: skip
    return {
        "run": str(ticket.folder), "branch": str(folder), "dataset": recipe.data.name, "random_ticket": random_ticket,
        "fresh_layers": list(fresh), "recipe_digest": recipe.digest, "rounds": [result], "winning_round": None,
    }  # fmt: skip


def transfer_digest(search: Recipe, recipe: Recipe, random_ticket: bool) -> str:
    """What names the trainings of a search's tickets with ``recipe``, which is that of ``target``."""
    identity = [search.digest, recipe.digest, dataclasses.asdict(recipe.seeds), random_ticket]
    return hashlib.sha256(strict_json.dumps(identity).encode()).hexdigest()


def target(recipe: Recipe, dataset: str, settings: Mapping[str, Any]) -> Recipe:
    """``recipe`` on another data set, with ``settings``. Another ``train.optimizer`` brings what ``OPTIMIZERS`` says of
    it where ``settings`` do not. The hold-out of the same data set stays. Rewind point and early bird made the ticket
    and have no part in its training, which begins at iteration 0 and runs to the end."""
    _check_given(settings)
    if not recipe.prune.rewinds:
        raise RecipeError(f"transfer needs a ticket of rewind values and zeros; this one was found with mask_1 "
                          f"{recipe.prune.mask_1} and mask_0 {recipe.prune.mask_0}")  # fmt: skip
    name = dataset_name(dataset)
    changes: dict[str, Any] = {"data.name": name}
    if name != recipe.data.name:
        changes["data.validation"] = -1
    else:
        changes["seeds.split"] = recipe.seeds.key("split")[0]
    optimizer = settings.get("train.optimizer", recipe.train.optimizer)
    if optimizer != recipe.train.optimizer:
        changes |= OPTIMIZERS.get(str(optimizer), {})
    prune = dataclasses.replace(recipe.prune, rewind_to=0, early_bird=0.0)
    return adjust(dataclasses.replace(recipe, prune=prune), {**changes, **settings})


def _check_given(settings: Mapping[str, Any]) -> None:
    for name in settings:
        if name == "data.name":
            raise RecipeError("data.name cannot be set, since the data set is given as DATASET; name it there")
        of_ticket = name.split(".")[0] in ("model", "prune", "store") or name in ("seeds.init", "seeds.prune")
        if of_ticket and name != "model.dropout":
            raise RecipeError(f"{name} belongs to the ticket, which is trained as it is; search again with another one")


def carried(ticket: LoadedTicket, recipe: Recipe, round: int) -> tuple[Start, dict[str, tuple[str, str]]]:
    """The ticket of ``round`` in the recipe's net; layer -> (its weights' shape before, now) of those drawn fresh."""
    values, rewind = _fresh(recipe), ticket.rewind()
    if other := sorted(values.keys() ^ rewind.keys()):
        raise RecipeError(f"the net for {recipe.data.name} has other layers than the ticket's ({other[0]}) and cannot "
                          "take it; let only shapes depend on the data")  # fmt: skip
    changed: dict[str, tuple[str, str]] = {}
    for name, value in values.items():
        if value.shape != rewind[name].shape:
            changed.setdefault(_layer(name), (_shape(rewind[name]), _shape(value)))  # a weight comes before its bias
    for name in values:
        if _layer(name) not in changed:
            values[name] = rewind[name]
    shapes = {n: values[n].shape for n in weight_names(skeleton(recipe))}
    masks = ticket.mask(round)
    whole = {n: torch.ones(shapes[n], dtype=torch.bool) for n in layer_rates(shapes, recipe.prune)}
    return Start({n: w if _layer(n) in changed else masks[n] for n, w in whole.items()}, values, 0), changed


def random_start(ticket: LoadedTicket, recipe: Recipe, round: int) -> tuple[Start, dict[str, tuple[str, str]]]:
    """As ``carried``, with masks that keep as many weights over all layers together and values drawn fresh."""
    start, changed = carried(ticket, recipe, round)
    fits = {n: m for n, m in start.masks.items() if _layer(n) not in changed}
    return Start({**start.masks, **shuffled(fits, recipe.seeds.key("branch"))}, _fresh(recipe), 0), changed


def shuffled(masks: Masks, key: Key) -> Masks:
    """One random permutation of all masks laid end to end."""
    if not masks:
        return {}
    flat = torch.cat([m.reshape(-1) for m in masks.values()])
    mixed = flat[permutation(torch.arange(flat.numel()), 0, 0, key, _SHUFFLE)]
    parts = torch.split(mixed, [m.numel() for m in masks.values()])
    return {n: part.view(m.shape) for (n, m), part in zip(masks.items(), parts, strict=True)}


def _fresh(recipe: Recipe) -> dict[str, Tensor]:
    """Values from the initial distribution, by the stream ``branch``: another draw than theta0 of the same seed."""
    return state(draw(recipe, recipe.seeds.key("branch")))


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _shape(tensor: Tensor) -> str:
    return "x".join(str(n) for n in tensor.shape)
