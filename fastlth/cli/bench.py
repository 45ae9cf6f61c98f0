"""``fastlth bench``: what fastlth costs, beside the obvious other ways."""

from __future__ import annotations

from typing import Annotated

import typer

from fastlth.cli.options import Json

app = typer.Typer(help="Measure speed and size on this machine.", no_args_is_help=True)

Opt = typer.Option


@app.command("ticket", epilog="Example: fastlth bench ticket")
def ticket(
    model: Annotated[str, Opt(help="lenet-300-100, lenet-5, conv-2, conv-4, conv-6 or vgg19")] = "vgg19",
    dataset: Annotated[str, Opt(help="Whose image shape the net gets: mnist, cifar-10 or digits")] = "cifar-10",
    rounds: Annotated[int, Opt(min=1, help="Prunings, each of a fifth of all weights left.")] = 20,
    json: Json = False,
) -> None:
    """Bytes and seconds of keeping a whole search: search.ticket beside the obvious ways.

    Random nested masks on the net's initial weights; nothing is trained, no data set is read. The seconds are those
    of one process; run it under taskset to see what one core takes.
    """
    from rich.table import Table

    from fastlth.bench import document
    from fastlth.bench.ticket import rows
    from fastlth.cli.show import console, json_document

    result = document(list(rows(model, dataset, rounds)))
    if json:
        json_document(result)
        return
    screen = console()
    table = Table(title=f"{rounds} rounds of {model}, all of them", title_justify="left", box=None, pad_edge=False,
                  header_style="bold")  # fmt: skip
    table.add_column("kept as")
    for column in ("masks MB", "theta0 MB", "total MB", "seconds", "CPU seconds"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        masks, theta0 = row["bytes"]["masks"], row["bytes"]["theta0"]
        seconds = ["" if row[k] is None else f"{row[k]:.2f}" for k in ("seconds", "cpu_seconds")]
        table.add_row(row["path"], f"{masks / 1e6:,.2f}", f"{theta0 / 1e6:,.2f}", f"{(masks + theta0) / 1e6:,.2f}",
                      *seconds)  # fmt: skip
    screen.print(table)
