"""Reading tickets back: the masks of any round, and the net that they make."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastlth.masks import Masks
from fastlth.models import build, skeleton
from fastlth.recipe import Recipe
from fastlth.store import ticket as files
from fastlth.store import weights


@dataclass(frozen=True)
class LoadedTicket:
    """A search's tickets: one per round, all in one file."""

    file: files.Ticket
    folder: Path
    """where it was read from"""

    @property
    def recipe(self) -> Recipe:
        return self.file.recipe

    @property
    def rounds(self) -> tuple[Mapping[str, Any], ...]:
        """Result of each finished round, as in ``find-ticket --json``."""
        return self.file.rounds

    def mask(self, round: int) -> Masks:
        """bool tensors of the weights' shapes, True = kept. Raises TicketError for a round that is not there."""
        return {name: torch.from_numpy(mask) for name, mask in self.file.mask(round).items()}

    def rewind(self) -> dict[str, Tensor]:
        """theta_k: every parameter and buffer, unmasked."""
        return {name: torch.from_numpy(np.array(a)) for name, a in self.file.rewind.items()}

    def model(self, round: int) -> nn.Module:
        """The winning-ticket candidate of a round: the net at theta_k with its pruned weights at zero, untrained."""
        state, masks = self.rewind(), self.mask(round)
        for name, mask in masks.items():
            state[name] = state[name].masked_fill(~mask, 0.0)
        return self._net(state)

    def trained(self, round: int) -> nn.Module:
        """The net as the round's training left it. Raises TicketError unless the search kept its weights."""
        arrays = weights.load(self.folder, round, self.file.mask(round), self.recipe.digest)
        return self._net({name: torch.from_numpy(np.array(a)) for name, a in arrays.items()})

    def _net(self, state: Mapping[str, Tensor]) -> nn.Module:
        model = skeleton(self.recipe).to_empty(device="cpu")
        model.load_state_dict(state)
        return model


def load_ticket(path: str | Path) -> LoadedTicket:
    """Read ``search.ticket``. Raises TicketError if it is damaged or not a ticket."""
    ticket = files.load(Path(path), theta0)
    order = {name: i for i, name in enumerate(skeleton(ticket.recipe).state_dict())}  # the file's is alphabetical
    masks = dict(sorted(ticket.pruned_at.items(), key=lambda item: order.get(item[0], len(order))))
    return LoadedTicket(dataclasses.replace(ticket, pruned_at=masks), Path(path).parent)


def theta0(recipe: Recipe) -> dict[str, NDArray[Any]]:
    """The initial parameters and buffers of a recipe, made from its seed."""
    return {name: tensor.detach().numpy() for name, tensor in build(recipe).state_dict().items()}
