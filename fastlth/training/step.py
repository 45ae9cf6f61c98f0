"""The training step: assemble the batch, forward, loss, backward, masked update. Reads nothing back to the host."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from fastlth_kernels.philox import Key
from torch import Tensor, nn

from fastlth.data.augment import AUGMENT
from fastlth.data.loader import Batch
from fastlth.data.normalise import normalise
from fastlth.models.dropout import Dropout
from fastlth.models.own import seed_of
from fastlth.training.optim import MaskedOptimizer


class Share(Protocol):
    """How several processes make one step together (training/parallel)."""

    def part(self, batch: Batch) -> Batch: ...

    def join_(self, model: nn.Module) -> None: ...

    def sum_gradients_(
        self, parameters: Mapping[str, nn.Parameter], loss: Tensor, hits: Tensor
    ) -> tuple[Tensor, Tensor]: ...


class Step:
    """One step of SGD or Adam on uint8 images, in place on the model's parameters.

    ``pruned`` maps prunable weights to bool tensors, True where pruned; the tensors may change in place
    between steps. The forward pass sees ordinary weights: they are kept masked where they change, in the update.
    With ``reseed`` torch's generator starts anew at every step, from this key and the batch's place, so that what a
    net of others draws from it (dropout, say) is what a resumed training draws.
    """

    def __init__(
        self, model: nn.Module, optimizer: MaskedOptimizer, pruned: Mapping[str, Tensor], table: Tensor,
        *, augment: str = "none", augment_key: Key = (0, 0), precision: str = "fp32", compiled: bool = False,
        reseed: Key | None = None, share: Share | None = None,
    ) -> None:  # fmt: skip
        self.optimizer, self.pruned, self._reseed, self._share = optimizer, pruned, reseed, share
        augmentation, device_type = AUGMENT[augment], table.device.type
        wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        self._dropouts = [m for m in model.modules() if isinstance(m, Dropout)]
        for dropout in self._dropouts:
            dropout.keyed = True

        def loss_and_hits(images: Tensor, labels: Tensor, epoch: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
            x = normalise(augmentation(images, epoch, position, augment_key), table, wide)
            with torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(x)
            logits = logits.to(wide)
            return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).sum()

        self._loss_and_hits: Callable[..., tuple[Tensor, Tensor]] = loss_and_hits
        if compiled:
            # torch reports there that it found no CUDA toolkit, which says nothing about the run
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
            self._loss_and_hits = torch.compile(loss_and_hits, fullgraph=True, dynamic=False)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean loss and number of hits of the batch before the update, device scalars (float32, int64)."""
        device, whole = batch.images.device, len(batch.labels)
        if self._share is not None:
            batch = self._share.part(batch)
        epoch = torch.full((), batch.epoch, dtype=torch.int64, device=device)
        position = torch.full((), batch.position, dtype=torch.int64, device=device)
        for dropout in self._dropouts:
            dropout.place.copy_(torch.stack((epoch, position)))
        if self._reseed is not None:
            torch.manual_seed(seed_of(batch.epoch, batch.position, self._reseed))
        loss, hits = self._loss_and_hits(batch.images, batch.labels, epoch, position)
        # backward() and not autograd.grad(): it lays gradients out like their weights, which a compiled graph does
        # not, and the fused optimizers walk through memory without looking at strides.
        if self._share is not None:
            loss = loss * (len(batch.labels) / whole)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._share is not None:
            loss, hits = self._share.sum_gradients_(self.optimizer.parameters, loss.detach(), hits)
        self.optimizer.step(self.pruned)
        return loss.detach(), hits
