"""Tensors as arrays and back, always as copies on the CPU: what is saved must not change while it is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Arrays = dict[str, NDArray[Any]]


def arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    """Of the same shapes, contiguous."""
    return {name: t.detach().to("cpu", copy=True).contiguous().numpy() for name, t in tensors.items()}


def tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """The inverse."""
    return {name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}
