"""The smaller net of a round: the same numbers without the units that the round's net can do without.

Units that nothing reads, and units that give 0, are left out of the forward and backward pass (``models/channels.py``
says which these are and why no logit and no other gradient changes). What stays is rounded up to multiples of 32 units,
by keeping some of those that could go. The optimizer still walks over the whole arena: the weights left out have
gradient 0 there, as they have in the whole net, so that decay and momentum move them alike and the next round ranks the
same values. One gather copies the weights that are left behind each update, one scatter puts their gradients in place.

Batch norm's running statistics of units left out stay where the round began. Nobody looks at them: an unread unit is
unread in every later round, a silent one gives 0 whatever they become, and a rewind puts them back.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastlth.models import skeleton, weight_names
from fastlth.models.channels import STEP, decay_keeps_signs, links, removable, work_left
from fastlth.recipe import Recipe
from fastlth.training import host
from fastlth.training.engines.arena import Arena, logical, stored

Flags = NDArray[np.bool_]
Stays = Mapping[str, Flags]
"""layer -> bool [units]: what stays of it"""


def unsupported(recipe: Recipe) -> str | None:
    """Why rounds of the recipe are always trained whole, as a clause; None if they need not be."""
    if recipe.model.own or recipe.prune.mask_0 != "mask" or links(skeleton(recipe)) is None:
        return "its net is not a chain of layers whose pruned weights are 0"
    if recipe.model.dropout:
        return "dropout draws by a unit's place"
    if recipe.compute.kernels == "triton" or recipe.compute.compile == "on":
        return "a smaller net would have to be compiled anew"
    return None


def needed(recipe: Recipe, masks: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Stays | None:
    """The units that a round with these masks and this start has to compute; None where it trains the whole net,
    because ``compute.compact`` does not allow it or too little would be saved. A function of its arguments alone, so
    that a resumed round chooses alike."""
    limit = recipe.compute.compact
    if limit <= 0 or unsupported(recipe):
        return None
    net = skeleton(recipe)
    chain = links(net)
    assert chain is not None
    kept = {n: masks[n].cpu().numpy() if n in masks else np.ones(tuple(net.get_parameter(n).shape), bool)
            for n in weight_names(net)}  # fmt: skip
    values = {n: t.detach().cpu().numpy() for n, t in start.items() if n not in kept}
    found = removable(chain, kept, values, signs_stay=decay_keeps_signs(recipe.train))
    stays = {name: rounded_up(~units.either) for name, units in found.items()}
    left = work_left(net, recipe.data.facts.shape, {name: ~s for name, s in stays.items()})
    return stays if left < 1 and left <= limit else None


def rounded_up(stays: Flags, step: int = STEP) -> Flags:
    """``stays`` with as many further units as make a multiple of ``step``, at least one of it, or all there are."""
    count = int(stays.sum())
    more = max(-(-count // step), 1) * step - count
    return stays | (~stays & (np.cumsum(~stays) <= more))


class Compact:
    """What is left of ``model``, whose parameters ``arena`` has taken over, on their device."""

    def __init__(self, model: nn.Module, arena: Arena, stays: Stays) -> None:
        self.net = _smaller(model, stays).train(model.training)
        self._whole, self._arena, self._widths = model, arena, _widths(stays)
        leaves = dict(zip(arena.names, arena.leaves, strict=True))
        own = [n for n, _ in self.net.named_parameters()]
        kinds = dict.fromkeys(leaves[n].dtype for n in own)
        self._parts = [_Part(self.net, arena, [n for n in own if leaves[n].dtype == kind], kind) for kind in kinds]
        views = {n: g for part in self._parts for n, g in part.gradients.items()}
        self._gradients = [views[n] for n in arena.names]
        self._norms = [_Norm(name, module, model.get_submodule(name)) for name, module in self.net.named_children()
                       if isinstance(module, nn.BatchNorm2d)]  # fmt: skip
        self.point(stays)

    def fits(self, stays: Stays) -> bool:
        """Whether the net for these units has the same shapes: then ``point`` suffices, and nothing is captured."""
        return self._widths == _widths(stays)

    @torch.no_grad()
    def point(self, stays: Stays) -> None:
        """Stand for these units from now on, as many as ever. Nothing moves in memory."""
        picked = _picked(self._whole, stays)
        places = self._arena.places()
        for part in self._parts:
            part.index.copy_(torch.cat([_pick(places[n], picked[n]) for n in part.gradients]))
            part.everywhere.zero_()  # of the units before, too
        for norm in self._norms:
            norm.rows.copy_(picked[f"{norm.name}.weight"][0])
        self.read_in()

    @torch.no_grad()
    def read_in(self) -> None:
        """Weights and running statistics anew from the whole net's."""
        self.gather()
        for norm in self._norms:
            for whole, small in norm.statistics:
                small.copy_(whole.index_select(0, norm.rows))

    @torch.no_grad()
    def write_back(self) -> None:
        """Running statistics into the whole net's; its weights are up to date at any time."""
        for norm in self._norms:
            for whole, small in norm.statistics:
                whole.index_copy_(0, norm.rows, small)

    @torch.no_grad()
    def gather(self) -> None:
        """The weights anew from the arena, which an update has changed."""
        for part in self._parts:
            torch.index_select(part.source, 0, part.index, out=part.values)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """d loss / d weights as ``Arena.gradients`` has them, 0 for all that is left out; always in one place."""
        found = torch.autograd.grad(loss, [p for part in self._parts for p in part.leaves])
        for part in self._parts:
            own, found = found[: len(part.leaves)], found[len(part.leaves) :]
            with host.any_order():
                part.everywhere.index_copy_(0, part.index, torch.cat([stored(g).reshape(-1) for g in own]))
        return self._gradients


class _Part:
    """Parameters ``names`` of the smaller net, whose values come from one flat buffer of the arena."""

    def __init__(self, net: nn.Module, arena: Arena, names: list[str], kind: torch.dtype) -> None:
        self.source = arena.flat["copies" if kind == torch.bfloat16 else "weights"]
        shapes = [stored(net.get_parameter(n)).shape for n in names]
        sizes = [shape.numel() for shape in shapes]
        self.index = torch.zeros(sum(sizes), dtype=torch.int64, device=self.source.device)
        self.values = torch.zeros(sum(sizes), dtype=kind, device=self.source.device)
        """of ``source`` at ``index``"""
        self.everywhere = torch.zeros_like(self.source)
        """gradients, as ``source`` lies in memory"""
        self.gradients = {n: stored(_view(self.everywhere, arena.weights[n])) for n in names}
        self.leaves: list[nn.Parameter] = []
        for name, values, shape in zip(names, torch.split(self.values, sizes), shapes, strict=True):
            owner, _, own = name.rpartition(".")
            self.leaves.append(nn.Parameter(logical(values.view(shape))))
            setattr(net.get_submodule(owner), own, self.leaves[-1])


class _Norm:
    """A batch norm of the smaller net and the whole one's. They share their count of batches."""

    def __init__(self, name: str, small: nn.BatchNorm2d, whole: nn.Module) -> None:
        self.name = name
        self.statistics: list[tuple[Tensor, Tensor]] = [(whole.get_buffer(n), small.get_buffer(n))
                                                        for n in ("running_mean", "running_var")]  # fmt: skip
        self.rows = torch.zeros(small.num_features, dtype=torch.int64, device=self.statistics[0][0].device)
        small.num_batches_tracked = whole.get_buffer("num_batches_tracked")


def _widths(stays: Stays) -> dict[str, int]:
    return {name: int(flags.sum()) for name, flags in stays.items()}


def _picked(model: nn.Module, stays: Stays) -> dict[str, tuple[Tensor, ...]]:
    """By the name of each parameter, the indices that stay along its first dimension and, of a weight, its second."""
    found: dict[str, tuple[Tensor, ...]] = {}
    before: Flags | None = None  # the units that are read; None: the image's channels
    rows = torch.zeros(0)
    for name, module in model.named_children():
        if isinstance(module, nn.Linear | nn.Conv2d):
            device, inputs = module.weight.device, module.weight.shape[1]
            columns = np.ones(inputs, bool) if before is None else np.repeat(before, inputs // len(before))
            before = stays[name]
            rows = torch.from_numpy(np.flatnonzero(before)).to(device)
            found[f"{name}.weight"] = rows, torch.from_numpy(np.flatnonzero(columns)).to(device)
            found[f"{name}.bias"] = (rows,)
        elif isinstance(module, nn.BatchNorm2d):
            found[f"{name}.weight"] = found[f"{name}.bias"] = (rows,)
    return found


def _pick(places: Tensor, indices: tuple[Tensor, ...]) -> Tensor:
    """Those of ``places``, in the order in which the smaller tensor lies in memory."""
    for dim, index in enumerate(indices):
        places = places.index_select(dim, index)
    return stored(places).reshape(-1)


def _view(flat: Tensor, like: Tensor) -> Tensor:
    return flat.as_strided(like.shape, like.stride(), like.storage_offset())


def _smaller(model: nn.Module, stays: Stays) -> nn.Sequential:
    """The same layers with fewer units. Parameters are on the meta device; what has none is the model's own."""
    net, picked = nn.Sequential(), _picked(model, stays)
    for name, module in model.named_children():
        new = module
        if isinstance(module, nn.Linear | nn.Conv2d):
            rows, columns = map(len, picked[f"{name}.weight"])
            has_bias = module.bias is not None
            if isinstance(module, nn.Linear):
                new = nn.Linear(columns, rows, has_bias, device="meta")
            else:
                new = nn.Conv2d(
                    columns, rows, module.kernel_size, module.stride, module.padding, module.dilation,  # type: ignore[arg-type]
                    bias=has_bias, padding_mode=module.padding_mode, device="meta",
                )  # fmt: skip
        elif isinstance(module, nn.BatchNorm2d):
            new = nn.BatchNorm2d(len(picked[f"{name}.weight"][0]), module.eps, module.momentum,
                                 device=module.weight.device, dtype=module.weight.dtype)  # fmt: skip
        net.add_module(name, new)
    return net
