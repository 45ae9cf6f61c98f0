"""The processes that train one net together: each takes a part of every batch, and gradients are summed.

Sums are made in the order of the ranks, on every rank from the same numbers: the same bits everywhere and in every run,
whatever the network between them does. With n ranks each sums an nth of the gradient, which it gets from all others and
hands to all others: as many bytes as any all-reduce.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastlth.data.loader import Batch
from fastlth.errors import DeviceError, EnvironmentFailure, RecipeError
from fastlth.models import skeleton
from fastlth.recipe import Recipe
from fastlth.training.parallel.norm import join_batch_norms_

PATIENCE = timedelta(hours=12)
"""how long the others wait while rank 0 prunes, evaluates and saves; a process that is gone is noticed at once"""


class Team:
    """This process among those of one training. Made by ``join``."""

    def __init__(self, rank: int, size: int, local_rank: int) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._talk: Any = None
        """over which commands go, from CPU to CPU"""

    def device(self, named: str) -> str:
        """The device of this rank where rank 0 has ``named``. Raises DeviceError if it is not there."""
        if not named.startswith("cuda"):
            return named
        if self.local_rank >= torch.cuda.device_count():
            raise DeviceError(f"process {self.rank} needs GPU {self.local_rank} and this machine has "
                              f"{torch.cuda.device_count()}; give --nproc-per-node as many as there are")  # fmt: skip
        return f"cuda:{self.local_rank}"

    def say(self, *numbers: int) -> None:
        """To all others, from rank 0."""
        self.hand_out(torch.tensor(numbers, dtype=torch.int64))

    def hear(self, count: int) -> list[int]:
        return [int(x) for x in self.hand_out(torch.zeros(count, dtype=torch.int64))]

    def hand_out(self, tensor: Tensor) -> Tensor:
        """``tensor``, on a CPU, becomes rank 0's on every rank, in place."""
        with _together():
            dist.broadcast(tensor, 0, group=self._talk)
        return tensor

    def hand_out_all(self, own: Mapping[str, Tensor], values: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Rank 0's ``values`` on every rank, in the names, shapes and types of ``own``, on a CPU."""
        found = {}
        for name, tensor in own.items():
            if values is None:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
            else:
                buffer = values[name].detach().to("cpu", tensor.dtype, copy=True).contiguous()
            found[name] = self.hand_out(buffer.view(torch.uint8) if buffer.dtype == torch.bool else buffer)
        return {n: t.view(own[n].dtype) for n, t in found.items()}

    def part(self, batch: Batch) -> Batch:
        """This rank's images of a batch: consecutive ones, with the place in the epoch that their draws go by."""
        count = len(batch.labels)
        first, last = (count * r // self.size for r in (self.rank, self.rank + 1))
        return dataclasses.replace(batch, images=batch.images[first:last], labels=batch.labels[first:last],
                                   position=batch.position + first)  # fmt: skip

    def join_(self, model: nn.Module) -> None:
        """Make the layers of ``model`` that look at a whole batch look at all ranks' parts."""
        join_batch_norms_(model, self.sum)

    def sum_gradients_(
        self, parameters: Mapping[str, nn.Parameter], loss: Tensor, hits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients become their sums over all ranks, in place; the sums of loss and hits, in one exchange."""
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        kind = gradients[0].dtype
        pieces = [*(g.reshape(-1) for g in gradients), loss.to(kind).reshape(1), hits.to(kind).reshape(1)]
        whole = self._sum_shared(torch.cat(pieces))
        place = 0
        for gradient in gradients:
            gradient.copy_(whole[place : place + gradient.numel()].view(gradient.shape))
            place += gradient.numel()
        return whole[place].to(loss.dtype), whole[place + 1].round().to(hits.dtype)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every rank's ``values``, which are few: each rank adds them all."""
        gathered = values.new_empty(self.size * values.numel())
        with _together():
            dist.all_gather_into_tensor(gathered, values.detach().reshape(-1))
        return _in_order(gathered.view(self.size, *values.shape))

    def _sum_shared(self, flat: Tensor) -> Tensor:
        """The sum of every rank's ``flat`` [n]: each rank adds one slice of all."""
        each = -(-len(flat) // self.size)
        sent = torch.nn.functional.pad(flat, (0, each * self.size - len(flat)))
        slices, whole = torch.empty_like(sent), torch.empty_like(sent)
        with _together():
            dist.all_to_all_single(slices, sent)
            dist.all_gather_into_tensor(whole, _in_order(slices.view(self.size, each)))
        return whole[: len(flat)]


def _in_order(rows: Tensor) -> Tensor:
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total


@contextlib.contextmanager
def join() -> Iterator[Team | None]:
    """The team that torchrun's variables describe, connected; None in a process alone."""
    size = int(os.environ.get("WORLD_SIZE", 1)) if {"RANK", "MASTER_ADDR"} <= os.environ.keys() else 1
    if size == 1:
        yield None
        return
    team = Team(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available()
    if cuda and team.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(team.local_rank)
    with _together():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
        team._talk = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield team
    finally:
        dist.destroy_process_group()


def check(recipe: Recipe, size: int) -> None:
    """Raises RecipeError for what several processes cannot train with the values of one."""
    compute, train = recipe.compute, recipe.train
    if compute.engine in ("sparse", "graph"):
        raise RecipeError(f"--engine {compute.engine} trains in one process, and torchrun started {size}; use "
                          "--engine dense, or fastlth without torchrun")  # fmt: skip
    if compute.kept:
        raise RecipeError(f"compute.kept must be empty, since torchrun started {size} processes: layers run from their "
                          "kept weights in one")  # fmt: skip
    if compute.compile == "on":
        raise RecipeError(f"--compile on trains in one process, and torchrun started {size}: what they exchange is not "
                          "part of a compiled graph; use --compile off")  # fmt: skip
    if compute.device == "mps":
        raise RecipeError(f"--device mps trains in one process, and torchrun started {size}; use cpu or cuda")
    if compute.device.startswith("cuda:"):
        raise RecipeError(f"--device {compute.device} is one GPU, and torchrun started {size} processes that need one "
                          "each; use --device cuda, and CUDA_VISIBLE_DEVICES to choose")  # fmt: skip
    rest = 0 if train.drop_last else recipe.data.train_images % train.batch_size
    least = min(train.batch_size, rest or train.batch_size)
    if least < size:
        raise RecipeError(f"a batch of {least} images cannot be shared by {size} processes; use a larger "
                          "--batch-size, train.drop_last=true, or fewer processes")  # fmt: skip
    join_batch_norms_(skeleton(recipe), lambda values: values)


def remark(recipe: Recipe, size: int) -> str | None:
    """What a person should know of a net whose random draws are not fastlth's, such as one's own with dropout."""
    if not any(isinstance(m, nn.modules.dropout._DropoutNd) for m in skeleton(recipe).modules()):
        return None
    return (f"{recipe.model.name} draws what it drops itself: {size} processes, each for its part of a batch, draw "
            "otherwise than one process would")  # fmt: skip


def narrowed(recipe: Recipe) -> Recipe:
    """``recipe`` with every ``auto`` that several processes cannot leave open."""
    return dataclasses.replace(recipe, compute=dataclasses.replace(recipe.compute, engine="dense", compile="off"))


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """What torch raises where another process is gone, as our error."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise EnvironmentFailure(f"a process of this training does not answer ({first}); start the same command again, "
                                 "it goes on from the last save") from error  # fmt: skip
