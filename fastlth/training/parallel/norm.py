"""Batch norm over a batch whose parts lie in several processes: mean and variance are those of the whole.

    y = (x - m) / sqrt(v + eps) * weight + bias,  m and v over images, rows and columns of all parts

Running statistics take the unbiased variance of the whole batch (Ioffe & Szegedy 2015, algorithm 2), as torch's do.
Gradients go through m and v: the sum over ranks has itself as its derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlth.errors import RecipeError

Sum = Callable[[Tensor], Tensor]
"""over all ranks, without gradients"""


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, sum_: Sum) -> Tensor:
        ctx.sum_ = sum_
        return sum_(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.sum_(gradients[0].contiguous()), None


class SharedBatchNorm(nn.BatchNorm2d):
    """The layer ``norm``, whose parameters and statistics it keeps, over all ranks' parts of a batch [B, C, H, W]."""

    def __init__(self, norm: nn.BatchNorm2d, sum_: Sum) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats,
                         device="meta")  # fmt: skip
        if norm.momentum is None or not norm.track_running_stats or not norm.affine:
            raise RecipeError("batch norm without momentum, running statistics or weights cannot be shared by several "
                              "processes; train this net in one")  # fmt: skip
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self._sum = sum_
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = self._sum(wide.new_tensor([wide.numel() / wide.shape[1]]))
        mean = self._over_all(wide.sum((0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = self._over_all((centred * centred).sum((0, 2, 3))) / count
        scale = self.weight * torch.rsqrt(variance + self.eps)
        self._remember(mean.detach(), variance.detach() * count / (count - 1))
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _over_all(self, values: Tensor) -> Tensor:
        total: Tensor = _SumOverRanks.apply(values, self._sum)
        return total

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.momentum is not None and self.num_batches_tracked is not None
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked += 1


def join_batch_norms_(model: nn.Module, sum_: Sum) -> None:
    """Put a ``SharedBatchNorm`` in the place of every BatchNorm2d, in place; names and parameters stay.

    Raises RecipeError for other layers that normalise over a batch.
    """
    for name, module in list(model.named_modules(remove_duplicate=False)):  # a net may use one layer in two places
        if type(module) is nn.BatchNorm2d:
            model.set_submodule(name, SharedBatchNorm(module, sum_))
        elif _looks_at_batch(module):
            raise RecipeError(f"layer {name} ({type(module).__name__}) looks at a whole batch, and several processes "
                              "cannot share that; train this net in one process")  # fmt: skip


def _looks_at_batch(module: nn.Module) -> bool:
    """Whether it normalises over one process's part of a batch."""
    each_alone = isinstance(module, nn.modules.instancenorm._InstanceNorm) and not module.track_running_stats
    over_batch = isinstance(module, nn.modules.batchnorm._NormBase) and not each_alone
    return over_batch and not isinstance(module, SharedBatchNorm)
