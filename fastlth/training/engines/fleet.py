"""The fleet: R replicates of a small net trained as one batched net, in one graph.

A single LeNet's step is a dozen launches that keep a GPU busy for a microsecond each; R of them take as many launches
and hardly more time. Each replicate has its own theta0, masks, split and order, by its own seed, and its own engine to
talk to (``FleetMember``), so that R searches run as R searches do.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from fastlth_kernels.bitmask import pack
from torch import Tensor, nn

from fastlth.data.loader import on_device
from fastlth.data.normalise import table
from fastlth.data.order import Order, split
from fastlth.data.sources import Images, Source
from fastlth.models import build, skeleton
from fastlth.recipe import Recipe
from fastlth.training.engines import batched, graph
from fastlth.training.engines.arena import stored
from fastlth.training.engines.base import Chunk, Tensors
from fastlth.training.engines.in_step import InStep
from fastlth.training.evaluate import Scores

EVALUATION_BATCH = 1000  # images of each replicate


def unsupported(recipe: Recipe) -> str | None:
    """Why replicates of the recipe cannot be trained as one, as a clause; None if they can."""
    if recipe.data.augment != "none":
        return f"data.augment is {recipe.data.augment}"
    if recipe.prune.early_bird:
        return "prune.early_bird ends the rounds of replicates at different times"
    return graph.unsupported(recipe) or batched.unsupported(recipe)


class Fleet(graph.GraphEngine):
    """``recipes`` differ in their base seed alone, and their compute section is resolved."""

    def __init__(self, recipes: Sequence[Recipe], source: Source, *, dtype: torch.dtype = torch.float32) -> None:
        self._recipes, self._source = recipes, source
        self.count = count = len(recipes)
        self._each = (count,)
        splits = [split(len(source.train.labels), r.data.validation, r.seeds.key("split")) for r in recipes]
        self._own_orders = [Order(len(kept), r.train.batch_size, r.train.drop_last, r.seeds.key("order"))
                            for r, (kept, _) in zip(recipes, splits, strict=True)]  # fmt: skip
        self._kept = np.stack([kept for kept, _ in splits]).astype(np.int32)  # [R, images]: places in the data set
        self._held_out = np.stack([held_out for _, held_out in splits]).astype(np.int32)
        self.in_step = InStep(count, self._make)
        self.turn = self.in_step.turn
        self._shapes = {n: p.shape for n, p in skeleton(recipes[0]).named_parameters()}
        self._scores: dict[tuple[str, int | None], list[Scores]] = {}
        super().__init__(recipes[0], self._own_orders[0], {"train": source.train, "test": source.test}, dtype=dtype)
        self.members = [FleetMember(self, r) for r in range(count)]

    def _build(self, dtype: torch.dtype) -> nn.Module:
        nets = [build(r) for r in self._recipes]
        return batched.batch(nets, self._recipe.compute.kernels == "triton").to(self.device, dtype)

    def _load_images(self, splits: dict[str, Images]) -> None:
        """Rows of a replicate's own images in the tensor of all, [R, images] for each split."""
        source, count, data = self._source, len(self._recipes), self._recipe.data
        self._pixels = torch.from_numpy(np.concatenate([source.train.pixels, source.test.pixels])).to(self.device)
        self._labels = torch.from_numpy(np.concatenate([source.train.labels, source.test.labels])).to(self.device)
        test = np.arange(len(source.test.labels), dtype=np.int32) + len(source.train.labels)
        rows = {"train": self._kept, "validation": self._held_out, "test": np.tile(test, (count, 1))}
        self._sizes = {name: r.shape[1] for name, r in rows.items()}
        ends = np.cumsum([0, *self._sizes.values()]).tolist()
        self._begins = dict(zip(self._sizes, ends, strict=False))
        self._places = torch.from_numpy(np.concatenate(list(rows.values()), 1)).to(self.device)
        self._table = table(data.facts, data.normalise).to(self.device)

    def _make_counters(self) -> None:
        super()._make_counters()
        self.evaluation_batch = min(EVALUATION_BATCH, max(self._sizes.values()))
        self._lanes = (torch.arange(self.count, device=self.device) * self._order.images)[:, None]

    def _upload(self, slot: int, epoch: int) -> None:
        rows = np.stack([kept[order.epoch(epoch)] for kept, order in zip(self._kept, self._own_orders, strict=True)])
        self._orders[slot].copy_(on_device(torch.from_numpy(rows), self.device))

    # The step

    def _images_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [R, B] -> images as the net takes them, and labels [R * B]."""
        images, labels = self._batch(rows.reshape(-1), self._zero, self._zero, "none")
        if isinstance(next(self.model.children()), batched.BatchedLinear):
            return images.reshape(*rows.shape, -1), labels
        return batched.side_by_side(images, len(rows)), labels

    def _train_batch(self, size: int) -> tuple[Tensor, Tensor]:
        index = self._lanes + (self._span[:size] + self._at[graph.ORDER])
        return self._images_of(self._orders.view(-1).index_select(0, index.view(-1)).view(index.shape))

    def _evaluation_batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._images_of(self._places.index_select(1, rows))

    def _forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses, hits = self._forward_each(images, labels)
        return losses.mean(1), hits.sum(1)

    def _forward_each(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(images)
        shape, logits = logits.shape[:2], logits.flatten(0, 1)
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        losses = F.cross_entropy(logits, labels, reduction="none")
        return losses.view(shape), (logits.argmax(1) == labels).view(shape)

    # What members ask for

    def _make(self, first: int, last: int, who: Collection[int]) -> None:
        (before,) = {self.members[r].record.rows for r in who}
        self.record.filled.fill_(before)
        self.forget_scores()
        self.advance(first, last)
        self.wait()
        for r in who:
            self.members[r].record.advance(last - first)

    def part(self, name: str, tensor: Tensor, replicate: int) -> Tensor:
        """A replicate's part of a tensor that lies as the parameter ``name`` does, of its own net's shape."""
        return tensor.view(self.count, -1, *tensor.shape[1:])[replicate].view(self._shapes[name])

    def scores(self, replicate: int, split: str, images: int | None) -> Scores:
        """Of all replicates at once: the others ask for the same, mostly."""
        with self.turn:
            if (split, images) not in self._scores:
                self._scores[split, images] = self._evaluate_all(split, images)
            return self._scores[split, images][replicate]

    def forget_scores(self) -> None:
        self._scores.clear()

    def _evaluate_all(self, split: str, images: int | None) -> list[Scores]:
        count = self._accumulate(split, images)
        return [Scores(loss / count, hits / count) for loss, hits in self._totals.T.tolist()]


class FleetMember:
    """One replicate as an engine of its own."""

    name = "graph"

    def __init__(self, fleet: Fleet, replicate: int) -> None:
        self._fleet, self._r, self.in_step = fleet, replicate, fleet.in_step
        self.weight_names, self.prunable, self.layers = fleet.weight_names, fleet.prunable, fleet.layers
        self.said = fleet.said if replicate == 0 else []
        self.record = fleet.record.replicate(replicate)

    def rewind(self, start: Tensors) -> None:
        fleet = self._fleet
        with fleet.turn, torch.no_grad():
            for name, weights in self.weights().items():
                weights.copy_(start[name])
            for moments in self._optimizer().values():
                moments.zero_()
            fleet.arena.zero_pruned()
            fleet.forget_scores()
        self.record.clear()

    def set_masks(self, masks: Tensors) -> None:
        fleet, r = self._fleet, self._r
        with fleet.turn, torch.no_grad():
            for name, mask in masks.items():
                words = pack(stored(mask.to(fleet.device)))
                fleet.arena.bits[name].view(fleet.count, *words.shape)[r].copy_(words)
                layer = fleet.model.get_submodule(name.removesuffix(".weight"))
                if isinstance(layer, batched.BatchedLinear) and layer.bits is not None:
                    layer.bits[r].copy_(words)
            fleet.arena.zero_pruned()

    def run(self, first: int, last: int) -> Chunk:
        seconds = self.in_step.run(self._r, first, last)
        with self._fleet.turn:
            return self.record.chunk(first, last, seconds)

    def interval(self) -> Scores:
        with self._fleet.turn:
            return self.record.read()

    def evaluate(self, split: str, images: int | None = None) -> Scores:
        return self._fleet.scores(self._r, split, images)

    def weights(self) -> dict[str, Tensor]:
        return {n: self._fleet.part(n, t, self._r).detach() for n, t in self._fleet.arena.weights.items()}

    def _optimizer(self) -> dict[str, Tensor]:
        """By name; Adam's count of steps is that of all."""
        state = self._fleet.arena.state
        return {n: self._fleet.part(n.rsplit("/", 1)[0], t, self._r) if t.dim() else t for n, t in state.items()}

    def state(self) -> dict[str, Tensor]:
        return {
            **{f"model/{n}": t for n, t in self.weights().items()},
            **{f"optimizer/{n}": t for n, t in self._optimizer().items()},
            **self.record.state(),
        }

    def load_state(self, state: Tensors) -> None:
        with self._fleet.turn, torch.no_grad():
            for name, tensor in self.state().items():
                tensor.copy_(state[name])
            self._fleet.arena.refresh()
            self._fleet.forget_scores()

    def __enter__(self) -> FleetMember:
        return self

    def __exit__(self, *_: object) -> None:
        """This replicate is over; the others no longer wait for it."""
        self.in_step.leave(self._r)
