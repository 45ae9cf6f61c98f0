"""``fastlth find-ticket MODEL DATASET``: the main job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fastlth.catalogue import CRITERIA, DATASETS, MASK_0, MASK_1, SIGN_TESTS
from fastlth.cli.options import (
    COMPLETE_DATASET,
    COMPLETE_MODEL,
    MODEL_NAMES,
    OWN_DATA,
    OWN_NET,
    DataDir,
    Json,
    Log,
    Out,
    among,
    given,
    length,
    seconds,
)
from fastlth.composition import PRESETS, Composed, compose, parse_setting
from fastlth.errors import RecipeError

EXAMPLE = "Example: fastlth find-ticket vgg19 cifar-10 --rounds 20"

EARLY_BIRD = 0.1  # You et al. 2020

Opt = typer.Option


def _one_of(what: str, names: tuple[str, ...]) -> str:
    """Names as docs/criteria.md explains them; the first is the default."""
    return f"{what}: {', '.join(names)} (default: {names[0]}, or the preset's)"


def find_ticket(
    model: Annotated[str, typer.Argument(help=f"{MODEL_NAMES}, {OWN_NET}", autocompletion=COMPLETE_MODEL)],
    dataset: Annotated[
        str,
        typer.Argument(
            help=f"{', '.join(DATASETS)} (digits comes with scikit-learn), {OWN_DATA}", autocompletion=COMPLETE_DATASET
        ),
    ],
    data_path: Annotated[Path | None, typer.Argument(metavar="[DATA_DIR]", help="the same as --data-dir")] = None,
    rounds: Annotated[int | None, Opt(help="Prunings; round 0 is the dense net (default: 20, or the preset's)")] = None,
    to_density: Annotated[float | None, Opt(help="Stop at the first round at or below this density.")] = None,
    one_shot: Annotated[float | None, Opt(help="Prune once, to this density: the rate follows from it.")] = None,
    preset: Annotated[
        str | None,
        Opt(help=f"{', '.join(PRESETS)} (default: paper where it covers the pair)", autocompletion=among(PRESETS)),
    ] = None,
    seed: Annotated[int | None, Opt(help="Seed of everything random (default: 0)")] = None,
    replicates: Annotated[int, Opt(min=1, help="Searches with seeds SEED, SEED+1, ...; the table shows means.")] = 1,
    iterations: Annotated[int | None, Opt("--iterations", "-i", help="Training steps per round.")] = None,
    epochs: Annotated[float | None, Opt("--epochs", "-e", help="The same in passes over the data.")] = None,
    image_size: Annotated[int | None, Opt(help="Pixels a side, of an image folder (default: 224)")] = None,
    batch_size: Annotated[int | None, Opt("--batch-size", "-b", help="Images per step.")] = None,
    lr: Annotated[float | None, Opt("--lr", "-l", help="Learning rate.")] = None,
    optimizer: Annotated[str | None, Opt(help="adam, adamw or sgd")] = None,
    momentum: Annotated[float | None, Opt(help="Momentum of sgd.")] = None,
    dropout: Annotated[float | None, Opt(help="Share of hidden units that training drops (default: 0)")] = None,
    rate: Annotated[float | None, Opt(help="Share of the kept weights removed per round.")] = None,
    scope: Annotated[str | None, Opt(help="layer or global")] = None,
    prunable: Annotated[
        list[str] | None, Opt(metavar="PATTERN", help="Prune only layers such as 'features.*'; may be given twice.")
    ] = None,
    never_prune: Annotated[
        list[str] | None, Opt(metavar="PATTERN", help="Leave layers such as 'head' whole; may be given twice.")
    ] = None,
    criterion: Annotated[str | None, Opt(help=_one_of("Score by which weights stay", CRITERIA))] = None,
    mask_1: Annotated[str | None, Opt("--mask-1", help=_one_of("What kept weights start with", MASK_1))] = None,
    mask_0: Annotated[str | None, Opt("--mask-0", help=_one_of("What pruned weights are kept at", MASK_0))] = None,
    rewind_to: Annotated[
        str | None, Opt(help="0, 500it or 1ep: the weights survivors return to; 0,500it,1ep: a search for each.")
    ] = None,
    early_bird: Annotated[
        bool,
        Opt(
            "--early-bird",
            help="End a round when its mask stands still; takes no value (--set prune.early_bird=0.1 is the same).",
        ),
    ] = False,
    device: Annotated[str | None, Opt(help="auto, cpu, cuda, cuda:N or mps")] = None,
    precision: Annotated[str | None, Opt(help="auto, fp32 or bf16")] = None,
    compile: Annotated[str | None, Opt(help="auto, on or off: torch.compile")] = None,
    loader: Annotated[str | None, Opt(help="auto, resident or ffcv; pillow for photo-crop without FFCV")] = None,
    engine: Annotated[str | None, Opt(help="auto, dense, sparse (CPU) or graph (CUDA)")] = None,
    kernels: Annotated[str | None, Opt(help="auto, torch or triton (masked kernels, CUDA only)")] = None,
    deterministic: Annotated[bool, Opt("--deterministic", help="On CUDA: the same bits every time, slower.")] = False,
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
        "prune.only": prunable or None, "prune.never": never_prune or None, "data.image_size": image_size,
        "prune.criterion": criterion, "prune.mask_1": mask_1, "prune.mask_0": mask_0,
        "prune.early_bird": EARLY_BIRD if early_bird else None,
        "train.iterations": length(iterations, epochs), "train.batch_size": batch_size, "train.lr": lr,
        "train.optimizer": optimizer, "train.momentum": momentum, "model.dropout": dropout,
        "seeds.base": seed, "compute.device": device, "compute.precision": precision, "compute.compile": compile,
        "compute.loader": loader, "compute.engine": engine, "compute.kernels": kernels,
        "compute.deterministic": True if deterministic else None,
        "store.theta0": theta0, "store.keep_weights": keep_weights, "store.save_every": seconds(save_every),
    })  # fmt: skip
    _no_rate(settings)
    if one_shot is not None:
        settings = _one_round(one_shot, settings)
    points = [
        compose(model, dataset, preset=preset, config=config, settings=settings | given({"prune.rewind_to": point}))
        for point in (rewind_to.split(",") if rewind_to is not None else [None])
    ]
    _once([composed.recipe.prune.rewind_to for composed in points])
    if one_shot is not None:
        from fastlth.running import in_one_step

        points = [replace(composed, recipe=in_one_step(composed.recipe, one_shot)) for composed in points]

    from fastlth.cli.show import console, json_document, search_result
    from fastlth.experiments.rewind_points import search_rewind_points
    from fastlth.running import processes
    from fastlth.ui import StopGuard, View, rewind_table

    screen = console()
    with (
        processes(data_dir or data_path) as team, StopGuard() as guard,
        View(screen, _header(points[0]), _shorter(points[0])) as view,
    ):  # fmt: skip
        searches = search_rewind_points([composed.recipe for composed in points], out=out,
                                        data_dir=data_dir or data_path, replicates=replicates, fresh=fresh,
                                        log=log or (), show=view, stopped=guard, team=team)  # fmt: skip
    if not view.began:
        screen.print("finished before; --fresh begins anew", highlight=False)
    for search in searches:
        search_result(search, screen)
    if len(searches) > 1:
        screen.print(rewind_table([(s.recipe.prune.rewind_to, s.rounds, s.winning_round) for s in searches]))
    if json:
        documents = [{"rewind_to": search.recipe.prune.rewind_to, **search.to_json()} for search in searches]
        json_document({"rewind_points": documents} if len(searches) > 1 else searches[0].to_json())


def _no_rate(settings: dict[str, Any]) -> None:
    criterion = settings.get("prune.criterion")
    if criterion in SIGN_TESTS and "prune.rate" in settings:
        raise RecipeError(f"--criterion {criterion} prunes by signs alone, whatever the rate; leave out --rate")


def _one_round(density: float, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a search that prunes once. Raises RecipeError where they say otherwise."""
    for name, flag in (("rounds", "--rounds"), ("to_density", "--to-density"), ("rate", "--rate")):
        if (value := settings.get(f"prune.{name}")) is not None:
            raise RecipeError(f"--one-shot {density:g} and {flag} {value} contradict each other: one pruning takes the "
                              "rate that its density needs; leave one of them out")  # fmt: skip
    return {**settings, "prune.rounds": 1}


def _once(points: list[int]) -> None:
    for point in points:
        if points.count(point) > 1:
            raise RecipeError(f"--rewind-to names iteration {point} more than once; give every rewind point once")


def _header(composed: Composed) -> str:
    from fastlth.ui import counted

    recipe, prune = composed.recipe, composed.recipe.prune
    preset = f"preset {composed.preset}" if composed.preset else "no preset"
    if composed.preset == "fast" and not composed.verified:
        preset += " (not yet verified to find a ticket)"
    lines = [
        f"{recipe.model.name} on {recipe.data.name}, {preset}: the dense net and "
        f"{counted(recipe.prune.rounds, 'pruned round')}, {recipe.train.iterations:,} iterations each at batch "
        f"{recipe.train.batch_size}, "
        f"{recipe.train.optimizer} {recipe.train.lr:g}, {recipe.prune.scope} scope, seed {recipe.seeds.base}",
        *([] if prune.criterion == CRITERIA[0] and prune.rewinds else [
            f"criterion {prune.criterion}, mask-1 action {prune.mask_1}, mask-0 action {prune.mask_0}"
        ]),
        *composed.notes,
    ]  # fmt: skip
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
