"""Select: remove exactly k weights, those with the lowest scores; ties go by a random key.

The key of a weight is a pure function of (seed, round, tensor, index), so ties are broken exactly,
reproducibly and without bias; breaking them by index would prune whole rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from fastlth_kernels.philox import Key
from torch import Tensor

from fastlth.errors import DivergedError
from fastlth.masks import Masks
from fastlth.pruning.draws import keys


def remove_lowest(
    scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], names: Sequence[str], count: int,
    *, numbers: Mapping[str, int], round: int, key: Key,
) -> Masks:  # fmt: skip
    """New masks of the tensors ``names``, with exactly ``count`` fewer weights kept over all of them.

    scores and masks hold tensors of equal shapes; ``numbers`` gives each tensor's place in the model.
    Raises DivergedError if a kept weight's score is NaN.
    """
    kept = [masks[n].reshape(-1).nonzero().squeeze(1) for n in names]
    values = torch.cat([scores[n].reshape(-1)[index] for n, index in zip(names, kept, strict=True)])
    if bool(values.isnan().any()):
        raise DivergedError(f"weights of {', '.join(names)} are NaN; they cannot be ranked (try a lower --lr)")
    tensor = torch.cat([torch.full_like(index, numbers[n]) for n, index in zip(names, kept, strict=True)])
    removed = lowest(values, count, torch.cat(kept), tensor, round, key)
    new = {}
    for name, index, gone in zip(names, kept, torch.split(removed, [len(i) for i in kept]), strict=True):
        flat = masks[name].reshape(-1).clone()
        flat[index[gone]] = False
        new[name] = flat.view(masks[name].shape)
    return new


def lowest(values: Tensor, count: int, index: Tensor, tensor: Tensor, round: int, key: Key) -> Tensor:
    """bool [n]: True for the ``count`` lowest of ``values`` [n]; index and tensor [n] say where each stands."""
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    if values.device.type == "mps":  # which cannot find the k-th value; once a round
        return lowest(values.cpu(), count, index.cpu(), tensor.cpu(), round, key).to(values.device)
    threshold = values.kthvalue(count).values
    removed = values < threshold
    tied = (values == threshold).nonzero().squeeze(1)
    missing = count - int(removed.sum())
    if missing < len(tied):
        tied = tied[keys(index[tied], tensor[tied], round, key).argsort(stable=True)[:missing]]
    removed[tied] = True
    return removed
