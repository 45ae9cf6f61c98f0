"""A net whose weights stay as they are and whose scores are trained: at every step the scores make a mask.

To the trainer it is a net like any other, whose parameters are the scores: order, augmentation, loss, optimizer,
evaluation and saving are those of every training.
"""

from __future__ import annotations

import torch
from fastlth_kernels.philox import Key
from torch import Tensor, nn
from torch.func import functional_call

from fastlth.data.sources import Source
from fastlth.experiments.supermasks import edge_popup, learned
from fastlth.experiments.supermasks.plan import Plan
from fastlth.models import build, state, weight_names
from fastlth.pruning.actions import MASK_1, Layer
from fastlth.recipe import Recipe
from fastlth.training.engines.dense import DenseEngine
from fastlth.training.engines.make import make_loader, make_splits


class SupermaskNet(nn.Module):
    """``net`` (any module, only its structure is used) with frozen values, and a mask from scores at every call.

    In training each call draws a new mask; in evaluation mode the mask is that of sample number ``sample``.
    Scores are in ``scores``, in the order of ``weights``; everything else of the net is a buffer.
    """

    sample: Tensor
    step: Tensor

    def __init__(self, net: nn.Module, values: dict[str, Tensor], weights: list[str], plan: Plan, key: Key) -> None:
        super().__init__()
        self._net = (net,)  # in a tuple, so that its parameters do not count as ours
        self._plan, self._key, self.weights = plan, key, weights
        self._buffer_of = {name: f"value/{name.replace('.', '/')}" for name in values}
        for name, value in values.items():
            self.register_buffer(self._buffer_of[name], value.detach().clone())
        frozen = {n: values[n] for n in weights}
        if plan.method == "learned":
            first = [torch.full_like(w, plan.sigmoid_bias) for w in frozen.values()]
        else:
            first = edge_popup.first_scores(frozen, key)
        self.scores = nn.ParameterList(nn.Parameter(s) for s in first)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sample", torch.zeros((), dtype=torch.int64))

    def masks(self) -> list[Tensor]:
        """One per weight, 0.0 and 1.0, of this step or sample; a gradient goes through to the scores."""
        scores = list(self.scores)
        if self._plan.method == "edge-popup":
            return edge_popup.highest(scores, self._plan.keep)
        if self._plan.rounded:
            return learned.rounded(scores)
        number, purpose = (self.step, learned.TRAINING) if self.training else (self.sample, learned.EVALUATION)
        return learned.bernoulli(scores, number, purpose, self._key)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W] under this step's or sample's masks."""
        values = {name: self.get_buffer(buffer) for name, buffer in self._buffer_of.items()}
        for name, mask in zip(self.weights, self.masks(), strict=True):
            values[name] = values[name] * (self._rescaled(mask) if self._plan.rescale else mask)
        net = self._net[0].train(self.training)
        if self.training:
            self.step += 1
        logits: Tensor = functional_call(net, values, (x,))
        return logits

    def _rescaled(self, mask: Tensor) -> Tensor:
        """Dynamic weight rescaling (Zhou et al. 2019, section 5.3), its gradient included: size / kept. Edge-popup's
        scaled weights: sqrt(size / kept), a constant."""
        if self._plan.method == "edge-popup":
            return mask * float((mask.numel() / edge_popup.kept(mask.numel(), self._plan.keep)) ** 0.5)
        return mask * (mask.numel() / mask.sum().clamp(min=1.0))


def signed_constant(weight: Tensor, multiplier: float) -> Tensor:
    """sign(w) * multiplier * std(layer), as the mask-1 action of that name."""
    every = torch.ones_like(weight, dtype=torch.bool)
    return multiplier * MASK_1["signed_constant"](Layer(initial=weight, mask=every, round=0, number=0, key=(0, 0)))


def supermask_net(recipe: Recipe, plan: Plan) -> SupermaskNet:
    """The recipe's net at theta0 (or its signed constants) with untrained scores, on the CPU."""
    made = build(recipe)
    values, weights = state(made), weight_names(made)
    if plan.signed_constant:
        values |= {n: signed_constant(values[n], plan.signed_constant_multiplier) for n in weights}
    return SupermaskNet(made, values, weights, plan, recipe.seeds.key("prune"))


def supermask_engine(recipe: Recipe, source: Source, plan: Plan) -> tuple[DenseEngine, SupermaskNet]:
    """An engine that trains the scores of ``supermask_net``; ``recipe.compute`` holds no ``auto``."""
    net = supermask_net(recipe, plan)
    engine = DenseEngine(recipe, make_loader(recipe, source), make_splits(recipe, source), net)
    engine.weight_names = [f"scores.{i}" for i in range(len(net.scores))]
    return engine, net
