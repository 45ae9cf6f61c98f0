"""``fastlth branch RUN KIND`` and ``fastlth prune-at-init MODEL DATASET``: control runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastlth.cli.options import (
    BatchSize,
    DataDir,
    Dataset,
    Epochs,
    Iterations,
    Json,
    Lr,
    Model,
    Out,
    Seed,
    among,
    check_factors,
    check_looked_at,
    given,
    length,
    numbers,
)
from fastlth.composition import compose, parse_setting
from fastlth.errors import RecipeError
from fastlth.experiments.control import KINDS, METHODS, Control

EXAMPLE = "Example: fastlth branch runs/lenet-300-100-mnist-c43be567/r0 random-reinit --rounds 7,9"
AT_INIT_EXAMPLE = "Example: fastlth prune-at-init lenet-300-100 mnist --method snip --density 0.1"

Opt = typer.Option

Density = Annotated[float | None, Opt(help="Prune to this share of all weights in one step.")]
Trials = Annotated[int | None, Opt(help="Trainings per round, each its own draw (default: 3; 1 if nothing is drawn)")]
Scope = Annotated[str | None, Opt(help="Rank the scores over all layers or per layer: global (default) or layer")]
Images = Annotated[int | None, Opt(help="snip, grasp: images to take scores over (default: 10 per class)")]
Set = Annotated[list[str] | None, Opt("--set", metavar="SECTION.KEY=VALUE", help="A setting of the trainings.")]
Device = Annotated[str | None, Opt(help="auto, cpu, cuda, cuda:N or mps (default: as the search)")]


def branch(
    run: Annotated[Path, typer.Argument(help="A run folder (r<seed>) with finished rounds.")],
    kind: Annotated[
        str,
        typer.Argument(help="; ".join(f"{name}: {what}" for name, what in KINDS.items()), autocompletion=among(KINDS)),
    ],
    round: Annotated[int | None, Opt(help="Whose mask (default: the winning ticket's, else the last)")] = None,
    rounds: Annotated[str | None, Opt(help="Several: numbers such as 1,7,9, or all.")] = None,
    density: Density = None,
    trials: Trials = None,
    strategy: Annotated[str | None, Opt(help="random-prune: layer (default), global, even or erk")] = None,
    reinit: Annotated[bool, Opt("--reinit", help="random-prune, one-shot: fresh values, not theta_k")] = False,
    iterations: Annotated[int | None, Opt("--iterations", "-i", help="finetune, lr-rewind: steps")] = None,
    method: Annotated[str | None, Opt(help="prune-at-init: " + ", ".join(METHODS))] = None,
    scope: Scope = None,
    images: Images = None,
    sigma: Annotated[float | None, Opt(help="noise: its size, in initial standard deviations of the layer")] = None,
    set_: Set = None,
    device: Device = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Train a control of a finished search; docs/branches.md defines each kind.

    The same command goes on where it stopped, or prints the results if they are there.
    """
    control = Control(kind=kind, density=density, strategy=strategy, reinit=reinit, iterations=iterations,
                      method=method, scope=scope, images=images, sigma=sigma)  # fmt: skip
    settings = dict(parse_setting(text) for text in set_ or []) | given({"compute.device": device})
    _run(run, control, which(round, rounds), trials, settings, data_dir, json)


def prune_at_init(
    model: Model,
    dataset: Dataset,
    method: Annotated[str, Opt(help=", ".join(METHODS))],
    density: Annotated[float, Opt(help="Share of all weights of Linear and Conv layers that is left.")],
    trials: Trials = None,
    scope: Scope = None,
    images: Images = None,
    preset: Annotated[str | None, Opt(help="As find-ticket takes it.")] = None,
    seed: Seed = None,
    iterations: Iterations = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    device: Annotated[str | None, Opt(help="auto, cpu, cuda, cuda:N or mps")] = None,
    config: Annotated[Path | None, Opt(help="Settings from a TOML file; a run's recipe.toml works.")] = None,
    set_: Annotated[list[str] | None, Opt("--set", metavar="SECTION.KEY=VALUE", help="Any other setting.")] = None,
    out: Out = Path("runs"),
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Choose a mask before training and train it: a baseline that needs no search.

    The files go where find-ticket with the same settings has its run, under branches/, so both can be compared.
    """
    control = Control(kind="prune-at-init", method=method, density=density, scope=scope, images=images)
    settings = dict(parse_setting(text) for text in set_ or [])
    settings |= given({
        "train.iterations": length(iterations, epochs), "train.batch_size": batch_size, "train.lr": lr,
        "seeds.base": seed, "compute.device": device,
    })  # fmt: skip
    composed = compose(model, dataset, preset=preset, config=config, settings=settings)

    from fastlth.cli.show import console
    from fastlth.experiments.at_init import check
    from fastlth.running import prepare

    looked_at = ["prune.scale", "prune.only", "prune.never", *(["prune.scope"] if scope == "layer" else [])]
    check_looked_at(settings, looked_at, "prune-at-init")
    if scope != "layer":
        check_factors(settings, f"method {method} without --scope layer has one budget for all layers")
    elif settings.get("prune.scope", "layer") != "layer":
        raise RecipeError(f"prune.scope {settings['prune.scope']} and --scope layer contradict each other; leave out "
                          "prune.scope")  # fmt: skip
    check(composed.recipe, control, trials)
    for note in composed.notes:
        console().print(note, highlight=False, soft_wrap=True)
    path = prepare(composed.recipe, out=out, data_dir=data_dir)
    _run(path, control, None, trials, {}, data_dir, json)


def which(round: int | None, rounds: str | None) -> list[int] | str | None:
    """The rounds of --round and --rounds. Raises RecipeError if both are given, or for no numbers."""
    if round is not None and rounds is not None:
        raise RecipeError(f"--round {round} and --rounds {rounds} contradict each other; give one")
    if rounds is None or rounds == "all":
        return rounds if round is None else [round]
    return numbers("--rounds", rounds, "1,7,9, or all")


def _run(
    run: Path, control: Control, rounds: list[int] | str | None, trials: int | None, settings: dict[str, Any],
    data_dir: Path | None, json: bool,
) -> None:  # fmt: skip
    from fastlth.cli.show import console, json_document, teller
    from fastlth.experiments.branch import branch as train_branch
    from fastlth.ui import StopGuard, TrialLines, rounds_table

    screen = console()
    with StopGuard() as guard:
        found = train_branch(run, control, rounds=rounds, trials=trials, settings=settings, data_dir=data_dir,
                             show=teller(screen, TrialLines(screen)), stopped=guard)  # fmt: skip
    screen.print(rounds_table(found.rounds, None, spread=any(r["trials"] > 1 for r in found.rounds)))
    screen.print(f"branch: {found.folder}", highlight=False, soft_wrap=True)
    if json:
        json_document(found.to_json())
