"""One round's ticket in the forms that other programs read."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastlth
from fastlth import models
from fastlth.errors import RecipeError, unknown
from fastlth.exchange import card, target
from fastlth.models import skeleton
from fastlth.recipe import Recipe
from fastlth.search import winning_or_last
from fastlth.store import atomic, container, strict_json
from fastlth.tickets import LoadedTicket, load_ticket


@dataclass(frozen=True)
class Exported:
    """What was written where."""

    out: Path
    format: str
    recipe: Recipe
    round: int
    density: float


def export(
    file: Path, out: Path, *, format: str = "safetensors", round: int | None = None, force: bool = False
) -> Exported:
    """Write the ticket of one round: the winning one where ``round`` is not given, the last if there is none.

    ``out`` is a file, for ``hf`` a folder. Raises TicketError for a damaged ticket, RecipeError for a round it
    does not have, an unknown format or a package it lacks, OutputError where ``out`` is taken (``force`` replaces it)
    or cannot be written; nothing is left behind then.
    """
    if format not in FORMATS:
        raise RecipeError(unknown("format", format, FORMATS))
    if format == "onnx":
        _needs("onnx", "onnxscript")
    target.check(out, source=file, force=force, folder=card.FILES if format == "hf" else ())
    ticket = load_ticket(file)
    round = winning_or_last(ticket.rounds) if round is None else round
    ticket.mask(round)  # raises for a round that is not there
    with target.writing(out):
        FORMATS[format](ticket, round, out)
    return Exported(out, format, ticket.recipe, round, ticket.file.density(round))


def _safetensors(ticket: LoadedTicket, round: int, out: Path) -> None:
    """Weights as the round starts with them (zero where pruned, unless an action says otherwise), and a bool
    ``<name>_mask`` beside each; the same bytes every time."""
    tensors = {**_masked(ticket, round), **{f"{name}_mask": m for name, m in ticket.mask(round).items()}}
    container.write(out, {name: t.numpy() for name, t in tensors.items()}, {"format": "pt", **_facts(ticket, round)})


def _state_dict(ticket: LoadedTicket, round: int, out: Path) -> None:
    """What ``model.load_state_dict`` of the plain net takes."""
    _torch_save({n: v.detach() for n, v in ticket.model(round).state_dict().items()}, out)


def _torch_prune(ticket: LoadedTicket, round: int, out: Path) -> None:
    """The state dict of a net under ``torch.nn.utils.prune``. ``weight_orig`` holds pruned weights' values too."""
    prune = ticket.recipe.prune
    if prune.fills or prune.trains_pruned:
        raise RecipeError(f"--format torch-prune cannot hold a ticket of mask-0 action {prune.mask_0}, since "
                          "torch.nn.utils.prune puts pruned weights to zero; choose another format")  # fmt: skip
    masks = ticket.mask(round)
    values = ticket.rewind() if prune.rewinds else ticket.start(round)
    state: dict[str, Tensor] = {}
    for name in models.state(skeleton(ticket.recipe)):  # in the order of the net; a ticket's is alphabetical
        value = values[name]
        if name in masks:
            state |= {f"{name}_orig": value, f"{name}_mask": masks[name].to(value.dtype)}
        else:
            state[name] = value
    _torch_save(state, out)


def _hf(ticket: LoadedTicket, round: int, out: Path) -> None:
    """A folder as a model hub wants it: config.json, model.safetensors and a card."""
    facts: dict[str, Any] = {
        **_facts(ticket, round), "round": round, "density": ticket.file.density(round),
        "kept": ticket.file.kept(round), "recipe": ticket.recipe.to_unordered(),
    }  # fmt: skip
    result = ticket.rounds[round] if round < len(ticket.rounds) else {}
    with target.new_folder(out) as folder:
        _safetensors(ticket, round, folder / card.WEIGHTS)
        atomic.write(folder / card.CONFIG, card.config(ticket.recipe, facts).encode())
        atomic.write(folder / card.README, card.readme(ticket.recipe, facts, result).encode())


def _onnx(ticket: LoadedTicket, round: int, out: Path) -> None:
    """The masked net in inference mode: ``images`` [batch, C, H, W] -> ``logits`` [batch, classes]."""
    # Two images, since torch.export takes a dimension of one for a constant.
    images = torch.zeros(2, *ticket.recipe.data.facts.shape)
    program = torch.onnx.export(
        ticket.model(round).eval(), (images,), dynamo=True, verbose=False, input_names=["images"],
        output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    assert program is not None
    program.model.metadata_props.update(_facts(ticket, round))
    atomic.write(out, program.model_proto.SerializeToString())


FORMATS: dict[str, Callable[[LoadedTicket, int, Path], None]] = {
    "safetensors": _safetensors,
    "state-dict": _state_dict,
    "torch-prune": _torch_prune,
    "hf": _hf,
    "onnx": _onnx,
}


def _masked(ticket: LoadedTicket, round: int) -> dict[str, Tensor]:
    return models.state(ticket.model(round))


def _facts(ticket: LoadedTicket, round: int) -> dict[str, str]:
    """What the metadata of every format that has any says; ``recipe`` is enough to build the net."""
    recipe = ticket.recipe
    return {
        "fastlth_version": fastlth.__version__, "model": recipe.model.name, "dataset": recipe.data.name,
        "recipe_digest": recipe.digest, "round": str(round), "density": repr(ticket.file.density(round)),
        "recipe": strict_json.dumps(recipe.to_unordered()),
    }  # fmt: skip


def _torch_save(state: Mapping[str, Tensor], out: Path) -> None:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    atomic.write(out, buffer.getvalue())


def _needs(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise RecipeError(f"--format onnx needs {' and '.join(missing)}, not installed here; "
                          "install with: pip install 'fastlth[onnx]'")  # fmt: skip
