"""``fastlth reproduce FIGURE``: a figure of a paper, from its trainings to the picture."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlth.cli.options import DataDir, Json, Out
from fastlth.cli.sweep import Address, Cores, Gpus, planned, train
from fastlth.errors import RecipeError, Stopped

if TYPE_CHECKING:
    from rich.console import Console

    from fastlth.experiments.figures.declare import Figure
    from fastlth.experiments.figures.scale import Job
    from fastlth.report.reproduced import Beside

EXAMPLE = "Example: fastlth reproduce fc-4 --scale short"

Opt = typer.Option


def _figures(incomplete: str) -> list[str]:
    from fastlth.experiments.figures.catalogue import FIGURES

    return [name for name in FIGURES if name.startswith(incomplete)]


def reproduce(
    figure: Annotated[
        str | None, typer.Argument(help="Its name, such as fc-4; --list shows all.", autocompletion=_figures)
    ] = None,
    scale: Annotated[
        str, Opt(help="paper, short (fewer iterations, 3 replicates) or smoke (digits, seconds)")
    ] = "paper",
    out: Out = Path("runs"),
    report: Annotated[
        Path | None, Opt(help="Folder of the picture and its tables (default: reproduced/FIGURE-SCALE)")
    ] = None,
    list_: Annotated[bool, Opt("--list", help="Show all figures and what each needs.")] = False,
    on: Annotated[
        str | None, Opt("--on", help="local or ray: workers, as `fastlth sweep` has them (default: this process)")
    ] = None,
    address: Address = None,
    cores: Cores = None,
    gpus: Gpus = None,
    dry_run: Annotated[bool, Opt("--dry-run", help="Only say how many trainings it takes, and how long.")] = False,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Train what a figure of a paper needs and draw it, beside the paper's numbers.

    Figures share their runs under --out, and the same command goes on where it stopped. With --on, the trainings are
    divided among processes or machines first (docs/scaling.md).
    """
    from fastlth.cli.show import console, json_document

    screen = console()
    if list_ and figure is not None:
        raise RecipeError(f"--list shows all figures and would not draw {figure}; give one of them")
    if list_:
        document: Any = _list(screen)
    elif figure is None:
        raise RecipeError("reproduce needs a figure such as fc-4 ('fastlth reproduce --list' shows all)")
    else:
        where = {"address": address, "cores": cores, "gpus": gpus}
        if on is None and (given := [f"--{name}" for name, value in where.items() if value is not None]):
            raise RecipeError(f"{given[0]} is about workers; add --on local or --on ray")
        wanted = None if on is None else {"on": on, **where}
        document = _reproduce(figure, scale, out, report, dry_run, data_dir, screen, wanted)
    if json:
        json_document(document)


def _list(screen: Console) -> dict[str, Any]:
    from rich.table import Table

    from fastlth.experiments.figures.overview import overview

    rows = overview()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("figure", "what", "trainings", ""):
        table.add_column(column, justify="right" if column == "trainings" else "left")
    for row in rows:
        count = "" if row.trainings is None else f"{row.trainings:,}"
        table.add_row(row.name, row.what, count, row.remark)
    screen.print(table)
    return {"figures": [row.to_json() for row in rows]}


def _reproduce(
    name: str, scale: str, out: Path, report: Path | None, dry_run: bool, data_dir: Path | None, screen: Console,
    wanted: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    from fastlth.experiments.figures.catalogue import find
    from fastlth.experiments.figures.estimate import estimate
    from fastlth.experiments.figures.scale import jobs, left_out
    from fastlth.experiments.figures.work import trainings
    from fastlth.store.atomic import check_folder
    from fastlth.ui import duration

    def say(text: str) -> None:
        screen.print(text, highlight=False, soft_wrap=True, markup=False)

    figure = find(name)
    todo = jobs(figure, scale)
    say(f"{figure.name}, {figure.source}: {figure.what}")
    for sentence in (*([figure.note] if figure.note else []), *left_out(figure, scale)):
        say(sentence)
    folder = report or Path("reproduced") / f"{figure.name}-{scale}"
    if not dry_run:
        for one in (folder, out):
            check_folder(one)
    if wanted is not None:
        about = {"figure": figure.name, "title": figure.what, "source": figure.source, "scale": scale}
        about |= _on_workers(todo, wanted, out, dry_run, data_dir, screen)
        return about if dry_run else {**about, **_make(figure, scale, todo, out, folder, data_dir, screen)}
    needed = trainings(todo, out)
    done = sum(t.done for t in needed)
    say(f"{len(needed):,} trainings, {done:,} of them done")
    seconds = estimate(needed, out, data_dir, say)
    if done < len(needed):
        say(f"about {duration(seconds)} for the others on this machine, measured")
    document = {"figure": figure.name, "title": figure.what, "source": figure.source, "scale": scale,
                "trainings": len(needed), "done": done, "seconds": seconds}  # fmt: skip
    if dry_run:
        return document
    return {**document, **_make(figure, scale, todo, out, folder, data_dir, screen)}


def _on_workers(
    todo: list[Job], wanted: dict[str, Any], out: Path, dry_run: bool, data_dir: Path | None, screen: Console
) -> dict[str, Any]:
    """Train everything on workers; what is drawn afterwards finds it done."""
    from fastlth.scaling.machine import Wanted
    from fastlth.scaling.perform import Place
    from fastlth.scaling.run import Scaled, raise_failed

    place = Place(out.absolute(), data_dir and data_dir.absolute())
    scaled = Scaled(todo, place, Wanted(**wanted))
    if dry_run:
        return planned(scaled, screen)
    outcomes = train(scaled, place, screen)
    raise_failed(outcomes, place)
    return {"tasks": [vars(o) for o in outcomes]}


def _make(
    figure: Figure, scale: str, todo: list[Job], out: Path, folder: Path, data_dir: Path | None, screen: Console
) -> dict[str, Any]:
    import fastlth
    from fastlth.experiments.figures.work import make
    from fastlth.report import reproduced
    from fastlth.report.write import write
    from fastlth.ui import FigureLines, StopGuard

    command = shlex.join(["fastlth", *sys.argv[1:]])
    show = FigureLines(screen)
    try:
        with StopGuard() as guard:
            lines = [line for job in todo for line in make(job, out, data_dir=data_dir, show=show, stopped=guard)]
    except Stopped as stop:  # what was stopped says how that one run goes on; a figure is more than one
        raise Stopped(f"stopped and saved; go on with: {command}", stop.exit_code - 128) from None
    page = reproduced.document(figure, scale, lines, out, command)
    write(page, folder, f"Made by fastlth {fastlth.__version__}.")
    rows = reproduced.beside(figure, lines)
    _print_beside(rows, screen)
    screen.print(f"pictures, CSV and report.md: {folder}", highlight=False, soft_wrap=True)
    pictures = [
        {"name": f.name, "columns": list(f.header), "rows": [list(row) for row in f.rows()]}
        for f in page.figures if not f.empty
    ]  # fmt: skip
    return {"report": str(folder), "pictures": pictures, "paper": [vars(row) for row in rows]}


def _print_beside(rows: list[Beside], screen: Console) -> None:
    from rich.table import Table

    if not rows:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("panel", "line", "quantity", "density", "paper", "here"):
        table.add_column(column, justify="right" if column in ("density", "paper", "here") else "left")
    for r in rows:
        density = "" if r.density is None else f"{r.density:.2%}"
        table.add_row(r.panel, r.line, r.quantity, density, r.paper, r.here or "-")
    screen.print(table)
