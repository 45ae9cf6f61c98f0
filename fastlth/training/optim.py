"""The optimizer of a round: torch's one-pass (fused) SGD, Adam or AdamW over masked gradients.

A pruned weight is 0 when a round starts, its gradient is set to 0 before the update, and the optimizer
state starts at 0, so the update of any of these optimizers, weight decay included, leaves it at +0.0.
State tensors are made once and zeroed at each rewind: they keep their addresses through all rounds.
Weights frozen at another value are put back after the update, since weight decay would move them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastlth.recipe import TrainSection

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class MaskedOptimizer:
    """Owns the optimizer state and the learning rate, a device scalar, for named parameters."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], train: TrainSection) -> None:
        self.parameters = dict(parameters)
        device = next(iter(self.parameters.values())).device
        self._train = train
        self.lr = torch.tensor(train.lr, dtype=torch.float32, device=device)
        self.fill: dict[str, Tensor] = {}
        """name -> the values its pruned weights keep, where they may be other than 0"""
        self._words: dict[str, Tensor] = {}
        self.move({})

    def move(self, kept: Mapping[str, Tensor]) -> None:
        """From now on update these tensors (the kept values of weights, by name) instead of the parameters of their
        names, with a fresh state."""
        self._kept = kept
        self._moved: dict[str, Tensor] = {**self.parameters, **kept}
        self._optimizer, slots = _make(list(self._moved.values()), self._train, self.lr)
        self.state: dict[str, Tensor] = {}
        for name, p in self._moved.items():
            own = {slot: torch.zeros_like(p, memory_format=torch.preserve_format) for slot in slots}
            if self._train.optimizer != "sgd":
                own["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            self._optimizer.state[p] = own
            self.state |= {f"{name}/{slot}": value for slot, value in own.items()}

    def reset(self) -> None:
        """Forget everything: a rewound net starts with a fresh optimizer."""
        for value in self.state.values():
            value.zero_()

    def hold(self, pruned: Mapping[str, Tensor]) -> None:
        """These are the masks of all steps until the next call. On a CPU they are kept as words with all bits set
        where a weight stays: "and" clears a gradient eight times faster than a fill that branches at each weight."""
        self._words = {}
        for name, mask in pruned.items():
            parameter = self.parameters[name]
            if parameter.device.type == "cpu":
                words = torch.empty_like(parameter, dtype=_WORDS[parameter.element_size()])
                self._words[name] = words.copy_(mask).sub_(1)  # pruned, 1: 0; kept, 0: all bits

    @torch.no_grad()
    def step(self, pruned: Mapping[str, Tensor]) -> None:
        """One update in place, by the gradients in ``.grad``, which are gone afterwards. ``pruned`` holds bool
        tensors, True where a weight is pruned; what the gradient says there, NaN included, is ignored."""
        for name, mask in pruned.items():
            if name in self._kept:
                continue
            gradient = self.parameters[name].grad
            if gradient is None:  # an own net may hold layers that it does not use
                continue
            if (words := self._words.get(name)) is not None:
                gradient.view(words.dtype).bitwise_and_(words)  # a NaN too becomes +0.0
            else:
                gradient.masked_fill_(mask, 0.0)
        self._optimizer.step()
        for name, fill in self.fill.items():
            torch.where(pruned[name], fill, self.parameters[name], out=self.parameters[name])
        for p in self._moved.values():
            p.grad = None


def _make(parameters: list[Tensor], train: TrainSection, lr: Tensor) -> tuple[torch.optim.Optimizer, tuple[str, ...]]:
    if train.optimizer == "sgd":
        sgd = torch.optim.SGD(parameters, lr=lr, momentum=train.momentum, nesterov=train.nesterov,
                              weight_decay=train.weight_decay, fused=True)  # fmt: skip
        return sgd, ("momentum_buffer",) if train.momentum else ()
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[train.optimizer]
    adam = kind(parameters, lr=lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay, fused=True)
    return adam, ("exp_avg", "exp_avg_sq")
