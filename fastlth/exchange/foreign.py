"""Reading what other programs wrote. Nothing here runs code that a file holds: ``weights_only=True``, always."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlth.errors import RecipeError, TicketError
from fastlth.recipe import Recipe
from fastlth.store import container, strict_json

MAX_FILE = 1 << 32


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """Masks of successive rounds and rewind values, under the other program's names and in its order."""

    masks: tuple[Mapping[str, Tensor], ...]
    """bool, one per round; a dense round before the first may be left out"""
    state: Mapping[str, Tensor]
    """parameters and buffers; empty if the file has none"""
    recipe: Recipe | None = None
    notes: tuple[str, ...] = ()
    """sentences a user should read"""


def torch_prune(path: Path) -> Foreign:
    """A state dict under ``torch.nn.utils.prune``: ``<name>_orig`` and ``<name>_mask`` instead of ``<name>``.

    Masks alone, without any other tensor, are allowed. Raises TicketError.
    """
    tensors = _torch_load(path)
    masks, state = _split(tensors)
    if not masks:
        raise TicketError(f"{path} holds no <name>_mask; save the state_dict of a net pruned with "
                          "torch.nn.utils.prune before prune.remove")  # fmt: skip
    return Foreign(masks=(_bools(path, masks),), state={n.removesuffix("_orig"): t for n, t in state.items()})


def open_lth(path: Path) -> Foreign:
    """The levels of an open_lth run: ``lottery_<hash>``, its ``replicate_<r>``, or any folder of ``level_<k>``.

    Rewind values are those of the earliest model of level 0, where there is one. Raises TicketError.
    """
    run = _replicate(path)
    levels = sorted(int(p.name.removeprefix("level_")) for p in run.glob("level_*") if p.name[6:].isdecimal())
    if levels != list(range(len(levels))):
        raise TicketError(f"{run} has the levels {levels}; they must be 0, 1, 2, ... without a gap")
    paths = [run / f"level_{k}" / "main" / "mask.pth" for k in levels]
    masks = tuple(_bools(path, _torch_load(path)) for path in paths)
    models = _models(run / "level_0" / "main")
    if not models:
        return Foreign(masks=masks, state={})
    step = min(models)
    notes = [f"rewind values: {models[step]}"]
    if step != (0, 0):
        notes.append(f"that is epoch {step[0]}, iteration {step[1]}; say which iteration training goes on from "
                     "with --set prune.rewind_to=N if you have not")  # fmt: skip
    return Foreign(masks=masks, state=_torch_load(models[step]), notes=tuple(notes))


def safetensors(path: Path) -> Foreign:
    """What ``ticket export --format safetensors`` wrote. Raises TicketError."""
    arrays, metadata = container.read(path, MAX_FILE)
    try:
        recipe = Recipe.from_dict(strict_json.loads(metadata["recipe"]))
        if recipe.digest != metadata["recipe_digest"]:
            raise ValueError("its recipe does not have the digest it names")
        round = int(metadata["round"])
    except KeyError as error:
        raise TicketError(f"{path} is not an export of fastlth (its metadata have no {error}); give a file of "
                          "ticket export --format safetensors") from error  # fmt: skip
    except (ValueError, TypeError, AttributeError, RecipeError) as error:
        raise container.damaged(path, error) from error
    masks, state = _split({name: torch.from_numpy(array) for name, array in arrays.items()})
    notes = (f"round {round} of the search is round 1 here, and its pruned weights rewind to zero",) if round else ()
    return Foreign(masks=(_bools(path, masks),), state=state, recipe=recipe, notes=notes)


def _split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(masks by the name of what they mask, everything else)"""
    masks = {name.removesuffix("_mask"): t for name, t in tensors.items() if name.endswith("_mask")}
    return masks, {name: t for name, t in tensors.items() if not name.endswith("_mask")}


def _bools(path: Path, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, mask in masks.items():
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise TicketError(f"{path}: the mask of {name} holds values besides 0 (pruned) and 1 (kept); "
                              "give a file of masks of 0 and 1")  # fmt: skip
    return {name: mask != 0 for name, mask in masks.items()}


def _replicate(path: Path) -> Path:
    replicates = sorted(path.glob("replicate_*"))
    if len(replicates) > 1:
        raise TicketError(f"{path} has {len(replicates)} replicates; give the folder of one, such as {replicates[0]}")
    run = replicates[0] if replicates else path
    if not (run / "level_0").is_dir():
        raise TicketError(f"{run} has no folder level_0; give an open_lth run: lottery_<hash> or its replicate_<r>")
    return run


def _models(folder: Path) -> dict[tuple[int, int], Path]:
    """The saved models by (epoch, iteration)."""
    names = {p: re.fullmatch(r"model_ep(\d+)_it(\d+)\.pth", p.name) for p in folder.glob("model_*.pth")}
    return {(int(match[1]), int(match[2])): p for p, match in names.items() if match}


def _torch_load(path: Path) -> dict[str, Tensor]:
    """A dict of plain CPU tensors, by name. Raises TicketError for anything else."""
    try:
        if path.stat().st_size > MAX_FILE:
            raise TicketError(f"{path} has more than the {MAX_FILE} bytes allowed; check the path")
        with warnings.catch_warnings(action="ignore"):  # of tensors that are refused below
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise TicketError(f"there is no file {path}; check the path") from error
    except OSError as error:
        raise TicketError(f"cannot read {path}: {error.strerror}; check the path") from error
    except TicketError:
        raise
    except Exception as error:  # a damaged or hostile pickle can end in any of them
        raise TicketError(f"{path} is not a file of tensors alone ({_short(error)}); "
                          "save a state_dict with torch.save") from error  # fmt: skip
    if not isinstance(loaded, dict) or not all(isinstance(name, str) and _plain(t) for name, t in loaded.items()):
        raise TicketError(f"{path} is not a dict of names and dense tensors; save a state_dict with torch.save")
    return {name: t.detach() for name, t in loaded.items()}


def _plain(value: object) -> bool:
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.device.type != "cpu":
        return False
    # A few stored bytes with strides of 0 can pose as a tensor of any size.
    whole = value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    return whole and not value.is_quantized and not value.is_complex()


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"
