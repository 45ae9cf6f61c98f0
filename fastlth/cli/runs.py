"""``fastlth runs``: what has been searched for, how far it came, and what of it can go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastlth.cli.options import Json, Out, check_in_place

app = typer.Typer(help="List all runs; free what finished ones no longer need.")


@app.callback(invoke_without_command=True, epilog="Example: fastlth runs --out runs")
def runs(context: typer.Context, out: Out = Path("runs"), json: Json = False) -> None:
    """List all runs: model, data, seed, finished rounds, winning ticket, size on disk."""
    if context.invoked_subcommand is not None:
        check_in_place(context)
        return
    from rich.table import Table

    from fastlth.cli.show import console, json_document
    from fastlth.search import winning_round
    from fastlth.store.inspect import summary
    from fastlth.store.listing import list_runs

    rows: list[dict[str, Any]] = []
    for run in list_runs(out):
        ticket = run.path / "search.ticket"
        winner = winning_round([summary(ticket).rounds]) if run.rounds_done and not run.problem else None
        rows.append({
            "run": str(run.path), "model": run.model, "dataset": run.dataset, "seed": run.seed,
            "rounds_done": run.rounds_done, "rounds_asked": run.rounds_asked, "winning_round": winner,
            "bytes": run.bytes, "branches": list(run.branches), "unfinished_branches": list(run.unfinished),
            "supermasks": list(run.supermasks), "problem": run.problem or None,
        })  # fmt: skip
    if json:
        json_document({"runs": rows})
        return
    screen = console()
    if not rows:
        screen.print(f"no runs in {out}; start one with: fastlth find-ticket lenet-300-100 digits", highlight=False)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("run", "model", "data", "seed", "rounds", "winning ticket", "size"):
        table.add_column(column, overflow="fold")
    for row in rows:
        winner_text = "-" if row["winning_round"] is None else f"round {row['winning_round']}"
        table.add_row(row["run"], row["model"], row["dataset"], str(row["seed"]), _progress(row), winner_text,
                      size(row["bytes"]))  # fmt: skip
    screen.print(table)


@app.command("clean", epilog="Example: fastlth runs clean --trained")
def clean(
    out: Out = Path("runs"),
    trained: Annotated[bool, typer.Option("--trained", help="Kept trained weights too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Free what finished runs no longer need; says what it will remove, and asks. Tickets always stay."""
    from fastlth.cli.show import console, json_document
    from fastlth.store.cleaning import find, remove

    screen, waste = console(), find(out, trained=trained)
    for item in waste:
        screen.print(f"{size(item.bytes):>9}  {item.path}  ({item.why})", highlight=False, soft_wrap=True)
    if waste and not yes and not typer.confirm(f"remove these {len(waste)} files?", err=True):
        waste = []
    gone = remove(waste)
    if json:
        json_document({"removed": [str(item.path) for item in gone], "bytes": sum(item.bytes for item in gone)})
    screen.print(f"{size(sum(item.bytes for item in gone))} freed", highlight=False)


def _progress(row: dict[str, Any]) -> str:
    if row["problem"]:
        return "damaged"
    if not row["rounds_done"] and row["branches"]:
        return "controls only"
    if not row["rounds_asked"] and row["supermasks"]:
        return "supermasks"
    if not row["rounds_asked"] or (not row["rounds_done"] and row["unfinished_branches"]):
        return "not finished"
    return f"{row['rounds_done']}/{max(row['rounds_done'], row['rounds_asked'])}"


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
