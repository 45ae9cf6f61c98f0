"""``fastlth ticket``: look into ticket files, compare them, carry them to other programs and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlth.cli.options import Json, given
from fastlth.composition import parse_setting
from fastlth.errors import TicketError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fastlth.analysis import LayerUnits
    from fastlth.recipe import Recipe
    from fastlth.store.ticket import Ticket

app = typer.Typer(
    help="Look into ticket files, compare them, carry them to other programs and back.", no_args_is_help=True
)

File = Annotated[Path, typer.Argument(help="A search.ticket file.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]


@app.command("inspect", epilog="Example: fastlth ticket inspect runs/lenet-300-100-digits-9c3fbc8d/r0/search.ticket")
def inspect(
    file: File,
    round: Annotated[int | None, typer.Option(help="Whose units to look at (default: the last round's).")] = None,
    json: Json = False,
) -> None:
    """Densities, kept weights per layer and round, one round's dead units and degrees, and where the bytes are."""
    from fastlth.analysis import collapses, net_units
    from fastlth.cli.show import console, json_document
    from fastlth.store.inspect import summary
    from fastlth.tickets import load_ticket

    sizes, ticket = summary(file).bytes, load_ticket(file).file
    looked_at = max(len(ticket.rounds) - 1, 0) if round is None else round
    found = net_units(ticket.recipe, ticket.mask(looked_at))
    document = _inspected(ticket, sizes, looked_at, found)
    if json:
        json_document(document)
        return
    screen = console()
    _print_head(document, ticket.recipe, screen)
    screen.print(_rounds_table(document))
    screen.print(_units_table(document))
    for name, what in collapses(found).items():
        screen.print(f"warning: {name} {what}", highlight=False)


def _inspected(
    ticket: Ticket, sizes: Mapping[str, int], looked_at: int, found: Mapping[str, LayerUnits]
) -> dict[str, Any]:
    """The document of ``ticket inspect --json``."""
    from fastlth.analysis import unit_fields

    rounds, recipe = range(len(ticket.rounds)), ticket.recipe
    return {
        "rounds": len(rounds),
        "densities": [ticket.density(k) for k in rounds],
        "layers": [
            {"name": name, "shape": list(at.shape), "kept": [int(((at == 0) | (at > k)).sum()) for k in rounds]}
            for name, at in ticket.pruned_at.items()
        ],
        "bytes": dict(sizes),
        "recipe_digest": recipe.digest,
        "model": recipe.model.name,
        "dataset": recipe.data.name,
        "rewind_iteration": ticket.rewind_iteration,
        "criterion": recipe.prune.criterion,
        "mask_1": recipe.prune.mask_1,
        "mask_0": recipe.prune.mask_0,
        "actions": recipe.prune.actions,
        "reinit": recipe.prune.reinit,
        "zeroed": [sum(int(((at > 0) & (at <= k)).sum()) for at in ticket.fill.values()) for k in rounds],
        "units": {"round": looked_at, "layers": [{"name": n, **unit_fields(u)} for n, u in found.items()]},
    }


def _print_head(document: Mapping[str, Any], recipe: Recipe, screen: Console) -> None:
    sizes, zeroed, prune = document["bytes"], document["zeroed"], recipe.prune
    screen.print(f"{recipe.model.name} on {recipe.data.name}, seed {recipe.seeds.base}, "
                 f"rewound to iteration {document['rewind_iteration']:,}, recipe {recipe.digest[:8]}; "
                 f"{sizes['file']:,} bytes: masks {sizes['masks']:,}, "
                 f"rewind values {sizes['theta0']:,}", highlight=False)  # fmt: skip
    if prune.criterion != "large_final" or not prune.rewinds:
        zeros = f"; {zeroed[-1]:,} initial values zeroed" if prune.zeroes and zeroed else ""
        piled = ", piled up over the rounds" if prune.actions == "code" else ""
        screen.print(f"criterion {prune.criterion}, mask-1 action {prune.mask_1}{piled}, "
                     f"mask-0 action {prune.mask_0}{zeros}", highlight=False)  # fmt: skip


def _rounds_table(document: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("round", "density", *(layer["name"].removesuffix(".weight") for layer in document["layers"])):
        table.add_column(column, justify="right")
    for k, density in enumerate(document["densities"]):
        table.add_row(str(k), f"{density:.2%}", *(f"{layer['kept'][k]:,}" for layer in document["layers"]))
    return table


def _units_table(document: Mapping[str, Any]) -> Table:
    from rich.table import Table

    units = document["units"]
    table = Table(title=f"round {units['round']}", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("layer", "units", "dead", "unread inputs", "kept on paths", "in-degree", "out-degree"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer in units["layers"]:
        degrees = (f"{layer[f'{d}_min']:,} / {layer[f'{d}_median']:,g} / {layer[f'{d}_max']:,}"
                   for d in ("in_degree", "out_degree"))  # fmt: skip
        counts = (layer[n] for n in ("units", "dead_units", "unread_inputs", "kept_on_paths"))
        cells = ("?" if n is None else f"{n:,}" for n in counts)  # not known where the net is no chain of layers
        table.add_row(layer["name"].removesuffix(".weight"), *cells, *degrees)
    return table


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
    console().print(f"{file} is intact", highlight=False, soft_wrap=True)


@app.command("diff", epilog="Example: fastlth ticket diff runs/lenet-300-100-digits-9c3fbc8d/r{0,1}/search.ticket")
def diff(a: File, b: File, json: Json = False) -> None:
    """Overlap of two tickets' masks per layer and round (Jaccard, Hamming), and difference of theta0."""
    from rich.table import Table

    from fastlth.cli.show import console, json_document
    from fastlth.exchange.diff import diff as compare
    from fastlth.tickets import load_ticket

    document = compare(load_ticket(a).file, load_ticket(b).file)
    if json:
        json_document(document)
        return
    screen, layers = console(), document["layers"]
    table = Table(box=None, pad_edge=False, header_style="bold", caption="Jaccard / Hamming", caption_justify="left")
    table.add_column("round", justify="right")
    for layer in layers:
        table.add_column(layer["name"].removesuffix(".weight"), justify="right")
    for k in range(min(document["rounds"])):
        cells = (layer["rounds"][k] for layer in layers)
        table.add_row(str(k), *(f"{cell['jaccard']:.3f} / {cell['hamming']:.3f}" for cell in cells))
    differences = [layer["theta0_relative_difference"] for layer in layers]
    table.add_row("theta0", *("not finite" if d is None else f"{d:.3g}" for d in differences))
    screen.print(table)
    same = "the same bits" if document["theta0_identical"] else "different"
    same += "" if document["actions_identical"] else ", mask-1 or mask-0 actions different"
    finished = " and ".join(map(str, document["rounds"]))
    screen.print(f"{'identical' if document['identical'] else 'not identical'}: "
                 f"finished rounds {finished}, rewind values {same}", highlight=False)  # fmt: skip


@app.command("export", epilog="Example: fastlth ticket export search.ticket net.safetensors --round 7")
def export(
    file: File,
    out: Annotated[Path, typer.Argument(help="Where to write: a file; for hf a folder.")],
    round: Annotated[int | None, typer.Option(help="Whose ticket; by default the winning one, else the last.")] = None,
    format: Annotated[str, typer.Option(help="safetensors, state-dict, torch-prune, hf or onnx")] = "safetensors",
    force: Force = False,
    json: Json = False,
) -> None:
    """Write one round's ticket, masks and rewind values, for other programs to read."""
    from fastlth.cli.show import console, json_document
    from fastlth.exchange.exporting import export as write

    done = write(file, out, format=format, round=round, force=force)
    console().print(f"{done.recipe.model.name} on {done.recipe.data.name}, round {done.round}, "
                    f"density {done.density:.2%}: {out}", highlight=False, markup=False, soft_wrap=True)  # fmt: skip
    if json:
        json_document({"out": str(out), "format": format, "round": done.round, "density": done.density})


@app.command("import", epilog="Example: fastlth ticket import lottery_1a2b/replicate_1 open.ticket --format open-lth "
             "--model lenet-300-100 --dataset mnist")  # fmt: skip
def import_(
    file: Annotated[Path, typer.Argument(help="A state dict, a fastlth .safetensors, or an open_lth run folder.")],
    out: Annotated[Path, typer.Argument(help="The ticket file to write.")],
    format: Annotated[str, typer.Option(help="torch-prune, open-lth or safetensors")],
    model: Annotated[str | None, typer.Option(help="The net the masks are of; safetensors brings it.")] = None,
    dataset: Annotated[str | None, typer.Option(help="The data set, which fixes the net's input.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of theta0 where the file has no values: 0.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any other setting of the recipe.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Make a ticket file of masks that another program found. Nothing that a file holds is ever run."""
    settings = dict(parse_setting(text) for text in set_ or []) | given({"seeds.base": seed})

    from fastlth.cli.show import console, json_document
    from fastlth.exchange.importing import import_ticket

    done = import_ticket(file, out, format=format, model=model, dataset=dataset, settings=settings, force=force)
    densities = [done.ticket.density(k) for k in range(len(done.ticket.rounds))]
    screen = console()
    for note in done.notes:
        screen.print(note, highlight=False, markup=False, soft_wrap=True)
    screen.print(f"{len(densities)} rounds, down to density {densities[-1]:.2%}: {out}",
                 highlight=False, markup=False, soft_wrap=True)  # fmt: skip
    if json:
        json_document({"out": str(out), "format": format, "rounds": len(densities), "densities": densities,
                       "notes": list(done.notes)})  # fmt: skip
