"""``fastlth``: the commands, and how errors become exit codes."""

from __future__ import annotations

import os
import sys

import typer

from fastlth.cli import (
    bench,
    branch,
    connectivity,
    data,
    doctor,
    find_ticket,
    report,
    reproduce,
    resume,
    runs,
    supermask,
    sweep,
    ticket,
    train,
    transfer,
)
from fastlth.errors import EnvironmentFailure, FastlthError

EXIT_CODES = (
    "Exit codes: 0 done, 1 a bug, 2 wrong usage or recipe, 3 a regression found by bench --check, 4 data or ticket "
    "missing or damaged, 5 training diverged, 6 the environment failed, 130/143/138 stopped by a signal and saved."
)

app = typer.Typer(
    name="fastlth",
    help="Find lottery tickets: sparse sub-nets that, reset to their early weights, train as well as the dense net.",
    epilog=f"Example: fastlth find-ticket lenet-300-100 digits   {EXIT_CODES}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("find-ticket", epilog=find_ticket.EXAMPLE)(find_ticket.find_ticket)
app.command("resume", epilog=resume.EXAMPLE)(resume.resume)
app.command("train", epilog=train.EXAMPLE)(train.train)
app.command("branch", epilog=branch.EXAMPLE)(branch.branch)
app.command("prune-at-init", epilog=branch.AT_INIT_EXAMPLE)(branch.prune_at_init)
app.command("connectivity", epilog=connectivity.EXAMPLE)(connectivity.connectivity)
app.command("transfer", epilog=transfer.EXAMPLE)(transfer.transfer)
app.command("supermask", epilog=supermask.EXAMPLE)(supermask.supermask)
app.command("reproduce", epilog=reproduce.EXAMPLE)(reproduce.reproduce)
app.command("sweep", epilog=sweep.EXAMPLE)(sweep.sweep)
app.command("report", epilog=report.EXAMPLE)(report.report)
app.add_typer(runs.app, name="runs")
app.add_typer(ticket.app, name="ticket")
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.command("doctor", epilog=doctor.EXAMPLE)(doctor.doctor)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version and exit.")
) -> None:
    if version:
        import fastlth

        print(f"fastlth {fastlth.__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line. A FastlthError becomes one line on stderr and its exit code."""
    # Threads that wait for each other should sleep and not spin. LeNet on two threads beside one busy process makes
    # 29,000 images/s so and 10,000 spinning; alone 17,000 against 40,000, but then `auto` takes one thread, at 35,000
    # either way. It must be set before torch is loaded, what the user has set stays, and a benchmark of others'
    # code leaves them their threads as they are.
    if sys.argv[1:2] != ["bench"]:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app()
    except FastlthError as error:
        print(f"fastlth: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except RuntimeError as error:
        # a device that failed outside of a search; torch is there if it was used
        faults = sys.modules.get("fastlth.training.faults")
        what = faults.reason(error) if faults else None
        if what is None:
            raise
        print(f"fastlth: the device is {what}", file=sys.stderr)
        sys.exit(EnvironmentFailure.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `fastlth runs | head`
        sys.stderr.close()
        sys.exit(0)
