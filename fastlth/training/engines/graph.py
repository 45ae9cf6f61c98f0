"""The graph engine: a training step is one CUDA graph, captured once and replayed for every step of every round.

Batch assembly, forward, loss, backward, masked update and the record of loss and hits are inside; the last, smaller
batch of an epoch is a second graph, evaluation a third. Masks, weights, learning rates and counters are tensors at
fixed addresses, so nothing is captured, compiled or allocated anew between round 0 and round 20, and between two
evaluations the host only uploads an epoch's order when it is first seen. Only a round that can be trained as a smaller
net (``compact.py``) has graphs of its own, where ``compute.compact`` allows them.

On other devices the same functions are called without a graph: slower than the dense engine, and what tests compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
import torch.nn.functional as F
from fastlth_kernels.batch import AUGMENTS, assemble_batch
from fastlth_kernels.masked_step import StepTable
from torch import Tensor, nn

from fastlth import specs
from fastlth.data.augment import AUGMENT
from fastlth.data.loader import on_device
from fastlth.data.normalise import normalise, table
from fastlth.data.order import Order
from fastlth.data.sources import Images
from fastlth.models import build, skeleton, weight_names
from fastlth.models.dropout import Dropout
from fastlth.pruning import layer_rates
from fastlth.recipe import Recipe
from fastlth.training import faults, host
from fastlth.training.engines import compact
from fastlth.training.engines.arena import Arena
from fastlth.training.engines.base import Chunk, Tensors
from fastlth.training.engines.record import Record
from fastlth.training.evaluate import Scores
from fastlth.training.schedule import lr_at

EVALUATION_BATCH = 2500  # divides the 5,000 and 10,000 images of the papers' validation and test sets
ORDER_BYTES = 256 * 2**20  # of epochs' orders kept on the device

Graphs = dict[str, Callable[[], object]]

# Places in the counters of a step. EPOCH and POSITION are neighbours: dropout takes both at once.
ITERATION, EPOCH, POSITION, ORDER, ROW = range(5)


def unsupported(recipe: Recipe) -> str | None:
    """Why this engine cannot train the recipe, as a clause; None if it can."""
    if recipe.prune.fills:
        return f"mask-0 action {recipe.prune.mask_0} keeps pruned weights at other values than 0"
    if recipe.model.own:
        return "one's own net may draw random numbers or keep records that a captured step would repeat"
    if specs.folder(recipe.data.name) is not None:
        return "folders of images are streamed, and a captured step reads images that live on the device"
    if recipe.compute.loader == "ffcv":
        return "compute.loader is ffcv, and a captured step reads images that live on the device"
    if recipe.compute.shifted not in ((), ("auto",)):
        return "compute.shifted names gradients of convolutions, which are the dense engine's on a CPU"
    return None


class GraphEngine:
    """``recipe.compute`` is resolved. ``order`` counts within ``splits["train"]``. ``dtype`` float64 (on a CPU, fp32
    precision) is for tests."""

    name = "graph"
    _each: tuple[int, ...] = ()
    """(R,) where R replicates are trained as one: what orders, record and totals have of each"""

    def __init__(
        self, recipe: Recipe, order: Order, splits: dict[str, Images], *, dtype: torch.dtype = torch.float32
    ) -> None:
        self._recipe, self._order = recipe, order
        self.device = torch.device(recipe.compute.device)
        self.said: list[str] = []
        self.model = self._build(dtype).train()
        self.net = self.model
        """what computes: the model, or what is left of it"""
        self.weight_names = weight_names(skeleton(recipe))
        self.prunable = list(layer_rates(self.weight_names, recipe.prune))
        self.arena = Arena(self.model, self.prunable, recipe.train, recipe.compute.precision, dtype)
        self._compute_dtype = torch.bfloat16 if recipe.compute.precision == "bf16" else dtype
        self._buffers = {n: b for n, b in self.model.state_dict(keep_vars=True).items()
                         if n not in self.arena.weights}  # fmt: skip
        self._dropouts = [m for m in self.model.modules() if isinstance(m, Dropout)]
        for dropout in self._dropouts:
            dropout.keyed = True
        self._load_images(splits)
        self._make_counters()
        self._loss_and_hits: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = self._forward
        self._losses_and_hits: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = self._forward_each
        if recipe.compute.compile == "on":
            self._loss_and_hits = torch.compile(self._forward, fullgraph=True, dynamic=False)
            self._losses_and_hits = torch.compile(self._forward_each, fullgraph=True, dynamic=False)
        self._streams: dict[tuple[str, bool], torch.cuda.Stream] = {}
        self.small: compact.Compact | None = None
        self._last: tuple[compact.Compact, Graphs] | None = None
        self._masks: Tensors = {}
        self._graphs = self._whole_graphs = self._captured()

    def _captured(self) -> Graphs:
        """The graphs of ``net``; none on a CPU."""
        if self.device.type != "cuda":
            return {}
        from fastlth.training.engines.capture import capture

        with self.settings(), torch.enable_grad():
            found = capture([self])
        return {**{f"train {size}": step for size, step in found.steps.items()}, "evaluate": found.evaluations[0]}

    def lane(self, use: str) -> torch.cuda.Stream:
        """The stream on which graphs for ``use`` are captured, always the same one, and another for a smaller net: a
        graph that is thrown away takes the libraries' workspaces of its stream along (pytorch#193402)."""
        of = use, self.small is None
        if of not in self._streams:
            self._streams[of] = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self._streams[of]

    @property
    def layers(self) -> dict[str, str]:
        return {name.removesuffix(".weight"): "dense" for name in self.weight_names}

    def _build(self, dtype: torch.dtype) -> nn.Module:
        """The net on its device, with theta0."""
        model = build(self._recipe)
        if self._recipe.compute.kernels == "triton":
            from fastlth.training.masked_modules import swap_  # imports Triton

            model = swap_(model)
        return model.to(self.device, dtype)

    def _load_images(self, splits: dict[str, Images]) -> None:
        """All images in one tensor, so that one evaluation graph serves every split."""
        self._pixels = torch.cat([torch.from_numpy(s.pixels) for s in splits.values()]).to(self.device)
        self._labels = torch.cat([torch.from_numpy(s.labels) for s in splits.values()]).to(self.device)
        self._sizes = {name: len(s.labels) for name, s in splits.items()}
        self._begins = dict(zip(splits, accumulate(self._sizes.values(), initial=0), strict=False))
        data = self._recipe.data
        self._table = table(data.facts, data.normalise).to(self.device)

    def _make_counters(self) -> None:
        recipe, order, device = self._recipe, self._order, self.device
        train = recipe.train
        last = min(train.batch_size, order.images - (order.iterations_per_epoch - 1) * train.batch_size)
        self.batch_sizes = sorted({train.batch_size, last}, reverse=True)
        """of a step: the whole batch, and an epoch's last one where that is smaller"""
        self.evaluation_batch = min(EVALUATION_BATCH, max(self._sizes.values()))
        epochs = -(-train.iterations // order.iterations_per_epoch)
        slots = max(1, min(epochs, ORDER_BYTES // (4 * order.images * math.prod(self._each))))
        self._orders = torch.zeros(slots, *self._each, order.images, dtype=torch.int32, device=device)
        self._epoch_in: list[int | None] = [None] * slots
        rates = [lr_at(i, train.lr, recipe.schedule) for i in range(train.iterations)]
        self._rates = torch.tensor(rates, dtype=self.arena.settings.dtype, device=device)
        self._at = torch.zeros(5, dtype=torch.int64, device=device)
        self._advance = {b: torch.tensor([1, 0, b, b, 1], device=device) for b in self.batch_sizes}
        self._span = torch.arange(max(train.batch_size, self.evaluation_batch), device=device)
        self._zero = torch.zeros((), dtype=torch.int64, device=device)
        self.record = Record.of(recipe.evaluate.every, device, self._each)
        self._window = torch.zeros(2, dtype=torch.int64, device=device)  # of an evaluation: next image, end
        self._totals = torch.zeros(2, *self._each, dtype=torch.float64, device=device)  # loss, hits

    @contextmanager
    def settings(self) -> Iterator[None]:
        """What has to be in force while steps are made."""
        compute = self._recipe.compute
        with host.settings(compute.threads), host.algorithms(self.device, deterministic=compute.deterministic):
            yield

    # The step

    def _forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(images)
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).sum()

    def _forward_each(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(images)
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels

    def _batch(self, rows: Tensor, epoch: Tensor, position: Tensor, augment: str) -> tuple[Tensor, Tensor]:
        key = self._recipe.seeds.key("augment")
        kind = torch.float32 if self._compute_dtype == torch.float64 else self._compute_dtype
        if augment in AUGMENTS:
            images, labels = assemble_batch(
                self._pixels, self._labels, rows, self._table, epoch, position, key, augment, kind
            )
        else:
            chosen = self._pixels.index_select(0, rows).permute(0, 3, 1, 2)
            images = normalise(AUGMENT[augment](chosen, epoch, position, key), self._table, kind)
            labels = self._labels.index_select(0, rows)
        return images.to(self._compute_dtype), labels

    def _train_batch(self, size: int) -> tuple[Tensor, Tensor]:
        rows = self._orders.view(-1).index_select(0, self._span[:size] + self._at[ORDER])
        return self._batch(rows, self._at[EPOCH], self._at[POSITION], self._recipe.data.augment)

    def _evaluation_batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._batch(rows, self._zero, self._zero, "none")

    def train_step(self, size: int, where: StepTable | None = None) -> list[Tensor]:
        """One step on ``size`` images, from the counters and back into them. Returns its gradients, which a graph has
        to keep alive; ``where`` they are is looked up unless given."""
        at, arena = self._at, self.arena
        torch.index_select(self._rates, 0, at[ITERATION : ITERATION + 1], out=arena.lr)
        images, labels = self._train_batch(size)
        for dropout in self._dropouts:
            dropout.place.copy_(at[EPOCH : POSITION + 1])
        loss, hits = self._loss_and_hits(images, labels)
        gradients = arena.gradients(loss) if self.small is None else self.small.gradients(loss)
        arena.step(gradients, arena.table(gradients) if where is None else where)
        if self.small is not None:
            self.small.gather()
        row = at[ROW : ROW + 1]
        with host.any_order():
            self.record.losses.index_copy_(0, row, loss.detach().float()[None])
            self.record.hits.index_copy_(0, row, hits[None])
        at += self._advance[size]
        return gradients

    @torch.no_grad()
    def evaluation_step(self, size: int) -> None:
        """Adds the next ``size`` images of the window to the totals; those beyond its end count nothing."""
        rows = self._span[:size] + self._window[0]
        inside = rows < self._window[1]
        images, labels = self._evaluation_batch(torch.minimum(rows, self._window[1] - 1))
        losses, hits = self._losses_and_hits(images, labels)
        # where() and not a product, since 0 times NaN is NaN
        loss = torch.where(inside, losses, 0.0).double().sum(-1)
        self._totals += torch.stack((loss, (inside & hits).sum(-1).double()))
        self._window[:1] += size

    # The engine

    def run(self, first: int, last: int) -> Chunk:
        """At most ``evaluate.every`` steps since the last ``interval`` or rewind. One host read, at the end."""
        self.advance(first, last)
        return self.record.chunk(first, last)

    def advance(self, first: int, last: int) -> None:
        """The steps, and nothing read back."""
        with self.settings():
            for size in self.ready(first, last):
                self._play(f"train {size}", self.train_step, size)

    def wait(self) -> None:
        """For the device, which may still be at the steps."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def ready(self, first: int, last: int) -> Iterator[int]:
        """For each of the steps its batch size, when the counters are those it needs."""
        iteration, row = first, self.record.rows
        while iteration < last:
            epoch, position, _ = self._order.place(iteration)
            self._go_to(iteration, epoch, position, row)
            stop = min(last, (epoch + 1) * self._order.iterations_per_epoch)
            for i in range(iteration, stop):
                _, start, end = self._order.place(i)
                self.record.images[row] = end - start
                yield end - start
                row += 1
            iteration = stop
        self.record.advance(last - first)

    def _play(self, name: str, step: Callable[[int], object], size: int) -> None:
        graph = self._graphs.get(name)
        if graph is None:
            step(size)
        else:
            graph()

    def _go_to(self, iteration: int, epoch: int, position: int, row: int) -> None:
        """Set the counters; upload the epoch's order unless it is on the device. Nobody waits."""
        slot = epoch % len(self._epoch_in)
        if self._epoch_in[slot] != epoch:
            self._upload(slot, epoch)
            self._epoch_in[slot] = epoch
        counters = torch.tensor([iteration, epoch, position, slot * self._orders[0].numel() + position, row])
        self._at.copy_(on_device(counters, self.device))

    def _upload(self, slot: int, epoch: int) -> None:
        self._orders[slot].copy_(on_device(torch.tensor(self._order.epoch(epoch)), self.device))

    def interval(self) -> Scores:
        return self.record.read()

    def forget(self) -> None:
        """The record of steps begins anew."""
        self.record.clear()

    def evaluate(self, split: str, images: int | None = None) -> Scores:
        count = self._accumulate(split, images)
        loss, hits = self._totals.tolist()
        return Scores(loss / count, hits / count)

    def _accumulate(self, split: str, images: int | None) -> int:
        """Total loss and hits of a split's first images; returns how many they are."""
        count = len(range(self._sizes[split])[:images])
        begin = self._begins[split]
        self.net.eval()
        with self.settings():
            self._window.copy_(on_device(torch.tensor([begin, begin + count]), self.device))
            self._totals.zero_()
            for done in range(0, count, self.evaluation_batch):
                self._play("evaluate", self.evaluation_step, min(self.evaluation_batch, count - done))
        self.net.train()
        return count

    @torch.no_grad()
    def rewind(self, start: Tensors) -> None:
        self._train(None, self._whole_graphs)
        self.arena.restore(start)
        for name, buffer in self._buffers.items():
            buffer.copy_(start[name])
        self.record.clear()
        self._leave_out(compact.needed(self._recipe, self._masks, start))

    def _leave_out(self, stays: compact.Stays | None) -> None:
        """Train what stays alone, from the start of a round on, or the whole net. Graphs are captured only where the
        smaller net has other widths than the last one."""
        if stays is None:
            self._last = None
            return
        if self._last is None or not self._last[0].fits(stays):
            self._last = None
            try:
                small = compact.Compact(self.model, self.arena, stays)
                self._train(small, {})
                self._last = small, self._captured()
            except torch.OutOfMemoryError:
                self._train(None, self._whole_graphs)
        if self._last is None:
            self.said.append(faults.no_smaller_net(self.device))
            return
        self._last[0].point(stays)
        self._train(*self._last)

    def _train(self, small: compact.Compact | None, graphs: Graphs) -> None:
        self.small, self._graphs = small, graphs
        self.net = self.model if small is None else small.net

    def set_masks(self, masks: Tensors) -> None:
        if self.small is not None:
            self.small.write_back()
        self._train(None, self._whole_graphs)
        self._masks = dict(masks)
        self.arena.set_masks(masks)
        if self._recipe.compute.kernels == "triton":
            from fastlth.training.masked_modules import write_masks

            write_masks(self.model, masks)

    def weights(self) -> dict[str, Tensor]:
        if self.small is not None:
            self.small.write_back()
        every = self.model.state_dict(keep_vars=True)
        return {n: self.arena.weights.get(n, t).detach() for n, t in every.items()}

    def state(self) -> dict[str, Tensor]:
        return {
            **{f"model/{n}": t for n, t in self.weights().items()},
            **{f"optimizer/{n}": t for n, t in self.arena.state.items()},
            **self.record.state(),
        }  # fmt: skip

    @torch.no_grad()
    def load_state(self, state: Tensors) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.arena.refresh()
        if self.small is not None:
            self.small.read_in()

    def to_begin(self) -> None:
        """Counters at the first batch and the first images."""
        self._at.zero_()
        self._window.copy_(on_device(torch.tensor([0, self.evaluation_batch]), self.device))

    def changing(self) -> list[Tensor]:
        """Every tensor that a step or an evaluation changes: what a warm-up has to give back."""
        return [*self.arena.flat.values(), self.arena.settings, *self._buffers.values(), self._at,
                self.record.losses, self.record.hits, self._window, self._totals, self._orders]  # fmt: skip
