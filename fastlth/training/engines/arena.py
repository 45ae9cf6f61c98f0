"""The arena: everything that training changes about a model's parameters, in flat buffers that never move.

    weights   fp32, all parameters        theta_k comes back by one copy into it
    first     fp32, momentum, or Adam's first moment        second     fp32, Adam's second moment
    copies    bf16, what layers compute with                      bits       packed masks, 32 weights to a word

A parameter of the model is a view into one of them. Weights of convolutions lie as OHWI, which is what channels-last
strides are. One launch of ``masked_step`` walks through all of it (``fastlth_kernels/masked_step.py``). Gradients stay
where autograd leaves them: inside a CUDA graph that is one place, too, and copying them would move 4 bytes per weight
for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch
from fastlth_kernels.bitmask import pack, unpack, words_shape
from fastlth_kernels.launch import on_gpu
from fastlth_kernels.masked_step import LR, STEPS, StepTable, masked_step, step_settings, step_table
from torch import Tensor, nn

from fastlth.recipe import TrainSection

ALIGN = 64  # elements: every tensor begins at a multiple of 128 bytes


class Arena:
    """Takes over the parameters of ``model``, which is on its device, in place.

    pruned: names of the weights that get masks. precision: bf16 gives layers bf16 copies to compute with;
    batch norm, and every layer in fp32, computes with the fp32 weights. ``dtype`` float64 (on a CPU) is
    for tests: everything that is fp32 above becomes float64.
    """

    def __init__(
        self, model: nn.Module, pruned: Iterable[str], train: TrainSection, precision: str = "fp32",
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        parameters = dict(model.named_parameters())
        self.names = list(parameters)
        shapes = [stored(p).shape for p in parameters.values()]
        device = next(iter(parameters.values())).device
        moments = 2 if train.optimizer != "sgd" else int(train.momentum > 0)
        self.flat: dict[str, Tensor] = {}
        """the buffers by name"""

        def views(name: str, kind: torch.dtype, shapes: Sequence[torch.Size | tuple[int, ...]]) -> list[Tensor]:
            places = [-(-prod(shape) // ALIGN) * ALIGN for shape in shapes]
            self.flat[name] = torch.zeros(sum(places), dtype=kind, device=device)
            parts = torch.split(self.flat[name], places)
            return [part[: prod(shape)].view(shape) for part, shape in zip(parts, shapes, strict=True)]

        self._weights = views("weights", dtype, shapes)
        self._first = views("first", dtype, shapes) if moments > 0 else []
        self._second = views("second", dtype, shapes) if moments > 1 else []
        self._copies = views("copies", torch.bfloat16, shapes) if precision == "bf16" else []
        masked = set(pruned)
        words = [words_shape(s) if n in masked else (0,) for n, s in zip(self.names, shapes, strict=True)]
        self._bits = views("bits", torch.int32, words)
        self.flat["bits"].fill_(-1)  # all kept
        self.bits = {n: b for n, b in zip(self.names, self._bits, strict=True) if n in masked}
        """packed masks of the weights as they lie in memory"""
        self.settings = step_settings(
            train.lr, weight_decay=train.weight_decay, momentum=train.momentum, betas=train.betas, eps=train.eps,
            device=device, dtype=dtype,
        )  # fmt: skip
        self._optimizer, self._nesterov = train.optimizer, train.nesterov
        self._nowhere = StepTable(self.settings[:0], self.settings[:0])
        self.weights = {n: logical(w) for n, w in zip(self.names, self._weights, strict=True)}
        """fp32, of the parameters' shapes"""
        with torch.no_grad():
            for name, parameter in parameters.items():
                self.weights[name].copy_(parameter)
        self.refresh()
        self.leaves = self._take_over(model, parameters)
        """what the model computes with, in the order of ``names``"""

    def _take_over(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
        narrow = {id(p) for m in model.modules() if not isinstance(m, nn.modules.batchnorm._BatchNorm)
                  for p in m.parameters(recurse=False)} if self._copies else set()  # fmt: skip
        sources = self._copies or self._weights
        own = [logical(c) if id(p) in narrow else self.weights[n]
               for (n, p), c in zip(parameters.items(), sources, strict=True)]  # fmt: skip
        new = {id(p): nn.Parameter(tensor) for p, tensor in zip(parameters.values(), own, strict=True)}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = new[id(parameter)]
        return [new[id(p)] for p in parameters.values()]

    @property
    def lr(self) -> Tensor:
        """The learning rate of the next step, [1]."""
        return self.settings[LR : LR + 1]

    @property
    def state(self) -> dict[str, Tensor]:
        """The optimizer's state under torch's names, of the parameters' shapes; all share Adam's count of steps."""
        adam = self._optimizer != "sgd"
        groups = {"exp_avg" if adam else "momentum_buffer": self._first, "exp_avg_sq": self._second}
        found = {f"{n}/{slot}": logical(t) for slot, group in groups.items()
                 for n, t in zip(self.names, group, strict=False)}  # fmt: skip
        return found | ({f"{n}/step": self.settings[STEPS] for n in self.names} if adam else {})

    def places(self) -> dict[str, Tensor]:
        """Where each parameter lies in the flat buffers of weights, moments and copies: int64 of its shape."""
        flat = torch.arange(len(self.flat["weights"]), device=self.flat["weights"].device)
        return {n: flat.as_strided(w.shape, w.stride(), w.storage_offset()) for n, w in self.weights.items()}

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """d loss / d leaves, laid out like the weights: no copy is made where autograd did so already. Of several
        losses [R], their sum's."""
        found = torch.autograd.grad(loss.sum() if loss.dim() else loss, self.leaves)
        return [stored(g).contiguous() for g in found]

    def table(self, gradients: Sequence[Tensor]) -> StepTable:
        """Where the tensors of a step are; on a CPU nobody asks."""
        if not on_gpu(self._weights[0]):
            return self._nowhere
        return step_table(self._weights, gradients, self._first, self._second, self._copies, self._bits)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], table: StepTable) -> None:
        """One update of everything by gradients of ``self.gradients``; pruned weights and their state are +0.0."""
        masked_step(self._weights, gradients, self._first, self._second, self._copies, self._bits, self.settings, None,
                    table.pointers, table.work, self._optimizer, self._nesterov)  # fmt: skip

    @torch.no_grad()
    def restore(self, start: Mapping[str, Tensor]) -> None:
        """Put the weights to ``start`` by one copy, pruned ones to +0.0, and forget the optimizer's state."""
        packed = torch.zeros(self.flat["weights"].shape, dtype=self.flat["weights"].dtype)
        for name, view in zip(self.names, self._weights, strict=True):
            begin = view.storage_offset()
            packed[begin : begin + view.numel()].view(view.shape).copy_(stored(start[name]))
        if self.flat["weights"].is_cuda:
            packed = packed.pin_memory()
        self.flat["weights"].copy_(packed, non_blocking=True)
        for name in ("first", "second"):
            if name in self.flat:
                self.flat[name].zero_()
        self.settings[STEPS].zero_()
        self.zero_pruned()

    @torch.no_grad()
    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Copy masks into the bits; pruned weights become +0.0. Their optimizer state does in the next step."""
        for name, bits in zip(self.names, self._bits, strict=True):
            if name in masks:
                bits.copy_(pack(stored(masks[name].to(bits.device))))
        self.zero_pruned()

    @torch.no_grad()
    def zero_pruned(self) -> None:
        for weight, bits in zip(self._weights, self._bits, strict=True):
            if bits.numel():
                weight.masked_fill_(~unpack(bits, weight.shape[-1]), 0.0)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """The bf16 copies anew from the weights."""
        if self._copies:
            self.flat["copies"].copy_(self.flat["weights"])


def stored(tensor: Tensor) -> Tensor:
    """As it lies in memory: weights of convolutions as OHWI."""
    return tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor


def logical(tensor: Tensor) -> Tensor:
    """The inverse: as a model sees it."""
    return tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor
