"""``fastlth runs``: what has been searched for, and how far it came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastlth.cli.options import Json, Out

EXAMPLE = "Example: fastlth runs --out runs"


def runs(out: Out = Path("runs"), json: Json = False) -> None:
    """List all runs: model, data, seed, finished rounds, winning ticket, size on disk."""
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
            "bytes": run.bytes, "problem": run.problem or None,
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
        done = "damaged" if row["problem"] else f"{row['rounds_done']}/{row['rounds_asked']}"
        table.add_row(row["run"], row["model"], row["dataset"], str(row["seed"]), done, winner_text, size(row["bytes"]))
    screen.print(table)


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
