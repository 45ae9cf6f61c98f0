"""Trained weights of a round, kept only when asked for: weights/round-<k>.safetensors in the run directory.

Of a prunable weight only the survivors are stored, in the order of the weight's elements (row-major); the ticket's
mask of the round says where they belong. Biases, batch norm and unpruned layers are stored whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastlth.errors import TicketError
from fastlth.store import atomic, container

Arrays = Mapping[str, NDArray[Any]]
_FORMAT = {"format": "fastlth weights", "schema": "1"}


def path(run: Path, round: int) -> Path:
    """Where the trained weights of a round lie in the run directory ``run``."""
    return run / "weights" / f"round-{round}.safetensors"


def save(run: Path, round: int, weights: Arrays, masks: Mapping[str, NDArray[np.bool_]], digest: str) -> None:
    """Write atomically. ``masks`` are those of the round. Raises OutputError or EnvironmentFailure."""
    file = path(run, round)
    atomic.make_folders(file.parent)
    survivors = {n: w[masks[n]] if n in masks else w for n, w in weights.items()}
    container.write(file, survivors, {**_FORMAT, "round": str(round), "recipe_digest": digest})


def load(run: Path, round: int, masks: Mapping[str, NDArray[np.bool_]], digest: str) -> dict[str, NDArray[Any]]:
    """Parameters and buffers after the round's training, pruned weights 0. Raises TicketError."""
    file = path(run, round)
    if not file.exists():
        raise TicketError(f"{file} is not there: a search keeps trained weights only with --keep-weights last or all")
    stored, metadata = container.read(file)
    if {k: metadata.get(k) for k in _FORMAT} != _FORMAT or metadata.get("recipe_digest") != digest:
        raise TicketError(f"{file} does not hold the weights of this ticket; start again with --fresh")
    whole = {}
    for name, values in stored.items():
        if name not in masks:
            whole[name] = values
            continue
        if values.size != np.count_nonzero(masks[name]):
            raise TicketError(f"{file} does not fit the ticket's mask of round {round}; start again with --fresh")
        whole[name] = np.zeros(masks[name].shape, values.dtype)
        whole[name][masks[name]] = values
    return whole


def rounds(run: Path) -> list[int]:
    """The rounds whose weights are there, ascending."""
    found = (re.fullmatch(r"round-(\d+)\.safetensors", file.name) for file in (run / "weights").glob("*"))
    return sorted(int(match[1]) for match in found if match)


def drop_before(run: Path, round: int) -> None:
    """Remove the weights of all rounds before ``round``."""
    for earlier in rounds(run):
        if earlier < round:
            atomic.delete(path(run, earlier))
