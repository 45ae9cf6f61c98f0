"""``fastlth report RUN...``: a page with the curves, tables and commands of searches."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastlth.cli.options import numbers
from fastlth.errors import RecipeError

EXAMPLE = "Example: fastlth report runs/lenet-300-100-mnist-fa90b8ac"

PAGE = Path("report")

Opt = typer.Option


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN...", help="Run folders r<seed>, their parents (all replicates) or ticket files."),
    ] = None,
    out: Annotated[Path, Opt(help="Folder of the page, its pictures and tables.")] = PAGE,
    rounds: Annotated[str | None, Opt(help="Rounds whose training curves are drawn, for example 0,3,7.")] = None,
    live: Annotated[bool, Opt("--live", help="Follow a run in the terminal until it is finished.")] = False,
    bench: Annotated[
        bool, Opt("--bench", help="Draw benchmark records over time; RUN is their folder (benchmarks/results).")
    ] = False,
) -> None:
    """One page that opens from disk and needs no network; markdown, CSV, PNG and SVG lie beside it."""
    given, chosen = runs or [], None if rounds is None else numbers("--rounds", rounds, "0,3,7")
    if live and bench:
        raise RecipeError("--live and --bench contradict each other; give one")
    if live:
        if unread := [flag for flag, there in (("--rounds", rounds is not None), ("--out", out != PAGE)) if there]:
            raise RecipeError(f"{unread[0]} is about the page and --live writes none; leave it out, and call report "
                              "without --live when the run is finished")  # fmt: skip
        _live(given)
        return
    if bench and rounds is not None:
        raise RecipeError(f"--rounds {rounds} is about curves of searches, and --bench draws records; give one")
    import fastlth
    from fastlth.cli.show import console
    from fastlth.report.write import write

    command = shlex.join(["fastlth", *sys.argv[1:]])
    if bench:
        from fastlth.report import trend

        found = trend.document(given or [Path("benchmarks") / "results"], command)
    elif given:
        from fastlth.report import searches, subject

        subjects = subject.read(given)
        last = max(s.rounds for s in subjects) - 1
        if beyond := [k for k in chosen or () if not 0 <= k <= last]:
            there = f"choose from 0 to {last}, the finished ones" if last >= 0 else "no round is finished yet"
            raise RecipeError(f"--rounds {beyond[0]} is not there; {there}")
        found = searches.document(subjects, command, chosen)
    else:
        raise RecipeError("report needs a run: give run folders or ticket files ('fastlth runs' lists the runs)")
    page = write(found, out, f"Made by fastlth {fastlth.__version__}.")
    console().print(f"report: {page}", highlight=False, soft_wrap=True)


def _live(given: list[Path]) -> None:
    from fastlth.cli.show import console
    from fastlth.report.live import follow

    if len(given) != 1:
        raise RecipeError(f"--live follows one run, got {len(given)}; give one run folder")
    follow(given[0], console())
