"""``fastlth sweep SPEC.toml``: many searches and their branches, on this machine or on a Ray cluster."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlth.cli.options import DataDir, Json, Out
from fastlth.errors import Stopped

if TYPE_CHECKING:
    from rich.console import Console

    from fastlth.experiments.figures.scale import Job
    from fastlth.scaling.perform import Outcome, Place
    from fastlth.scaling.run import Scaled

EXAMPLE = "Example: fastlth sweep rates.toml --on local"

Opt = typer.Option

Address = Annotated[str | None, Opt(help="--on ray: the cluster's address (default: $RAY_ADDRESS, else one made here)")]
Cores = Annotated[int | None, Opt(help="Processors per worker (default: 4, or all if there are fewer).")]
Gpus = Annotated[float | None, Opt(help="GPUs per worker, such as 0.5 (default: 1 where there are any).")]


def sweep(
    spec: Annotated[Path, typer.Argument(metavar="SPEC.toml", help="Settings, lists that multiply, branches.")],
    on: Annotated[str, Opt("--on", help="local (processes here) or ray")] = "local",
    address: Address = None,
    cores: Cores = None,
    gpus: Gpus = None,
    dry_run: Annotated[bool, Opt("--dry-run", help="Only say which tasks, about how long, how many bytes.")] = False,
    out: Out = Path("runs"),
    report: Annotated[Path | None, Opt(help="Folder of the report (default: sweeps/NAME of SPEC)")] = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Train all combinations of a file's settings, and report them together (docs/scaling.md).

    The same command goes on where it stopped; several may share one --out and divide the work.
    """
    from fastlth.cli.show import console, json_document
    from fastlth.scaling.machine import Wanted
    from fastlth.scaling.perform import Place
    from fastlth.scaling.run import Scaled, raise_failed
    from fastlth.scaling.spec import read
    from fastlth.store.atomic import check_folder

    screen, found, place = console(), read(spec), Place(out.absolute(), data_dir and data_dir.absolute())
    scaled = Scaled(found.jobs, place, Wanted(on=on, address=address, cores=cores, gpus=gpus))
    document: dict[str, Any] = {"sweep": found.name, "out": str(out)}
    for note in found.notes:
        screen.print(note, highlight=False, soft_wrap=True, markup=False)
    if dry_run:
        document |= planned(scaled, screen, tasks=True)
    else:
        folder = report or Path("sweeps") / found.name
        for one in (folder, out):
            check_folder(one)
        outcomes = train(scaled, place, screen)
        document |= {"tasks": [vars(o) for o in outcomes]}
        document |= _report(found.jobs, out, folder, screen)
    if json:
        json_document(document)
    if not dry_run:
        raise_failed(outcomes, place)


def planned(scaled: Scaled, screen: Console, *, tasks: bool = False) -> dict[str, Any]:
    """Says what there is to do; the plan as JSON."""
    from fastlth.ui import counted, duration

    def say(text: str) -> None:
        screen.print(text, highlight=False, soft_wrap=True, markup=False)

    plan = scaled.plan(say)
    if tasks:
        for task in scaled.tasks:
            say(task.name)
    say(f"{counted(plan.tasks, 'task')}, {counted(plan.trainings, 'training')}, {plan.done:,} of them done")
    gpu = f" and {scaled.worker.gpus:g} GPU" if scaled.worker.gpus else ""
    workers = f"{counted(plan.workers, 'worker')} of {counted(scaled.worker.cores, 'core')}{gpu}"
    say(f"about {duration(plan.work_seconds)} of work, {duration(plan.seconds)} on {workers}")
    say(f"about {plan.bytes.written / 1e6:,.0f} MB written, {plan.bytes.kept / 1e6:,.0f} MB kept")
    return {"plan": plan.to_json(), "tasks": [t.name for t in scaled.tasks]}


def train(scaled: Scaled, place: Place, screen: Console) -> list[Outcome]:
    """Run all tasks under one view. Raises Stopped with the command that goes on."""
    from fastlth.scaling.view import SweepView
    from fastlth.ui import StopGuard

    with StopGuard() as guard, SweepView(screen, place) as view:
        outcomes = scaled.run(view, guard)
    if guard.requested:
        command = shlex.join(["fastlth", *sys.argv[1:]])
        raise Stopped(f"stopped and saved; go on with: {command}", guard.requested)
    return outcomes


def _report(jobs: Sequence[Job], out: Path, folder: Path, screen: Console) -> dict[str, Any]:
    import fastlth
    from fastlth.report import searches, subject
    from fastlth.report.write import write
    from fastlth.scaling import results
    from fastlth.store.run import parent_folder

    found = results.searches(jobs, out)
    parents = dict.fromkeys(parent_folder(out, job.recipe) for job in jobs)
    begun = [p for p in parents if any((r / "recipe.toml").exists() for r in p.glob("r*"))]
    if not begun:
        screen.print(f"no search has begun: there is nothing to report in {folder}", highlight=False, soft_wrap=True)
        return {"searches": found, "table": None, "report": None}
    table = results.write(jobs, out, folder)
    command = shlex.join(["fastlth", *sys.argv[1:]])
    page = write(searches.document(subject.read(begun), command), folder, f"Made by fastlth {fastlth.__version__}.")
    done = sum(r["finished"] for s in found for r in s["replicates"])
    count = sum(len(s["replicates"]) for s in found)
    screen.print(f"{done} of {count} searches finished; numbers: {table}; report: {page}", highlight=False,
                 soft_wrap=True)  # fmt: skip
    return {"searches": found, "table": str(table), "report": str(page)}
