"""A search opened for control runs: its recipe, tickets, data and machine settings, read without locking it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from fastlth_kernels.philox import Key, philox
from torch import Tensor

from fastlth import masks as mask_tools
from fastlth.data.sources import Source, load_for
from fastlth.errors import RecipeError, Stopped, TicketError
from fastlth.experiments.control import Control
from fastlth.experiments.settled import settled
from fastlth.experiments.trial import Show, Start, Stop, Trial
from fastlth.masks import Masks
from fastlth.models import build, drawn, skeleton, state, weight_names, weight_stds
from fastlth.models.init import normal
from fastlth.pruning import layer_rates
from fastlth.recipe import PruneSection, Recipe, SeedsSection
from fastlth.store import weights
from fastlth.store.run import RECIPE, TICKET, read_recipe, run_folders
from fastlth.tickets import LoadedTicket, load_ticket
from fastlth.training.engines.make import make_engine

VALUES, MASKS, NOISE = 0, 1, 2  # what a trial draws; never renumber


class Workbench:
    """What every kind of branch needs of a search in ``path``, an r<seed> folder.

    ``recipe`` is the search's own one without mask actions and early bird: controls are plain masked nets that are
    trained to the end.
    """

    def __init__(self, path: Path, data_dir: str | Path | None, show: Show, stopped: Stop) -> None:
        self.path = run_folder(path)
        asked, self.resolved = read_recipe(self.path / RECIPE)
        self.recipe = dataclasses.replace(asked, prune=plain(asked.prune))
        self.ticket: LoadedTicket | None = None
        if (self.path / TICKET).exists():
            self.ticket = load_ticket(self.path / TICKET)
        self.source: Source = load_for(self.recipe.data, data_dir)
        self.show, self.stopped = show, stopped
        model = skeleton(self.recipe)
        parameters = dict(model.named_parameters())
        self.shapes = {n: tuple(parameters[n].shape) for n in weight_names(model)}
        self.numbers = {n: i for i, n in enumerate(self.shapes)}
        self.prunable = {n: self.shapes[n] for n in layer_rates(self.shapes, self.recipe.prune)}

    def ask(self) -> None:
        """Between the parts of what has no state to save. Raises Stopped."""
        if number := self.stopped():
            raise Stopped("stopped; what was trained is kept, and the same command goes on", number)

    def finished(self) -> LoadedTicket:
        """The search's tickets. Raises TicketError before its first round is done."""
        if self.ticket is None or not self.ticket.rounds:
            raise TicketError(f"{self.path} has no finished round yet; go on with: fastlth resume {self.path}")
        return self.ticket

    def folder(self, control: Control, recipe: Recipe) -> tuple[Path, str]:
        """Where the branch lies, and its digest."""
        return self._folder(control.kind, control.digest(recipe.digest))

    def _folder(self, kind: str, digest: str) -> tuple[Path, str]:
        return self.path / "branches" / branch_name(kind, digest), digest

    def settle(self, recipe: Recipe, folder: Path) -> Recipe:
        """``recipe`` without ``auto``, which becomes what it is in the search, so that bits agree."""
        known = self.resolved if recipe.compute == self.recipe.compute else None
        return settled(recipe, folder, lambda candidate: make_engine(candidate, self.source), known)

    def theta0(self) -> dict[str, Tensor]:
        """The initial values, also where the ticket holds those of a later iteration."""
        if self.ticket is not None and self.ticket.file.rewind_iteration == 0:
            return self.ticket.rewind()
        return state(build(self.recipe))

    def fresh(self, key: Key) -> dict[str, Tensor]:
        """A new draw from the initial distribution, biases and batch norm included."""
        return drawn(self.recipe, key)

    def noisy(self, values: Mapping[str, Tensor], sigma: float, key: Key) -> dict[str, Tensor]:
        """``values`` with Gaussian noise on every Linear and Conv weight, ``sigma`` times as wide as the distribution
        that the layer's initial values are drawn from (Frankle & Carbin 2019, appendix F.7)."""
        noisy = {n: t.clone() for n, t in values.items()}
        for name, std in self._spreads().items():
            noise = sigma * std * normal(self.numbers[name], noisy[name].numel(), key)
            noisy[name] += torch.from_numpy(noise.astype(np.float32)).view(noisy[name].shape)
        return noisy

    def _spreads(self) -> dict[str, float]:
        if not self.recipe.model.own_values:
            return weight_stds(self.recipe)
        theta0 = self.theta0()  # nobody knows what their constructor draws from
        return {name: float(theta0[name].double().std(correction=0)) for name in self.shapes}

    def dense(self) -> dict[str, Tensor]:
        """The weights that the search's round 0 ended with: kept ones, else the round is trained again and kept.

        The same bits where machine, threads and versions are the search's.
        """
        whole, ticket = self.full_masks(), self.finished()
        if weights.path(self.path, 0).exists():
            arrays = weights.load(self.path, 0, {n: m.numpy() for n, m in whole.items()}, ticket.recipe.digest)
            return {n: torch.from_numpy(a.copy()) for n, a in arrays.items()}
        if ticket.recipe.prune.early_bird:
            raise RecipeError("an early bird ended this search's dense round, so training it whole would give another "
                              "net; search with --keep-weights all, or without --early-bird")  # fmt: skip
        folder, digest = self._folder("dense", self.recipe.digest)
        trial = Trial(folder, digest, 0)
        if trial.result() is None:
            ready = self.settle(self.recipe, folder)
            trial.run(ready, make_engine(ready, self.source), lambda: Start(whole, self.theta0(), 0), keep=True,
                      show=self.show, stopped=self.stopped)  # fmt: skip
        return trial.trained(whole)

    def full_masks(self) -> Masks:
        """Masks that keep everything."""
        return mask_tools.full({n: torch.empty(s) for n, s in self.prunable.items()})


def branch_name(kind: str, digest: str) -> str:
    """The folder of a branch in RUN/branches."""
    return f"{kind}-{digest[:8]}"


def draw_key(seeds: SeedsSection, what: int, round: int, trial: int) -> Key:
    """The key of one draw: every (what, round, trial) has its own, and all follow from the search's seed."""
    w0, w1, _, _ = philox(round, trial, what, 0, seeds.key("branch"))
    return w0, w1


def run_folder(path: Path) -> Path:
    """``path`` itself if it is a run, or the only run in it. Raises TicketError."""
    if (path / RECIPE).exists():
        return path
    found = run_folders(path)
    if len({seed for seed, _ in found}) != 1 or not (found[max(found)] / RECIPE).exists():
        names = ", ".join(f.name for f in found.values()) or "none"
        raise TicketError(f"{path} is not one run; give one r<seed> folder (here: {names}; 'fastlth runs' lists all)")
    return found[max(found)]


def plain(prune: PruneSection) -> PruneSection:
    """``prune`` as controls have it: without mask actions and early bird."""
    return dataclasses.replace(
        prune, mask_1="none", mask_0="mask", actions="paper", reinit="permute", constant=None, early_bird=0.0
    )
