"""``fastlth ticket``: look into a ticket file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastlth.cli.options import Json
from fastlth.errors import TicketError

app = typer.Typer(help="Look into a ticket file.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(help="A search.ticket file.")]


@app.command("inspect", epilog="Example: fastlth ticket inspect runs/lenet-300-100-digits-9c3fbc8d/r0/search.ticket")
def inspect(file: File, json: Json = False) -> None:
    """Densities, kept weights per layer and round, and where the bytes are."""
    from rich.table import Table

    from fastlth.cli.show import console, json_document
    from fastlth.store.inspect import summary
    from fastlth.tickets import load_ticket

    head, ticket = summary(file), load_ticket(file).file
    rounds = range(len(ticket.rounds))
    layers: list[dict[str, Any]] = [
        {
            "name": name,
            "shape": list(at.shape),
            "kept": [int(((at == 0) | (at > k)).sum()) for k in rounds],
        }
        for name, at in ticket.pruned_at.items()
    ]
    document = {
        "rounds": len(ticket.rounds),
        "densities": [ticket.density(k) for k in rounds],
        "layers": layers,
        "bytes": dict(head.bytes),
        "recipe_digest": ticket.recipe.digest,
        "model": ticket.recipe.model.name,
        "dataset": ticket.recipe.data.name,
        "rewind_iteration": ticket.rewind_iteration,
    }
    if json:
        json_document(document)
        return
    screen = console()
    screen.print(f"{ticket.recipe.model.name} on {ticket.recipe.data.name}, seed {ticket.recipe.seeds.base}, "
                 f"rewound to iteration {ticket.rewind_iteration:,}, recipe {ticket.recipe.digest[:8]}; "
                 f"{head.bytes['file']:,} bytes: masks {head.bytes['masks']:,}, "
                 f"rewind values {head.bytes['theta0']:,}", highlight=False)  # fmt: skip
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("round", justify="right")
    table.add_column("density", justify="right")
    for layer in layers:
        table.add_column(layer["name"].removesuffix(".weight"), justify="right")
    for k in rounds:
        table.add_row(str(k), f"{ticket.density(k):.2%}", *(f"{layer['kept'][k]:,}" for layer in layers))
    screen.print(table)


@app.command("verify", epilog="Example: fastlth ticket verify runs/lenet-300-100-digits-9c3fbc8d/r0/search.ticket")
def verify(file: File, json: Json = False) -> None:
    """Check structure, every hash, nestedness and counts. Exit code 4 if anything is wrong."""
    from fastlth.cli.show import console, json_document
    from fastlth.store.inspect import verify as check
    from fastlth.tickets import theta0

    problems = check(file, theta0)
    if json:
        json_document({"file": str(file), "problems": problems})
    if problems:
        raise TicketError("; ".join(problems))
    console().print(f"{file} is whole", highlight=False, soft_wrap=True)
