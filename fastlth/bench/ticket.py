"""Bytes and seconds of keeping a whole search: search.ticket beside the obvious ways.

The weights are the net's own theta0; which of them die in which round is drawn at random, with the counts of
global pruning, because a mask without structure is what a code for masks has to live with.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastlth.models import INIT_VERSION, build, weight_names
from fastlth.recipe import DataSection, ModelSection, PruneSection, Recipe, TrainSection, exact
from fastlth.store import atomic, inspect
from fastlth.store import ticket as tickets
from fastlth.store.ticket import Ticket, removed_per_round

OURS = "ours"
Row = dict[str, Any]
Masks = Mapping[str, NDArray[np.bool_]]
Spent = tuple[float, float]
"""seconds by the clock and on the CPU; where others use the machine too, only the second says what a way costs"""


def rows(model: str, dataset: str, rounds: int) -> Iterator[Row]:
    """One row per way, ours first. ``bytes`` are of all rounds; ``seconds`` include encoding and fsync."""
    recipe = Recipe(
        model=ModelSection(name=model), data=DataSection(name=dataset),
        train=TrainSection(iterations=1, batch_size=1, lr=1.0), prune=PruneSection(rounds=rounds, scope="global"),
    )  # fmt: skip
    search = synthetic(recipe)
    masks = [search.mask(k) for k in range(1, rounds + 1)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file"

        def row(path: str, masks: float, theta0: float, spent: Spent | None) -> Row:
            return {"subject": "ticket", "model": model, "dataset": dataset, "path": path,
                    "bytes": {"masks": round(masks), "theta0": round(theta0)},
                    "seconds": spent and spent[0], "cpu_seconds": spent and spent[1]}  # fmt: skip

        for path, one in (
            (OURS, search),
            ("ours, theta0 as a seed", replace(search, theta0_seed={"init_version": INIT_VERSION})),
        ):
            spent = _spent(functools.partial(tickets.save, file, one))
            size = inspect.summary(file).bytes
            yield row(path, size["masks"], size["theta0"], spent)

        yield row("order-0 entropy of pruned_at and of theta0's bytes", entropy(removed_per_round(search.pruned_at)),
                  _entropy_of_bytes(search.rewind), None)  # fmt: skip

        theta0 = {n: torch.from_numpy(a) for n, a in search.rewind.items()}
        masked = {n: t * torch.from_numpy(masks[-1][n]) if n in masks[-1] else t for n, t in theta0.items()}
        first = _spent(functools.partial(_torch_save, file, theta0))
        whole = file.stat().st_size
        later = _spent(functools.partial(_torch_save, file, masked))  # rounds' files are of one size: one is written
        all_rounds = first[0] + rounds * later[0], first[1] + rounds * later[1]
        yield row("torch.save of the weights per round", rounds * file.stat().st_size, whole, all_rounds)

        for path, code in {"bit masks": _plain, "bit masks + zlib": zlib.compress, "bit masks + zstd": _zstd()}.items():
            if code is not None:
                sizes: list[int] = []
                spent = _spent(functools.partial(_bit_masks, file, masks, code, sizes))
                both = first[0] + spent[0], first[1] + spent[1]
                yield row(f"{path}, theta0 by torch.save", sum(sizes), whole, both)


def synthetic(recipe: Recipe) -> Ticket:
    """A finished search of the recipe's net and rounds that trained nothing; all its layers are ranked together."""
    net = build(recipe)
    rewind = {name: tensor.detach().numpy() for name, tensor in net.state_dict().items()}
    shapes = {name: rewind[name].shape for name in weight_names(net)}
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    died, rounds = np.zeros(ends[-1], np.uint8), []
    left = len(died)
    for k in range(recipe.prune.rounds + 1):
        gone = int(exact(recipe.prune.rate) * left) if k else 0
        died[left - gone : left] = k
        left -= gone
        rounds.append({"round": k, "kept": left})
    np.random.default_rng(recipe.seeds.base).shuffle(died)
    parts = zip(shapes.items(), np.split(died, ends[:-1]), strict=True)
    return Ticket(
        recipe=recipe, resolved={}, rewind=rewind, rewind_iteration=0, rounds=tuple(rounds), all_weights=len(died),
        pruned_at={name: part.reshape(shape) for (name, shape), part in parts},
    )  # fmt: skip


def _spent(call: Callable[[], object]) -> Spent:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def _torch_save(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    with file.open("wb") as f:
        torch.save(dict(tensors), f)
        f.flush()
        os.fsync(f.fileno())


def _bit_masks(file: Path, rounds: Sequence[Masks], code: Callable[[bytes], bytes], sizes: list[int]) -> None:
    """Each round's masks as bits, coded, in a file of its own, whose size is appended to ``sizes``."""
    for masks in rounds:
        data = code(b"".join(np.packbits(mask).tobytes() for mask in masks.values()))
        atomic.write(file, data)
        sizes.append(len(data))


def _plain(data: bytes) -> bytes:
    return data


def _zstd() -> Callable[[bytes], bytes] | None:
    """zstd at its usual level, if Python (3.14) or the package zstandard brings it."""
    for module in ("compression.zstd", "zstandard"):
        try:
            compress: Callable[[bytes], bytes] = importlib.import_module(module).compress
            return compress
        except ImportError:
            continue
    return None


def _entropy_of_bytes(arrays: Mapping[str, NDArray[Any]]) -> float:
    """Each byte plane of the float32 values by itself, the rest as it is."""
    floats = [np.ascontiguousarray(a).reshape(-1) for a in arrays.values() if a.dtype == np.float32]
    planes = np.zeros((4, 256), np.int64)
    for a in floats:
        for plane, column in zip(planes, a.view(np.uint8).reshape(-1, 4).T, strict=True):
            plane += np.bincount(column, minlength=256)
    return sum(entropy(p) for p in planes) + sum(a.nbytes for a in arrays.values() if a.dtype != np.float32)


def entropy(counts: NDArray[np.int64]) -> float:
    """Bytes that no code of single symbols can go below."""
    some = counts[counts > 0]
    return float(-(some * np.log2(some / some.sum())).sum() / 8)
