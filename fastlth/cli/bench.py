"""``fastlth bench``: is it fast here, and has it stayed so?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlth.catalogue import DATASETS
from fastlth.cli.options import COMPLETE_DATASET, COMPLETE_MODEL, MODEL_NAMES, OWN_NET, Json, check_in_place, numbers

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(help="Measure speed and size on this machine, in paired ratios; keep them from falling.")

Opt = typer.Option
FIRST = "finding out what is fastest here; for a large net that alone takes minutes, most of them torch.compile's"
SHAPES = f"Whose image shape: {', '.join(DATASETS)}"
Model = Annotated[str, typer.Argument(help=f"{MODEL_NAMES}, {OWN_NET}", autocompletion=COMPLETE_MODEL)]
Dataset = Annotated[str, typer.Argument(help=SHAPES, autocompletion=COMPLETE_DATASET)]
Record = Annotated[Path | None, Opt(help="Append the document and what a short search reaches to this .jsonl file.")]
Seconds = Annotated[float, Opt(min=0.1, help="Time for each comparison.")]


@app.callback(invoke_without_command=True, epilog="Example: fastlth bench   or: fastlth bench --check")
def bench(
    context: typer.Context,
    check: Annotated[bool, Opt("--check", help="Compare with benchmarks/expected.toml; exit code 3 if worse.")] = False,
    update: Annotated[bool, Opt("--update", help="With --check: write the counts found now into the file.")] = False,
    markdown: Annotated[bool, Opt("--markdown", help="With --check: print the table as markdown on stdout.")] = False,
    record: Record = None,
    json: Json = False,
) -> None:
    """Without a sub-command: the default set, in about two minutes at most."""
    if context.invoked_subcommand is not None:
        check_in_place(context)
        return
    from fastlth.errors import RecipeError

    if (update or markdown) and not check:
        raise RecipeError(f"{'--update' if update else '--markdown'} belongs to --check; add --check")
    if markdown and json:
        raise RecipeError("--markdown and --json both print on stdout; choose one")
    if record and check:
        raise RecipeError("--record keeps measured ratios, and --check judges them; give one")
    if check:
        _check(update, markdown, json)
        return
    _rows(json, _default_set(), record)


def _default_set() -> Iterator[Iterable[dict[str, Any]]]:
    """Chosen to end within two minutes, also on a machine with other work."""
    from fastlth.bench import loaders, rounds, startup, step
    from fastlth.bench.subject import recipe_for, settle, source_for

    lenet = settle(recipe_for("lenet-300-100", "mnist"), source_for("mnist")[0])
    yield step.rows("lenet-300-100", "mnist", [0, 10, 20], seconds=2.0, compute=lenet)
    yield step.rows("conv-2", "cifar-10", [0], seconds=2.0, peaks=False)
    yield rounds.rows("lenet-300-100", "mnist", seconds=3.0, peaks=False, compute=lenet)
    yield loaders.rows("lenet-300-100", "mnist", seconds=1.5)
    yield startup.rows(seconds=2.0)


@app.command("step", epilog="Example: fastlth bench step conv-4 cifar-10 --rounds 0,10,20 --plot step.png")
def step(
    model: Model = "lenet-300-100", dataset: Dataset = "mnist",
    rounds: Annotated[str, Opt(help="Densities of which rounds, for example 0,10,20; all: 0 to 20.")] = "all",
    compiled: Annotated[bool, Opt(help="Time torch.compile around the rival's net too.")] = True,
    dense: Annotated[bool, Opt("--dense", help="Time our dense engine too, where auto takes another.")] = False,
    plot: Annotated[Path | None, Opt(help="Draw speed and seconds per round against density (.png or .svg).")] = None,
    seconds: Seconds = 3.0, record: Record = None, json: Json = False,
) -> None:  # fmt: skip
    """Training steps at each density: ours, good everyday PyTorch, the same compiled, and lecode's way."""
    from fastlth.bench.plot import by_density
    from fastlth.bench.step import can_compile, rows
    from fastlth.cli.show import console

    which = list(range(21)) if rounds == "all" else numbers("--rounds", rounds, "0,10,20, or all")
    if compiled and not can_compile():
        console().print("torch.compile is left out: no C++ compiler found", highlight=False)
        compiled = False
    found = _rows(json, [rows(model, dataset, which, seconds=seconds, compiled=compiled, dense=dense)], record, FIRST)
    if plot is not None:
        by_density(found, plot)


@app.command("round", epilog="Example: fastlth bench round lenet-300-100 mnist")
def round_(
    model: Model = "lenet-300-100", dataset: Dataset = "mnist", seconds: Seconds = 10.0,
    record: Record = None, json: Json = False,
) -> None:  # fmt: skip
    """Steps together with the paper's evaluations, ours against everyday PyTorch."""
    from fastlth.bench.rounds import rows

    _rows(json, [rows(model, dataset, seconds=seconds)], record, FIRST)


@app.command("loader", epilog="Example: fastlth bench loader vgg19 cifar-10")
def loader(
    model: Model = "lenet-300-100", dataset: Dataset = "mnist", seconds: Seconds = 4.0,
    record: Record = None, json: Json = False,
) -> None:  # fmt: skip
    """Loaders alone: the resident set and FFCV against torchvision's DataLoader."""
    from fastlth.bench.loaders import rows

    _rows(json, [rows(model, dataset, seconds=seconds)], record)


@app.command("kernels", epilog="Example: fastlth bench kernels --model vgg19 --gpu h200")
def kernels(
    model: Annotated[str, Opt(help=MODEL_NAMES)] = "vgg19",
    dataset: Annotated[str, Opt(help=SHAPES)] = "cifar-10",
    gpu: Annotated[str, Opt(help="Whose roofline, by its data sheet: h200, h100 or a100.")] = "h200",
    batch: Annotated[int | None, Opt(min=1, help="Images per step; as the recipe has it if not given.")] = None,
    precision: Annotated[str, Opt(help="Of activations, bf16 or fp32; weights are fp32.")] = "bf16",
    json: Json = False,
) -> None:  # fmt: skip
    """Bytes and operations of every Triton kernel, by arithmetic, and the least time a GPU needs for them."""
    from fastlth.bench import document
    from fastlth.bench.kernels import rows
    from fastlth.cli.show import console, json_document

    result = document(list(rows(model, dataset, gpu, batch=batch, precision=precision)))
    if json:
        json_document(result)
    else:
        _kernels_table(result["rows"], console())


@app.command("startup", epilog="Example: fastlth bench startup")
def startup(seconds: Seconds = 8.0, record: Record = None, json: Json = False) -> None:
    """How soon the command answers, against the import of torch."""
    from fastlth.bench.startup import rows

    _rows(json, [rows(seconds=seconds)], record)


@app.command("compare", epilog="Example: fastlth bench compare main .")
def compare(
    base: Annotated[str, typer.Argument(help="A commit, branch or tag; . is the working tree as it is.")],
    head: Annotated[str, typer.Argument(help="The one that must not be slower.")],
    models: Annotated[str, Opt(help="Which trainings: lenet-300-100, conv-2, or both with a comma.")] = "lenet-300-100",
    budget: Annotated[float, Opt(min=1.0, help="Seconds of timing per run; a slowdown needs two runs.")] = 20.0,
    json: Json = False,
) -> None:
    """Is one commit slower than another? Warm processes, alternated; exit code 3 only if a second run agrees."""
    from fastlth.bench import document
    from fastlth.bench.compare import compare as run
    from fastlth.cli.show import console, json_document
    from fastlth.errors import RegressionFound

    screen = console()
    result = run(base, head, budget=budget, repo=Path.cwd(), models=tuple(models.split(",")),
                 show=lambda line: screen.print(line, highlight=False))  # fmt: skip
    if json:
        json_document(document(result.rows))
    for sentence in result.sentences:
        screen.print(sentence, highlight=False, soft_wrap=True)
    if result.slower:
        raise RegressionFound("; ".join(result.sentences))


@app.command("ticket", epilog="Example: fastlth bench ticket")
def ticket(
    model: Annotated[str, Opt(help=MODEL_NAMES)] = "vgg19",
    dataset: Annotated[str, Opt(help=SHAPES)] = "cifar-10",
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
    console().print(table)


def _rows(
    json: bool, subjects: Iterable[Iterable[dict[str, Any]]], record: Path | None, first: str = "measuring"
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure, show each row as it comes, print the document or the table, append the record."""
    from fastlth.bench import document, peak
    from fastlth.cli.show import console, json_document

    screen = console()
    found = []
    with screen.status(first) as status:

        def say(line: str) -> None:
            status.update(line)
            if not screen.is_terminal:  # where a status is not seen, nothing would tell that something happens
                screen.print(line, highlight=False, soft_wrap=True)

        say(first)
        for subject in subjects:
            for row in subject:
                found.append(row)
                say(f"measured {row['subject']} {row['model'] or ''} {row['path']} against {row['against']}")
    result = document(found)
    if json or record:
        result["machine"]["peaks"] = peak.measure()
    if record:
        from fastlth.bench.record import append

        append(result, record)
    if json:
        json_document(result)
    else:
        _table(found, screen)
    return found


def _kernels_table(rows: list[dict[str, Any]], screen: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("kernel", "of", "calls", "MB", "MFLOP", "FLOP/byte", "at least us", "bound by"):
        table.add_column(column, justify="left" if column in ("kernel", "of", "bound by") else "right")
    for r in rows:
        calls = {"step": str(r["calls"]), "round": "a round", "or": "instead"}[r["per"]]
        table.add_row(
            r["path"], r["what"], calls, f"{r['bytes'] / 1e6:,.2f}", f"{r['operations'] / 1e6:,.1f}",
            f"{r['operations'] / r['bytes']:,.1f}", f"{1e6 * r['seconds_at_roofline']:.2f}", r["bound"],
        )  # fmt: skip
    screen.print(table)
    step = [r for r in rows if r["per"] == "step"]
    moved, least = (sum(r["calls"] * r[k] for r in step) for k in ("bytes", "seconds_at_roofline"))
    first = rows[0]
    screen.print(
        f"{first['model']}, batch {first['batch']}, {first['precision']}: the masked kernels of a step move "
        f"{moved / 1e6:,.0f} MB and take at least {1e6 * least:,.0f} us on the {first['against']}. By arithmetic, not "
        "measured; instead: masked_linear_adam does the work of weight_grad and masked_step. "
        "Where there is a GPU, python -m benchmarks.gpu kernels --out DIR times them.", highlight=False,
    )  # fmt: skip


def _table(rows: list[dict[str, Any]], screen: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    left = ("subject", "what", "against")
    for column in ("subject", "what", "density", "images/s", "MB", "against", "images/s", "MB", "ratio", "95 %",
                   "of peak", "n"):  # fmt: skip
        table.add_column(column, justify="left" if column in left else "right")
    for r in rows:
        startup = r["images_per_second"] is None
        ours = f"{r['seconds']:.2f} s" if startup else f"{r['images_per_second']:,.0f}"
        theirs = f"{r['against_seconds']:.2f} s" if startup else f"{r['against_images_per_second']:,.0f}"
        what = " ".join(x for x in (r["model"], r["dataset"], r["path"]) if x)
        ratio = "restless" if r["ratio"] is None else f"{r['ratio']:.2f}"
        memory, other = (f"{m / 1e6:,.0f}" if (m := r.get(k)) else "" for k in ("peak_bytes", "against_peak_bytes"))
        table.add_row(
            r["subject"], what, "" if r["density"] is None else f"{r['density']:.2%}", ours, memory, r["against"],
            theirs, other, ratio, f"{r['ratio_low']:.2f}-{r['ratio_high']:.2f}",
            f"{r['share']:.1%}" if "share" in r else "", str(r["n"]),
        )  # fmt: skip
    screen.print(table)
    screen.print("ratio: against the other, above 1 is faster; MB: peak memory of a process that does only this",
                 highlight=False)  # fmt: skip
    if any(r["ratio"] is None for r in rows):
        screen.print("restless: the same thing timed twice differed by more than a tenth, or the ratio itself by more "
                     "than a factor of two; no ratio is reported")  # fmt: skip


def _check(update: bool, markdown: bool, json: bool) -> None:
    from rich.table import Table

    from fastlth.bench import check as gate
    from fastlth.bench import document
    from fastlth.cli.show import console, json_document
    from fastlth.errors import RegressionFound

    screen, checkout = console(), Path.cwd()
    if update:
        gate.update(checkout)
        screen.print(f"counts written to {gate.EXPECTED}", highlight=False)
        return
    with screen.status("checking"):
        verdicts = list(gate.check(checkout))
    header = ("", "gate", "expected", "found", "")
    lines = [("ok" if v.passed else "FAIL", v.name, _figure(v.expected), _figure(v.found), v.says) for v in verdicts]
    if json:
        json_document({**document([]), "verdicts": [v.__dict__ for v in verdicts]})
    elif markdown:
        from fastlth.report import document as page
        from fastlth.report.markdown import render

        shown = page.Section("Counts and ratios", (page.Table("", header, tuple(lines)),))
        lead = "A ratio is against the rival in the same run, above 1 is faster; its expected value is a floor."
        print(render(page.Document("fastlth bench --check", (lead,), (shown,)), []), end="")
    else:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for i, column in enumerate(header):
            table.add_column(column, justify="right" if i in (2, 3) else "left")
        for line in lines:
            table.add_row(*line)
        screen.print(table)
    failed = [v for v in verdicts if not v.passed]
    if failed:
        raise RegressionFound("; ".join(
            f"{v.name}: {v.says} (expected {_figure(v.expected)}, found {_figure(v.found)})" for v in failed
        ))  # fmt: skip


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
