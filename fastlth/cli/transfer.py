"""``fastlth transfer TICKET DATASET``: a ticket on other data or with another optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastlth.cli.options import COMPLETE_DATASET, BatchSize, DataDir, Epochs, Iterations, Json, Lr, given, length
from fastlth.composition import parse_setting

EXAMPLE = "Example: fastlth transfer runs/lenet-300-100-mnist-c43be567/r0/search.ticket digits --round 7"

Opt = typer.Option


def transfer(
    ticket: Annotated[Path, typer.Argument(help="A search.ticket file.")],
    dataset: Annotated[
        str, typer.Argument(help="As in find-ticket; the ticket's own is fine too.", autocompletion=COMPLETE_DATASET)
    ],
    round: Annotated[int | None, Opt(help="Whose ticket (default: the winning one, else the last); 0: dense.")] = None,
    random_ticket: Annotated[
        bool, Opt("--random-ticket", help="The control: masks permuted over all layers, values drawn fresh.")
    ] = False,
    optimizer: Annotated[str | None, Opt(help="adam, adamw or sgd (default: the ticket's)")] = None,
    lr: Lr = None,
    seed: Annotated[int | None, Opt(help="Seed of everything random (default: the ticket's)")] = None,
    iterations: Iterations = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    device: Annotated[str | None, Opt(help="auto, cpu, cuda, cuda:N or mps")] = None,
    set_: Annotated[list[str] | None, Opt("--set", metavar="SECTION.KEY=VALUE", help="Any other setting.")] = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Train a ticket on another data set, or with another optimizer, for the whole schedule.

    Files go to branches/ beside the ticket; the same command goes on where it stopped.
    """
    settings = dict(parse_setting(text) for text in set_ or []) | given({
        "train.optimizer": optimizer, "train.lr": lr, "train.iterations": length(iterations, epochs),
        "train.batch_size": batch_size, "seeds.base": seed, "compute.device": device,
    })  # fmt: skip

    from fastlth.cli.show import console, json_document, teller
    from fastlth.experiments.transfer import transfer as carry_over
    from fastlth.tickets import load_ticket
    from fastlth.ui import StopGuard, TrialLines, rounds_table

    screen = console()
    with StopGuard() as guard:
        document = carry_over(load_ticket(ticket), dataset, round=round, random_ticket=random_ticket,
                              settings=settings, data_dir=data_dir, stopped=guard,
                              show=teller(screen, TrialLines(screen)))  # fmt: skip
    screen.print(rounds_table(document["rounds"], None))
    screen.print(f"in {document['branch']}", highlight=False, soft_wrap=True)
    if json:
        json_document(document)
