"""One training of a control run, in a folder of its own: it can be stopped, goes on, and is made once.

result.json         the training is done; nothing is trained again
state.safetensors   where a stopped training goes on
metrics.jsonl       every event, as in a search
mask.safetensors    what the net kept, one bit per weight
weights/            the trained net, where a later training needs it
lock                who is writing
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlth import copies
from fastlth import masks as mask_tools
from fastlth.analysis import collapses, layer_records, net_units
from fastlth.errors import DivergedError, Stopped, TicketError
from fastlth.masks import Masks
from fastlth.metrics import record
from fastlth.recipe import Recipe
from fastlth.search import InRound, RoundStarted, round_result
from fastlth.store import atomic, container, strict_json, weights
from fastlth.store.lock import Lock
from fastlth.store.metrics_file import MetricsFile
from fastlth.store.run import State
from fastlth.training.engines.base import Engine
from fastlth.training.trainer import ChunkDone, Progress, train

_STATE = {"format": "fastlth branch state", "schema": "1"}
_MASK = {"format": "fastlth mask", "schema": "1"}


@dataclass(frozen=True)
class TrialStarted:
    """A training begins, or goes on."""

    trial: Trial
    density: float
    iteration: int
    """where it begins or goes on"""
    collapsed: Mapping[str, str]
    """layers that let nothing through, and what is to be said of them"""


@dataclass(frozen=True)
class TrialFinished:
    """``result`` is as in ``find-ticket --json``."""

    trial: Trial
    result: Mapping[str, Any]


Show = Callable[[Any], None]
"""gets TrialStarted, RoundStarted, InRound and TrialFinished, and whatever else an experiment announces"""
Stop = Callable[[], int | None]


@dataclass(frozen=True)
class Start:
    """What a training begins with."""

    masks: Masks
    values: Mapping[str, Tensor]
    """every parameter and buffer, unmasked"""
    first: int
    """the iteration of the schedule and of the data order at which it begins"""


@dataclass(frozen=True)
class Trial:
    """Training number ``number`` of a branch on round ``round``."""

    branch: Path
    digest: str
    """of the branch: a state of another one is refused"""
    round: int
    number: int = 0

    @property
    def folder(self) -> Path:
        """Where it keeps what it has."""
        return self.branch / f"round-{self.round}" / f"trial-{self.number}"

    def result(self) -> dict[str, Any] | None:
        """What the finished training came to, as in ``find-ticket --json``, or None. Raises TicketError."""
        file = self.folder / "result.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise TicketError(f"{file} cannot be read ({error}); remove {self.folder} to train it again") from error
        return dict(found)

    def masks(self, shapes: Mapping[str, Sequence[int]]) -> Masks:
        """What the finished training's net kept; ``shapes`` are those of the model's weights. Raises TicketError."""
        packed, metadata = container.read(self.folder / "mask.safetensors")
        if {k: metadata.get(k) for k in _MASK} != _MASK or not packed.keys() <= shapes.keys():
            raise TicketError(f"{self.folder} holds no mask of this net; remove it to train it again")
        found = {}
        for name in (n for n in shapes if n in packed):
            count = int(np.prod(shapes[name]))
            kept = np.unpackbits(packed[name], count=count).astype(bool)
            found[name] = torch.from_numpy(kept.reshape(shapes[name]))
        return found

    def trained(self, masks: Masks) -> dict[str, Tensor]:
        """The trained net that ``keep`` left, pruned weights 0. Raises TicketError."""
        if not weights.path(self.folder, self.round).exists():
            raise TicketError(f"{self.folder} has no trained net any more; remove {self.branch} to train it all again")
        arrays = weights.load(self.folder, self.round, {n: m.numpy() for n, m in masks.items()}, self.digest)
        return copies.tensors(arrays)

    def drop_trained(self) -> None:
        """Remove the trained net that ``keep`` left, if it is there."""
        atomic.delete(weights.path(self.folder, self.round))

    def run(
        self, recipe: Recipe, engine: Engine, start: Callable[[], Start], *, keep: bool = False,
        show: Show = lambda _: None, stopped: Stop = lambda: None,
    ) -> dict[str, Any]:  # fmt: skip
        """Train, or go on, or read the result; ``keep`` also stores the trained net.

        Raises Stopped where ``stopped`` returns a signal number, DivergedError, RunLockedError, and else as all
        that writes does.
        """
        if done := self.result():
            return done
        atomic.make_folders(self.folder)
        with self._locked():
            if done := self.result():
                return done
            begin = start()
            engine.set_masks(begin.masks)
            engine.rewind(begin.values)
            progress = Progress(begin.first)
            state = self._state()
            if state is not None:
                engine.load_state(copies.tensors(state.arrays))
                progress = Progress.from_json(state.info["progress"])
            return self._train(recipe, engine, begin, progress, state, keep, show, stopped)

    def _train(
        self, recipe: Recipe, engine: Engine, begin: Start, progress: Progress, state: State | None,
        keep: bool, show: Show, stopped: Stop,
    ) -> dict[str, Any]:  # fmt: skip
        masks = begin.masks
        kept = mask_tools.kept(masks)
        live = engine.weights()
        everything = sum(live[n].numel() for n in engine.weight_names)
        unpruned = everything - sum(m.numel() for m in masks.values())
        density = (kept + unpruned) / everything
        with MetricsFile(self.folder / "metrics.jsonl") as metrics:
            metrics.cut(int(state.info["metrics_bytes"]) if state else 0)
            collapsed = collapses(net_units(recipe, copies.arrays(masks))) if masks else {}
            show(TrialStarted(self, density, progress.iteration, collapsed))
            show(RoundStarted(self.round, kept, everything - unpruned, density, progress.iteration))
            saved, cost = time.monotonic(), 0.0
            try:
                for event in train(engine, recipe, progress):
                    inside = InRound(self.round, event, functools.partial(_state, engine, progress, metrics))
                    if line := record(inside):
                        metrics.write(line)
                    show(inside)
                    if not isinstance(event, ChunkDone):
                        continue
                    number = stopped()
                    if number or time.monotonic() - saved >= max(recipe.store.save_every, 50 * cost):
                        began = time.monotonic()
                        self._save(_state(engine, progress, metrics))
                        saved = time.monotonic()
                        cost = saved - began
                    if number:
                        raise Stopped("stopped and saved; the same command goes on", number)
            except DivergedError as error:
                raise DivergedError(f"{self.folder}: {error}") from None
            result = {**round_result(engine, recipe, progress, self.round, density, kept), "trial": self.number}
            metrics.write({"event": "round", **result})
            for line in self._of_layers(recipe, begin, engine):
                metrics.write(line)
            metrics.sync()
        self._finish(result, masks, engine if keep else None)
        show(TrialFinished(self, result))
        return result

    def _of_layers(self, recipe: Recipe, begin: Start, engine: Engine) -> Iterator[dict[str, Any]]:
        """What masks look like; of a net whose scores are trained nothing."""
        if begin.masks:
            yield from layer_records(recipe, self.round, copies.arrays(begin.masks), None, copies.arrays(begin.values),
                                     copies.arrays(engine.weights()))  # fmt: skip

    def _finish(self, result: Mapping[str, Any], masks: Masks, engine: Engine | None) -> None:
        """The result comes last: where it is, everything is."""
        arrays = {n: m.cpu().numpy() for n, m in masks.items()}
        container.write(self.folder / "mask.safetensors", {n: np.packbits(m) for n, m in arrays.items()}, _MASK)
        if engine is not None:
            weights.save(self.folder, self.round, copies.arrays(engine.weights()), arrays, self.digest)
        atomic.write(self.folder / "result.json", strict_json.dumps(dict(result)).encode() + b"\n")
        atomic.delete(self.folder / "state.safetensors")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = Lock(self.folder / "lock")
        try:
            atomic.sweep(self.folder)
            yield
        finally:
            lock.release()

    def _save(self, state: State) -> None:
        metadata = {**_STATE, "branch": self.digest, "info": strict_json.dumps(dict(state.info))}
        container.write(self.folder / "state.safetensors", state.arrays, metadata)

    def _state(self) -> State | None:
        file = self.folder / "state.safetensors"
        if not file.exists():
            return None
        arrays, metadata = container.read(file)
        if {k: metadata.get(k) for k in _STATE} != _STATE or metadata.get("branch") != self.digest:
            raise TicketError(f"{file} is of another branch; remove {self.folder} to train it again")
        return State(arrays, strict_json.loads(metadata["info"]))


def _state(engine: Engine, progress: Progress, metrics: MetricsFile) -> State:
    metrics.sync()
    return State(copies.arrays(engine.state()), {"progress": progress.to_json(), "metrics_bytes": metrics.bytes})
