"""R replicates of any net in one graph: each trains on a stream of its own, side by side with the others.

    begin --+-- step of replicate 0 --+-- end
            +-- step of replicate 1 --+
            +-- ...                 --+

For nets whose step has too little work in it for a whole GPU, but enough layers and images that a batched net gains
nothing. The kernels are those of a single run, so each replicate is the run of its seed bit for bit (on CUDA with
``--deterministic``). On other devices the replicates' steps are made one after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from fastlth.data.sources import Source
from fastlth.recipe import Recipe
from fastlth.training.engines import graph
from fastlth.training.engines.base import Chunk, Tensors
from fastlth.training.engines.graph import GraphEngine
from fastlth.training.engines.in_step import InStep
from fastlth.training.engines.make import make_order, make_splits
from fastlth.training.evaluate import Scores


def unsupported(recipe: Recipe) -> str | None:
    """Why replicates of the recipe cannot be trained side by side, as a clause; None if they can."""
    if recipe.model.dropout and recipe.compute.compile == "on":
        return "compute.compile is on, and each seed's dropout is compiled by itself"
    if recipe.prune.early_bird:
        return "prune.early_bird ends the rounds of replicates at different times"
    return graph.unsupported(recipe)


class Streams:
    """``recipes`` differ in their base seed alone, and their compute section is resolved. No round is trained as a
    smaller net, since one graph serves all replicates."""

    def __init__(self, recipes: Sequence[Recipe], source: Source, *, dtype: torch.dtype = torch.float32) -> None:
        self.engines = [_lane(r, source, dtype) for r in recipes]
        self.device = self.engines[0].device
        self.in_step = InStep(len(recipes), self._make)
        self.members = [StreamMember(self, r) for r in range(len(recipes))]
        self._steps: dict[int, Callable[[], object]] = {}
        if self.device.type == "cuda":
            from fastlth.training.engines.capture import capture

            with self.engines[0].settings(), torch.enable_grad():
                found = capture(self.engines)
            self._steps = found.steps
            for engine, evaluation in zip(self.engines, found.evaluations, strict=True):
                engine.evaluate_by(evaluation)

    def _make(self, first: int, last: int, who: Collection[int]) -> None:
        for r, engine in enumerate(self.engines):
            if r not in who:  # it trains along, and nobody looks at its record
                engine.record.clear()
        self.advance(first, last)
        self.wait()

    def wait(self) -> None:
        """For the device, which may still be at the steps."""
        self.engines[0].wait()

    def advance(self, first: int, last: int) -> None:
        """Steps of all replicates, and nothing read back."""
        with self.engines[0].settings():
            for size, *_ in zip(*(e.ready(first, last) for e in self.engines), strict=True):
                if size in self._steps:
                    self._steps[size]()
                else:
                    for engine in self.engines:
                        engine.train_step(size)

    def forget(self) -> None:
        """The record of steps begins anew."""
        for engine in self.engines:
            engine.record.clear()


class _Lane(GraphEngine):
    """The graph engine of one replicate, which has a graph of its own for evaluations only."""

    def _captured(self) -> graph.Graphs:
        return {}

    def evaluate_by(self, evaluation: Callable[[], object]) -> None:
        self._graphs = self._whole_graphs = {"evaluate": evaluation}


def _lane(recipe: Recipe, source: Source, dtype: torch.dtype) -> _Lane:
    whole = dataclasses.replace(recipe, compute=dataclasses.replace(recipe.compute, compact=0.0))
    splits = make_splits(recipe, source)
    return _Lane(whole, make_order(recipe, len(splits["train"].labels)), splits, dtype=dtype)


class StreamMember:
    """One replicate as an engine of its own."""

    name = "graph"

    def __init__(self, streams: Streams, replicate: int) -> None:
        self.in_step, self._r = streams.in_step, replicate
        self._engine = engine = streams.engines[replicate]
        self.weight_names, self.prunable = engine.weight_names, engine.prunable
        self.layers, self.said = engine.layers, engine.said

    def rewind(self, start: Tensors) -> None:
        with self.in_step.turn:
            self._engine.rewind(start)

    def set_masks(self, masks: Tensors) -> None:
        with self.in_step.turn:
            self._engine.set_masks(masks)

    def run(self, first: int, last: int) -> Chunk:
        seconds = self.in_step.run(self._r, first, last)
        with self.in_step.turn:
            return self._engine.record.chunk(first, last, seconds)

    def interval(self) -> Scores:
        with self.in_step.turn:
            return self._engine.interval()

    def evaluate(self, split: str, images: int | None = None) -> Scores:
        with self.in_step.turn:
            return self._engine.evaluate(split, images)

    def weights(self) -> dict[str, Tensor]:
        return self._engine.weights()

    def state(self) -> dict[str, Tensor]:
        return self._engine.state()

    def load_state(self, state: Tensors) -> None:
        with self.in_step.turn:
            self._engine.load_state(state)

    def __enter__(self) -> StreamMember:
        return self

    def __exit__(self, *_: object) -> None:
        """This replicate is over; the others no longer wait for it."""
        self.in_step.leave(self._r)
