"""Training steps of LeNet-300-100 for ``benchmarks.gpu``: R replicates by the masked kernels, and one dense net."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from fastlth_kernels import masked_step
from fastlth_kernels.bitmask import pack
from fastlth_kernels.masked_linear import masked_linear, masked_linear_adam, masked_linear_input_grad
from torch import Tensor

SIZES = (784, 300, 100, 10)
BATCH = 60


def _parameters(count: int, device: torch.device) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights [R, N, K], biases [R, N] and masks."""
    weights = [torch.randn(count, n, k, device=device) / k**0.5 for k, n in pairwise(SIZES)]
    return weights, [w.new_zeros(w.shape[:2]) for w in weights], [torch.rand_like(w) < 0.2 for w in weights]


class Replicates:
    """Mask and cast in the forward products' registers; gradients go straight into Adam."""

    def __init__(self, device: torch.device, count: int) -> None:
        self.weights, self.biases, masks = _parameters(count, device)
        self.bits = [pack(m) for m in masks]
        self.moments = [[torch.zeros_like(t) for _ in range(2)] for t in self.weights]
        self.bias_moments = [[torch.zeros_like(t) for _ in range(2)] for t in self.biases]
        self.x = torch.randn(count, BATCH, SIZES[0], device=device).bfloat16()
        self.labels = torch.randint(0, 10, (count, BATCH), device=device)
        self.settings = masked_step.step_settings(1.2e-3, device=device)

    @torch.no_grad()
    def step(self) -> None:
        activations = [self.x]
        for i, (w, bias, bits) in enumerate(zip(self.weights, self.biases, self.bits, strict=True)):
            activations.append(masked_linear(activations[-1], w, bits, bias, i < 2))
        probabilities = activations[-1].float().softmax(-1)
        dy = ((probabilities - F.one_hot(self.labels, 10)) / BATCH).to(self.x.dtype)
        self.settings[masked_step.STEPS].add_(1)
        for i in (2, 1, 0):
            y = activations[i + 1] if i < 2 else None
            before = masked_linear_input_grad(dy, y, self.weights[i], self.bits[i]) if i else dy
            masked_linear_adam(
                dy, y, activations[i], self.bits[i], self.weights[i], *self.moments[i],
                self.biases[i], *self.bias_moments[i], self.settings,
            )  # fmt: skip
            dy = before


class Dense:
    """One net alone, as the dense engine trains it: premasked weights, cuBLAS, one masked step."""

    def __init__(self, device: torch.device) -> None:
        weights, biases, masks = _parameters(1, device)
        self.parameters = [t[0].clone() for t in (*weights, *biases)]
        none = torch.empty(0, dtype=torch.int32, device=device)
        self.bits = [*(pack(m[0]) for m in masks), none, none, none]
        self.copies = [t.bfloat16().requires_grad_() for t in self.parameters]
        self.moments = [[torch.zeros_like(t) for t in self.parameters] for _ in range(2)]
        self.x = torch.randn(BATCH, SIZES[0], device=device).bfloat16()
        self.labels = torch.randint(0, 10, (BATCH,), device=device)
        self.settings = masked_step.step_settings(1.2e-3, device=device)
        self.grads = [torch.zeros_like(t, dtype=torch.bfloat16) for t in self.parameters]
        group = (self.parameters, self.grads, *self.moments, [c.detach() for c in self.copies], self.bits)
        self.group, self.table = group, masked_step.step_table(*group)

    def step(self) -> None:
        y = self.x
        for i in range(3):
            y = F.linear(y, self.copies[i], self.copies[3 + i])
            y = y.relu() if i < 2 else y
        loss = F.cross_entropy(y.float(), self.labels)
        torch._foreach_copy_(self.grads, torch.autograd.grad(loss, self.copies))
        masked_step.masked_step(*self.group, self.settings, None, *self.table, "adam")
