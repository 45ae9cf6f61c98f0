"""Scores for pruning before training: SNIP, GraSP, SynFlow, magnitude. High scores stay.

All are computed in float64 on a copy of the net, dropout off; a layer that may not be pruned takes part in the
forward pass and has no score.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from fastlth_kernels.philox import Key
from torch import Tensor, nn

from fastlth.masks import Masks
from fastlth.pruning.budget import Budget
from fastlth.pruning.select import remove_lowest

Scores = dict[str, Tensor]

GRASP_TEMPERATURE = 200.0  # the authors' program divides the logits by it; their paper does not name it
SYNFLOW_STEPS = 100
PART = 100  # images in one graph: GraSP's second derivatives in float64 take much memory


def _nothing() -> None:
    pass


def magnitude(model: nn.Module, names: Iterable[str]) -> Scores:
    """|w| of the initial weights (Frankle et al. 2021, "Pruning Neural Networks at Initialization")."""
    parameters = dict(model.named_parameters())
    return {n: parameters[n].detach().abs() for n in names}


def snip(
    model: nn.Module, names: Iterable[str], images: Tensor, labels: Tensor, *, between: Callable[[], None] = _nothing
) -> Scores:
    """|w dL/dw|, how much the loss reacts to removing a weight (Lee et al. 2019, equation 6).

    images: normalised floats [N, C, H, W]; labels: int64 [N]. Batch norm sees at most ``PART`` images at a time.
    ``between`` is called after each part and may raise.
    """
    net, weights = _double(model, names)
    slopes = _slopes(net, weights, _parts(images, labels), 1.0, between)
    return {n: (w * slopes[n]).abs().detach() for n, w in weights.items()}


def grasp(
    model: nn.Module, names: Iterable[str], images: Tensor, labels: Tensor, temperature: float = GRASP_TEMPERATURE,
    *, between: Callable[[], None] = _nothing,
) -> Scores:  # fmt: skip
    """w (H g): weights go whose removal hurts the flow of gradients least (Wang et al. 2020, equation 8).

    The paper's score is -w (H g), and its highest go. H and g are of the loss with logits / ``temperature``. All else
    as in ``snip``.
    """
    net, weights = _double(model, names)
    parts = _parts(images, labels)
    slopes = _slopes(net, weights, parts, temperature, between)
    curved = {n: torch.zeros_like(w) for n, w in weights.items()}
    for part in parts:  # H g is the sum over the parts' H, each times the whole g
        loss = _loss(net, *part, temperature, len(labels))
        bent = _grad(loss, weights, create_graph=True)
        product = torch.stack([(slopes[n] * g).sum() for n, g in zip(weights, bent, strict=True)]).sum()
        for total, g in zip(curved.values(), _grad(product, weights), strict=True):
            total += g
        between()
    return {n: (w * curved[n]).detach() for n, w in weights.items()}


def _parts(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    parts = -(-len(labels) // PART)  # of nearly equal sizes, so that none is too small for batch norm
    return list(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True))


def _grad(value: Tensor, weights: Mapping[str, Tensor], *, create_graph: bool = False) -> tuple[Tensor, ...]:
    """Zeros for a weight that the net does not use, as one's own net may have."""
    return torch.autograd.grad(value, list(weights.values()), create_graph=create_graph, materialize_grads=True)


def _loss(net: nn.Module, images: Tensor, labels: Tensor, temperature: float, count: int) -> Tensor:
    """These images' share of the mean cross-entropy over ``count`` of them."""
    return F.cross_entropy(net(images.double()) / temperature, labels, reduction="sum") / count


def _slopes(
    net: nn.Module, weights: dict[str, Tensor], parts: list[tuple[Tensor, Tensor]], temperature: float,
    between: Callable[[], None],
) -> Scores:  # fmt: skip
    """dL/dw of the mean over all parts' images."""
    total = {n: torch.zeros_like(w) for n, w in weights.items()}
    count = sum(len(labels) for _, labels in parts)
    for part in parts:
        slopes = _grad(_loss(net, *part, temperature, count), weights)
        for name, slope in zip(weights, slopes, strict=True):
            total[name] += slope
        between()
    return total


def synflow(
    model: nn.Module, budget: Budget, shape: tuple[int, ...], *, numbers: Mapping[str, int], key: Key,
    steps: int = SYNFLOW_STEPS,
) -> Masks:  # fmt: skip
    """Masks that keep what ``budget`` says, in ``steps`` prunings (Tanaka et al. 2020, algorithm 1).

    The score is |w dR/dw| (equation 4), R the sum of the outputs for an image of ones with the absolute values of all
    parameters; batch norm uses its running statistics, so that R is that of a linear net. Of n weights, after step i
    n (kept / n)^(i / steps) are left, and scores are taken anew each time. ``shape`` is an image's.
    """
    names = [n for group, _ in budget for n in group]
    net, weights = _double(model, names)
    net.eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.abs_()
    masks = {n: torch.ones_like(weights[n], dtype=torch.bool) for n in names}
    for step in range(1, steps + 1):
        total = net(torch.ones((1, *shape), dtype=torch.float64)).sum()
        slopes = _grad(total, weights)
        scores = {n: (w * g).detach() for (n, w), g in zip(weights.items(), slopes, strict=True)}
        for group, kept in budget:
            size = sum(weights[n].numel() for n in group)
            left = kept if step == steps else max(kept, round(size * (kept / size) ** (step / steps)))
            gone = sum(int(masks[n].sum()) for n in group) - left
            masks |= remove_lowest(scores, masks, group, gone, numbers=numbers, round=step, key=key)
        with torch.no_grad():
            for name, mask in masks.items():
                weights[name].masked_fill_(~mask, 0.0)
    return masks


def _double(model: nn.Module, names: Iterable[str]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A float64 copy with batch norm alone in training mode, so that nothing is dropped, and its weights ``names``."""
    net = copy.deepcopy(model).double().eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    parameters = dict(net.named_parameters())
    return net, {n: parameters[n] for n in names}
