"""``fastlth connectivity RUN``: linear mode connectivity, the instability analysis."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastlth.cli.options import DataDir, Json, numbers
from fastlth.errors import RecipeError

EXAMPLE = "Example: fastlth connectivity runs/lenet-300-100-mnist-c43be567/r0 --rounds 0,7"

Opt = typer.Option


def connectivity(
    run: Annotated[Path, typer.Argument(help="A run folder (r<seed>) with a search.ticket.")],
    rounds: Annotated[str, Opt(help="Whose nets: numbers such as 0,7, or all.")] = "all",
    at_iteration: Annotated[
        str | None, Opt(help="k, as 500, 500it or 1ep: the copies part there (default: the rewind point)")
    ] = None,
    from_init: Annotated[str, Opt(help="same, or different: two initialisations, the negative control.")] = "same",
    seeds: Annotated[str, Opt(help="Seeds of the copies' data order and augmentation.")] = "1,2",
    points: Annotated[int, Opt(help="Points on the line, the ends included.")] = 30,
    whole_schedule: Annotated[bool, Opt("--whole-schedule", help="Copies train all of the schedule after k.")] = False,
    batch_norm: Annotated[str, Opt(help="Running statistics on the line: interpolate or recompute.")] = "interpolate",
    train_images: Annotated[int | None, Opt(help="Training images to measure on (default: all).")] = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Train two copies on different data orders and walk the straight line between them.

    Instability is the highest error on the line minus the mean of its ends; below 2 % a net is called stable. Files
    go to RUN/connectivity, and the same command goes on where it stopped.
    """
    if from_init not in ("same", "different"):
        raise RecipeError(f"--from-init must be same or different, got '{from_init}'")
    first, second = _two(seeds)
    which = None if rounds == "all" else tuple(numbers("--rounds", rounds, "0,7, or all"))

    from fastlth.cli.show import console, json_document, teller
    from fastlth.experiments.connectivity import Plan
    from fastlth.experiments.connectivity import connectivity as compare
    from fastlth.ui import StopGuard, TrialLines

    k = int(at_iteration) if at_iteration is not None and at_iteration.isdecimal() else at_iteration
    plan = Plan(rounds=which, at_iteration=k, different_init=from_init == "different",
                seeds=(first, second), points=points, batch_norm=batch_norm, train_images=train_images,
                whole=whole_schedule)  # fmt: skip
    screen = console()
    with StopGuard() as guard:
        document = compare(run, plan, data_dir=data_dir, stopped=guard, show=teller(screen, TrialLines(screen)))
    screen.print(f"in {document['run']}/connectivity", highlight=False, soft_wrap=True)
    if json:
        json_document(document)


def _two(text: str) -> tuple[int, int]:
    seeds = numbers("--seeds", text, "1,2")
    if len(seeds) != 2:
        raise RecipeError(f"--seeds takes two numbers such as 1,2, got '{text}'")
    return seeds[0], seeds[1]
