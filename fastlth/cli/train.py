"""``fastlth train TICKET``: train a saved ticket again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastlth.cli.options import DataDir, Epochs, Iterations, Json, given, length

EXAMPLE = "Example: fastlth train runs/lenet-300-100-mnist-c43be567/r0/search.ticket --round 7"


def train(
    ticket: Annotated[Path, typer.Argument(help="A search.ticket file.")],
    round: Annotated[
        int | None, typer.Option(help="Whose ticket (default: the winning one, else the last); 0: dense.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed for data order, augmentation, dropout.")] = None,
    iterations: Iterations = None,
    epochs: Epochs = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps")] = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Train the ticket of one round from its rewind values, and print how well it does. Writes no file."""
    from fastlth.cli.show import console, json_document
    from fastlth.experiments.retrain import retrain
    from fastlth.tickets import load_ticket
    from fastlth.ui import rounds_table

    settings = given({
        "train.iterations": length(iterations, epochs), "seeds.order": seed, "seeds.augment": seed,
        "seeds.dropout": seed,
        "compute.device": device,
    })  # fmt: skip
    result = retrain(load_ticket(ticket), round=round, settings=settings, data_dir=data_dir)
    console().print(rounds_table([result], None))
    if json:
        json_document(result)
