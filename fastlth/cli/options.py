"""Options that several commands share, and how flags become settings of a recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer

from fastlth.catalogue import DATASETS, MODELS
from fastlth.errors import RecipeError


def among(names: Iterable[str]) -> Callable[[str], list[str]]:
    """For the shell's Tab: the names that begin as what is typed does."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything random (default: 0)")]
Iterations = Annotated[int | None, typer.Option("--iterations", "-i", help="Training steps.")]
Epochs = Annotated[float | None, typer.Option("--epochs", "-e", help="The same in passes over the data.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", "-b", help="Images per step.")]
Lr = Annotated[float | None, typer.Option("--lr", "-l", help="Learning rate.")]
MODEL_NAMES = f"{', '.join(MODELS)}, lenet-A-B"
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Where the data lies or goes (default: $FASTLTH_DATA, else a cache)")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Log = Annotated[
    list[str] | None, typer.Option("--log", help="Send metrics to tensorboard or wandb too; may be given twice.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder of all runs.")]

COMPLETE_MODEL, COMPLETE_DATASET = among(MODELS), among(DATASETS)
Model = Annotated[str, typer.Argument(help="As in find-ticket.", autocompletion=COMPLETE_MODEL)]
Dataset = Annotated[str, typer.Argument(help="As in find-ticket.", autocompletion=COMPLETE_DATASET)]

OWN_NET = "torchvision:NAME, timm:NAME or your own package.module:function"
OWN_DATA = "imagefolder:PATH or your own package.module:function"


def seconds(text: str | None) -> float | None:
    """ "60s", "2min" or "60" as seconds. Raises RecipeError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)?", text.strip())
    if match is None:
        raise RecipeError(f"--save-every takes a time such as 60s or 2min, got '{text}'")
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600, None: 1}[match[2]]


def length(iterations: int | None, epochs: float | None) -> int | str | None:
    """train.iterations from --iterations or --epochs. Raises RecipeError if both are given."""
    if iterations is not None and epochs is not None:
        raise RecipeError(f"--iterations {iterations} and --epochs {epochs:g} contradict each other; give one")
    return f"{Decimal(repr(epochs)).normalize():f}ep" if epochs is not None else iterations


def numbers(flag: str, text: str, example: str) -> list[int]:
    """ "1,7,9" as integers. Raises RecipeError, with the ``example``, for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"{flag} takes numbers such as {example}, got '{text}'") from None


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings whose flag was used."""
    return {name: value for name, value in settings.items() if value is not None}


def check_in_place(context: typer.Context) -> None:
    """Raises RecipeError for an option of a group of commands that stands before one of them, where none reads it."""
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if source is not None and source.name == "COMMANDLINE":
            name, after = option.opts[0], context.invoked_subcommand
            raise RecipeError(f"{name} stands before {after}, where nothing looks at it; put it behind {after} if "
                              f"'{context.command_path} {after} --help' has it, or leave it out")  # fmt: skip


def check_looked_at(settings: Iterable[str], looked_at: Sequence[str], who: str) -> None:
    """Raises RecipeError for a setting of a search that would do nothing for ``who`` but name another folder."""
    for name in settings:
        setting = ".".join(name.split(".")[:2])
        if setting in ("store.keep_weights", "store.theta0") or (
            setting.startswith("prune.") and setting not in looked_at
        ):
            rest = f"looks at {', '.join(looked_at)}" if looked_at else "looks at no setting of pruning"
            raise RecipeError(f"{name} is for searches and changes nothing here; leave it out ({who} {rest})")


def check_factors(settings: Mapping[str, Any], why: str) -> None:
    """Raises RecipeError for factors of prune.scale where only layers left whole (0) or not (1) matter, which is
    ``why``."""
    for name, value in settings.items():
        if name == "prune.scale" or name.startswith("prune.scale."):
            for factor in value.values() if isinstance(value, dict) else [value]:
                if factor not in (0, 1):
                    raise RecipeError(f"{name} may be 0, which leaves a layer whole, or 1 here, since {why}; "
                                      f"got {factor!r}")  # fmt: skip
