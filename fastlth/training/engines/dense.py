"""The dense engine: ordinary dense tensors on any device, weights kept masked in the update.

On a CPU, layers that ``recipe.compute.kept`` names leave it in the rounds where they are sparse enough: ``kept.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from fastlth import masks as mask_tools
from fastlth.data.loader import Loader
from fastlth.data.normalise import table
from fastlth.data.resident import ResidentLoader
from fastlth.data.sources import Images
from fastlth.models import build, state, weight_names
from fastlth.pruning import layer_rates
from fastlth.recipe import Recipe
from fastlth.training import faults, host
from fastlth.training.engines.base import Chunk, Tensors
from fastlth.training.engines.record import Record
from fastlth.training.evaluate import Scores, evaluate
from fastlth.training.kept import KeptLayers
from fastlth.training.optim import MaskedOptimizer
from fastlth.training.schedule import lr_at
from fastlth.training.shifted import swap
from fastlth.training.step import Share, Step

EVALUATION_BATCH = 1000


class DenseEngine:
    """Eager or compiled, fp32 or bf16 autocast, channels-last or not, PyTorch's layers or the masked kernels:
    ``recipe.compute`` says which, resolved."""

    name = "dense"

    def __init__(self, recipe: Recipe, loader: Loader, splits: dict[str, Images], net: nn.Module | None = None,
                 share: Share | None = None) -> None:  # fmt: skip
        """``net`` is another one to train than the recipe's, unpruned; ``share`` the processes that train it too."""
        compute = recipe.compute
        self._device = torch.device(compute.device)
        self._recipe, self._loader = recipe, loader
        self.said: list[str] = []
        self._evaluation_batch = EVALUATION_BATCH
        self.model = (build(recipe) if net is None else net).to(self._device).train()
        if compute.channels_last == "on":
            self.model.to(memory_format=torch.channels_last)
        if compute.kernels == "triton":
            from fastlth.training.masked_modules import swap_  # imports Triton

            self.model = swap_(self.model)
        swap(self.model, compute.shifted)
        limits = compute.kept if net is None else {}
        self._kept = KeptLayers(self.model, limits, batch=recipe.train.batch_size, threads=compute.threads)
        if share is not None:
            share.join_(self.model)
        parameters = dict(self.model.named_parameters())
        self.weight_names = weight_names(self.model)
        self.prunable = list(layer_rates(self.weight_names, recipe.prune)) if net is None else []
        self._pruned = {
            n: torch.zeros_like(parameters[n], dtype=torch.bool, memory_format=torch.preserve_format)
            for n in self.prunable
        }
        self._optimizer = MaskedOptimizer(parameters, recipe.train)
        if recipe.prune.fills:
            self._optimizer.fill = {n: parameters[n].detach().clone() for n in self.prunable}
        self._table = table(recipe.data.facts, recipe.data.normalise).to(self._device)
        self._step = Step(
            self.model, self._optimizer, self._pruned, self._table,
            augment=recipe.data.augment, augment_key=recipe.seeds.key("augment"),
            precision=compute.precision, compiled=compute.compile == "on", share=share,
            reseed=recipe.seeds.key("dropout") if recipe.model.own else None,
        )  # fmt: skip
        kept_on = self._device if isinstance(loader, ResidentLoader) else torch.device("cpu")
        self._splits = {
            name: (
                s.pixels if s.name else torch.from_numpy(np.asarray(s.pixels)).to(kept_on),
                torch.from_numpy(s.labels).to(kept_on),
            )
            for name, s in splits.items()
        }
        self._record = Record.of(recipe.evaluate.every, self._device)

    @property
    def layers(self) -> dict[str, str]:
        kept = self._kept.values
        return {name.removesuffix(".weight"): "kept" if name in kept else "dense" for name in self.weight_names}

    def run(self, first: int, last: int) -> Chunk:
        """At most ``evaluate.every`` steps since the last ``interval`` or rewind. One host read, at the end."""
        train, schedule, record = self._recipe.train, self._recipe.schedule, self._record
        rows, iterations = range(record.rows, record.rows + last - first), range(first, last)
        with self._settings():
            for row, iteration, batch in zip(rows, iterations, self._loader.batches(first, last), strict=True):
                self._optimizer.lr.fill_(lr_at(iteration, train.lr, schedule))
                record.losses[row], record.hits[row] = self._step(batch)
                record.images[row] = len(batch.labels)
        record.advance(last - first)
        return record.chunk(first, last)

    def interval(self) -> Scores:
        return self._record.read()

    @torch.no_grad()
    def rewind(self, start: Tensors) -> None:
        for name, tensor in self.weights().items():
            tensor.copy_(start[name])
        for name, fill in self._optimizer.fill.items():
            fill.copy_(start[name])
        self._zero_pruned()
        self._kept.read_in()
        self._optimizer.reset()
        self._record.clear()

    @torch.no_grad()
    def set_masks(self, masks: Tensors) -> None:
        self._kept.write_back()
        mask_tools.copy_(self._pruned, {name: ~m for name, m in masks.items()})
        self._optimizer.hold(self._pruned)
        if self._recipe.compute.kernels == "triton":
            from fastlth.training.masked_modules import write_masks

            write_masks(self.model, masks)
        self._zero_pruned()
        if self._kept.choose(masks):
            self._optimizer.move(self._kept.values)

    def _zero_pruned(self) -> None:
        if self._recipe.prune.fills:
            return
        for name, pruned in self._pruned.items():
            self._optimizer.parameters[name].masked_fill_(pruned, 0.0)

    def evaluate(self, split: str, images: int | None = None) -> Scores:
        pixels, labels = self._splits[split]
        labels = labels[:images]
        asked = self._evaluation_batch
        while True:
            try:
                with self._settings():
                    precision = self._recipe.compute.precision
                    scores = evaluate(self.model, pixels, labels, self._table,
                                      precision=precision, batch=self._evaluation_batch)  # fmt: skip
                break
            except torch.OutOfMemoryError:
                if self._evaluation_batch == 1:
                    raise
            self._evaluation_batch //= 2  # here, and not in the handler, what the failed attempt held is free
        if self._evaluation_batch < asked:
            self.said.append(faults.smaller_evaluation(self._device, asked, self._evaluation_batch))
        return scores

    @contextmanager
    def _settings(self) -> Iterator[None]:
        compute = self._recipe.compute
        with host.settings(compute.threads), host.algorithms(self._device, deterministic=compute.deterministic):
            yield

    def weights(self) -> dict[str, Tensor]:
        self._kept.write_back()
        return state(self.model)

    def state(self) -> dict[str, Tensor]:
        return {
            **{f"model/{n}": t for n, t in self.weights().items()},
            **{f"optimizer/{n}": self._kept.whole(_weight(n), t) for n, t in self._optimizer.state.items()},
            **self._record.state(),
        }  # fmt: skip

    @torch.no_grad()
    def load_state(self, state: Tensors) -> None:
        moments = {f"optimizer/{n}": t for n, t in self._optimizer.state.items()}
        for name, tensor in {**self.state(), **moments}.items():
            tensor.copy_(self._kept.part(_weight(name), state[name]) if name in moments else state[name])
        self._kept.read_in()


def _weight(name: str) -> str:
    """The weight to which a tensor of the optimizer's belongs: "fc1.weight" of "optimizer/fc1.weight/exp_avg"."""
    return name.removeprefix("optimizer/").rpartition("/")[0]
