"""Reading tickets back: the masks of any round, and the net that they make."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastlth import copies
from fastlth.errors import RecipeError
from fastlth.masks import Masks
from fastlth.models import build, drawn, loaded, skeleton, state, weight_names
from fastlth.pruning import actions
from fastlth.recipe import Recipe
from fastlth.store import ticket as files
from fastlth.store import weights


@dataclass(frozen=True)
class LoadedTicket:
    """A search's tickets: one per round, all in one file."""

    file: files.Ticket
    folder: Path
    """where it was read from"""

    def __repr__(self) -> str:
        """In a line: a notebook shows it."""
        recipe, last = self.recipe, max(len(self.rounds) - 1, 0)
        return (f"<ticket of {recipe.model.name} on {recipe.data.name}, seed {recipe.seeds.base}: rounds 0 to {last}, "
                f"density {self.file.density(last):.2%}, in {self.folder}>")  # fmt: skip

    @property
    def recipe(self) -> Recipe:
        """The recipe of the search that found it."""
        return self.file.recipe

    @property
    def rounds(self) -> tuple[Mapping[str, Any], ...]:
        """Result of each finished round, as in ``find-ticket --json``."""
        return self.file.rounds

    def mask(self, round: int) -> Masks:
        """bool tensors of the weights' shapes, True = kept. Raises RecipeError for a round that is not there."""
        return {name: torch.from_numpy(mask) for name, mask in self.file.mask(round).items()}

    def rewind(self) -> dict[str, Tensor]:
        """theta_k: every parameter and buffer, unmasked."""
        return copies.tensors(self.file.rewind)

    def start(self, round: int) -> dict[str, Tensor]:
        """What a round starts with: every parameter and buffer, kept weights as the mask-1 action makes them from
        theta_k, pruned ones as the mask-0 action does (ordinarily theta_k and zero). Round 0 gives theta_k itself, from
        which a search that rewinds late did not train it. Raises RecipeError as ``mask``.
        """
        self.mask(round)  # raises for a round that is not there
        fill, pruned_at = copies.tensors(self.file.fill), copies.tensors(self.file.pruned_at)
        numbers = {name: i for i, name in enumerate(weight_names(skeleton(self.recipe)))}
        return actions.start(self.recipe.prune, self.rewind(), pruned_at, fill, numbers=numbers, round=round,
                             key=self.recipe.seeds.key("prune"),
                             draw=functools.partial(drawn, self.recipe))  # fmt: skip

    def trained_mask(self, round: int) -> Masks:
        """The weights that a round trains: those of its mask, or all with mask-0 action original."""
        return {name: torch.from_numpy(mask) for name, mask in self.file.trained_mask(round).items()}

    def model(self, round: int) -> nn.Module:
        """The winning-ticket candidate of a round: the net as the round starts with it, untrained."""
        return loaded(self.recipe, self.start(round))

    def trained(self, round: int) -> nn.Module:
        """The net as the round's training left it. Raises TicketError unless the search kept its weights."""
        arrays = weights.load(self.folder, round, self.file.trained_mask(round), self.recipe.digest)
        values = copies.tensors(arrays)
        if self.recipe.prune.fills:
            start = self.start(round)
            values |= {name: torch.where(m, values[name], start[name]) for name, m in self.mask(round).items()}
        return loaded(self.recipe, values)


def load_ticket(path: str | Path) -> LoadedTicket:
    """Read ``search.ticket``. Raises TicketError if it is damaged or not a ticket."""
    ticket = files.load(Path(path), theta0)
    try:
        order = {name: i for i, name in enumerate(skeleton(ticket.recipe).state_dict())}  # the file's is alphabetical
    except RecipeError:  # a net of others that is not here; its masks can be looked at all the same
        order = {}
    masks = dict(sorted(ticket.pruned_at.items(), key=lambda item: order.get(item[0], len(order))))
    return LoadedTicket(dataclasses.replace(ticket, pruned_at=masks), Path(path).parent)


def theta0(recipe: Recipe) -> dict[str, NDArray[Any]]:
    """The initial parameters and buffers of a recipe, made from its seed."""
    return {name: tensor.numpy() for name, tensor in state(build(recipe)).items()}
