"""The rivals: the same training written the usual ways, plainly and fairly, for honest ratios.

*plain* is how lecode's project trains: a DataLoader with per-sample torchvision transforms, fp32, gradients times
masks, ``loss.item()`` in every step. *eager* is good everyday PyTorch: data resident and normalised, a fused
optimizer, masked gradients, bf16 channels-last where that is what one would use. *compiled* is eager with
``torch.compile`` around the net. All use the recipe's net, batch size, optimizer and masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fastlth.catalogue import DatasetFacts
from fastlth.data.sources import Images
from fastlth.models import build
from fastlth.recipe import Recipe, TrainSection


class Plain:
    """lecode's way. ``steps(n)`` trains n steps; ``evaluate`` is its test loop: one pass, a read per batch."""

    def __init__(self, recipe: Recipe, images: Images, masks: Mapping[str, Tensor]) -> None:
        self.model, self.masks = build(recipe), masks
        _zero_pruned(self.model, masks)
        self.optimizer = _optimizer(self.model, recipe.train, fused=False)
        # two workers: lecode asks for ten, which on a small machine only wait for each other
        self.loader = DataLoader(_Samples(images, recipe), recipe.train.batch_size, shuffle=True, drop_last=True,
                                 num_workers=2, persistent_workers=True)  # fmt: skip
        self.batches = _forever(self.loader)

    def steps(self, count: int) -> None:
        """Train on ``count`` batches, reading the loss after each."""
        self.model.train()
        total = 0.0
        for _ in range(count):
            images, labels = next(self.batches)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            for name, parameter in self.model.named_parameters():
                if name in self.masks and parameter.grad is not None:
                    parameter.grad *= self.masks[name]
            self.optimizer.step()
            total += loss.item()


class Eager:
    """Good everyday PyTorch on one device."""

    def __init__(
        self, recipe: Recipe, images: Images, masks: Mapping[str, Tensor], *, precision: str = "fp32",
        channels_last: bool = False, compiled: bool = False, device: str = "cpu",
    ) -> None:  # fmt: skip
        facts = recipe.data.facts
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.recipe, self.precision, self.device = recipe, precision, torch.device(device)
        self.model = build(recipe).to(self.device)
        _zero_pruned(self.model, masks)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.masks = {n: m.to(self.device, torch.float32) for n, m in masks.items()}
        self.optimizer = _optimizer(self.model, recipe.train, fused=True)
        self.net = torch.compile(self.model) if compiled else self.model
        self.images = normalised(images, facts).to(self.device).contiguous(memory_format=layout)
        self.labels = torch.from_numpy(images.labels).to(self.device)
        self.order, self.at = torch.randperm(len(self.labels), device=self.device), 0

    def steps(self, count: int) -> None:
        """Train on ``count`` batches; nothing is read back."""
        self.model.train()
        for _ in range(count):
            images, labels = self._batch()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                loss = F.cross_entropy(self.net(images).float(), labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            for name, parameter in self.model.named_parameters():
                if name in self.masks and parameter.grad is not None:
                    parameter.grad.mul_(self.masks[name])
            self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor) -> float:
        """Accuracy on normalised images, in batches of 1,000, read once."""
        self.model.eval()
        hits = torch.zeros((), device=self.device)
        for x, y in zip(torch.split(images, 1000), torch.split(labels, 1000), strict=True):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                hits += (self.net(x).argmax(1) == y).sum()
        return float(hits) / len(labels)

    def _batch(self) -> tuple[Tensor, Tensor]:
        size = self.recipe.train.batch_size
        if self.at + size > len(self.order):
            self.order, self.at = torch.randperm(len(self.labels), device=self.device), 0
        index = self.order[self.at : self.at + size]
        self.at += size
        images = self.images[index]
        if self.recipe.data.augment == "flip-crop":  # one crop per batch: quicker than ours, so in the rival's favour
            dy, dx = (int(v) for v in torch.randint(0, 9, (2,)))
            images = F.pad(images, (4, 4, 4, 4))[:, :, dy : dy + images.shape[2], dx : dx + images.shape[3]]
            images = torch.where(torch.rand(size, 1, 1, 1, device=self.device) < 0.5, images.flip(3), images)
        return images, self.labels[index]


class _Samples(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: Images, recipe: Recipe) -> None:
        facts = recipe.data.facts
        self.images = images
        steps: list[nn.Module | object] = []
        if recipe.data.augment == "flip-crop":
            steps += [transforms.RandomCrop(facts.shape[1], padding=4), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose(
            [*steps, transforms.ToTensor(), transforms.Normalize(facts.mean, facts.std)]
        )

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = np.asarray(self.images.pixels)[index]
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        return self.transform(image), int(self.images.labels[index])


def _forever(loader: DataLoader[tuple[Tensor, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def normalised(images: Images, facts: DatasetFacts) -> Tensor:
    """float32 [N, C, H, W], mean and standard deviation of the data set taken out."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (facts.mean, facts.std))
    return (torch.from_numpy(np.asarray(images.pixels)).permute(0, 3, 1, 2).float() / 255 - mean) / std


@torch.no_grad()
def _zero_pruned(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in masks:
            parameter.mul_(masks[name])


def _optimizer(model: nn.Module, train: TrainSection, fused: bool) -> torch.optim.Optimizer:
    if train.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=train.lr, momentum=train.momentum, nesterov=train.nesterov,
                               weight_decay=train.weight_decay, fused=fused)  # fmt: skip
    kind = torch.optim.Adam if train.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), lr=train.lr, betas=train.betas, eps=train.eps,
                weight_decay=train.weight_decay, fused=fused)  # fmt: skip
