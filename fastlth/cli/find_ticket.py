"""``fastlth find-ticket MODEL DATASET``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastlth.cli.options import DataDir, Json, Log, Out, given, length, seconds
from fastlth.composition import Composed, compose, parse_setting
from fastlth.errors import RecipeError

EXAMPLE = "Example: fastlth find-ticket vgg19 cifar-10 --rounds 20"

Opt = typer.Option


def find_ticket(
    model: Annotated[str, typer.Argument(help="lenet-300-100, lenet-5, conv-2, conv-4, conv-6 or vgg19")],
    dataset: Annotated[str, typer.Argument(help="mnist, cifar-10 or digits (comes with scikit-learn)")],
    data_path: Annotated[Path | None, typer.Argument(metavar="[DATA_DIR]", help="the same as --data-dir")] = None,
    rounds: Annotated[int | None, Opt(help="Prunings; round 0 is the dense net (default: 20, or the preset's)")] = None,
    to_density: Annotated[float | None, Opt(help="Stop at the first round at or below this density.")] = None,
    preset: Annotated[str | None, Opt(help="paper, lecode or fast (default: paper where it covers the pair)")] = None,
    seed: Annotated[int | None, Opt(help="Seed of everything random (default: 0)")] = None,
    replicates: Annotated[int, Opt(min=1, help="Searches with seeds SEED, SEED+1, ...; the table shows means.")] = 1,
    iterations: Annotated[int | None, Opt("--iterations", "-i", help="Training steps per round.")] = None,
    epochs: Annotated[float | None, Opt("--epochs", "-e", help="The same in passes over the data.")] = None,
    batch_size: Annotated[int | None, Opt("--batch-size", "-b", help="Images per step.")] = None,
    lr: Annotated[float | None, Opt("--lr", "-l", help="Learning rate.")] = None,
    rate: Annotated[float | None, Opt(help="Share of the kept weights removed per round.")] = None,
    scope: Annotated[str | None, Opt(help="layer or global")] = None,
    criterion: Annotated[str | None, Opt(help="magnitude (large_final)")] = None,
    rewind_to: Annotated[str | None, Opt(help="0, 500it or 1ep: the weights survivors return to.")] = None,
    device: Annotated[str | None, Opt(help="auto, cpu, cuda, cuda:N or mps")] = None,
    precision: Annotated[str | None, Opt(help="auto, fp32 or bf16")] = None,
    compile: Annotated[str | None, Opt(help="auto, on or off: torch.compile")] = None,
    loader: Annotated[str | None, Opt(help="auto, resident or ffcv")] = None,
    engine: Annotated[str | None, Opt(help="auto, dense or sparse")] = None,
    kernels: Annotated[str | None, Opt(help="auto, torch or triton (masked kernels, CUDA only)")] = None,
    theta0: Annotated[str | None, Opt(help="stored, or seed: keep only the seed of theta0 in the ticket.")] = None,
    keep_weights: Annotated[str | None, Opt(help="none, last or all: keep trained weights (default: none)")] = None,
    save_every: Annotated[str | None, Opt(help="Time between saves inside a round (default: 60s)")] = None,
    log: Log = None,
    config: Annotated[Path | None, Opt(help="Settings from a TOML file; a run's recipe.toml works.")] = None,
    set_: Annotated[list[str] | None, Opt("--set", metavar="SECTION.KEY=VALUE", help="Any other setting.")] = None,
    out: Out = Path("runs"),
    data_dir: DataDir = None,
    fresh: Annotated[bool, Opt("--fresh", help="Start anew beside an earlier run; deletes nothing.")] = False,
    json: Json = False,
) -> None:
    """Train, prune, rewind, repeat; leave every round's ticket in one file.

    The same command goes on where it stopped, or prints the result if it had finished.
    """
    if data_path and data_dir and data_path != data_dir:
        raise RecipeError(f"DATA_DIR {data_path} and --data-dir {data_dir} contradict each other; give one")
    settings = dict(parse_setting(text) for text in set_ or [])
    settings |= given({
        "prune.rounds": rounds, "prune.to_density": to_density, "prune.rate": rate, "prune.scope": scope,
        "prune.criterion": criterion, "prune.rewind_to": rewind_to,
        "train.iterations": length(iterations, epochs), "train.batch_size": batch_size, "train.lr": lr,
        "seeds.base": seed, "compute.device": device, "compute.precision": precision, "compute.compile": compile,
        "compute.loader": loader, "compute.engine": engine, "compute.kernels": kernels,
        "store.theta0": theta0, "store.keep_weights": keep_weights, "store.save_every": seconds(save_every),
    })  # fmt: skip
    composed = compose(model, dataset, preset=preset, config=config, settings=settings)

    from fastlth.cli.show import console, json_document, search_result
    from fastlth.running import run
    from fastlth.ui import StopGuard, View

    screen = console()
    with StopGuard() as guard, View(screen, _header(composed), _shorter(composed)) as view:
        search = run(composed.recipe, out=out, data_dir=data_dir or data_path, replicates=replicates, fresh=fresh,
                     log=log or (), show=view, stopped=guard)  # fmt: skip
    search_result(search, screen)
    if json:
        json_document(search.to_json())


def _header(composed: Composed) -> str:
    recipe = composed.recipe
    preset = f"preset {composed.preset}" if composed.preset else "no preset"
    if composed.preset == "fast" and not composed.verified:
        preset += " (not yet verified to find a ticket)"
    lines = [
        f"{recipe.model.name} on {recipe.data.name}, {preset}: {recipe.prune.rounds} rounds of "
        f"{recipe.train.iterations:,} iterations at batch {recipe.train.batch_size}, "
        f"{recipe.train.optimizer} {recipe.train.lr:g}, {recipe.prune.scope} scope, seed {recipe.seeds.base}",
        *composed.notes,
    ]
    return "\n".join(lines)


def _shorter(composed: Composed) -> str:
    """What to say of the shorter preset where a search takes long."""
    recipe = composed.recipe
    if composed.preset == "fast":
        return ""
    try:
        fast = compose(recipe.model.name, recipe.data.name, preset="fast").recipe
    except RecipeError:
        return ""
    share = (fast.train.iterations * (fast.prune.rounds + 1)) / (recipe.train.iterations * (recipe.prune.rounds + 1))
    return f"; --preset fast makes {share:.1%} of these steps" if share < 1 else ""
