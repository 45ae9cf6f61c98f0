"""``fastlth supermask MODEL DATASET``: masks that make an untrained net good."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastlth.catalogue import SIGN_TESTS
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
    check_factors,
    check_looked_at,
    given,
    length,
)
from fastlth.composition import compose, parse_setting

EXAMPLE = "Example: fastlth supermask lenet-300-100 mnist --method learned --rescale --signed-constant"

# settings of pruning that one-shot masks follow; every weight of the other methods has a score
LOOKED_AT = ["prune.rate", "prune.scale", "prune.only", "prune.never", "prune.alpha", "prune.formulas"]

Opt = typer.Option


def supermask(
    model: Model,
    dataset: Dataset,
    method: Annotated[str, Opt(help="one-shot, learned or edge-popup")] = "one-shot",
    criterion: Annotated[str, Opt(help="one-shot: how weights are ranked.")] = "large_final_same_sign",
    powers: Annotated[int, Opt(help="one-shot: prune 0 to this many times at once.")] = 24,
    signed_constant: Annotated[bool, Opt("--signed-constant", help="Weights become sign(w) * std(layer).")] = False,
    signed_constant_multiplier: Annotated[float, Opt(help="Signed constants are this many times as large.")] = 1.0,
    rescale: Annotated[bool, Opt("--rescale", help="Make up for the weights that are masked.")] = False,
    sigmoid_bias: Annotated[float, Opt(help="learned: first scores; 0 keeps half of the weights.")] = 0.0,
    rounded: Annotated[bool, Opt("--rounded", help="learned: round probabilities instead of drawing.")] = False,
    samples: Annotated[int, Opt(help="learned: masks drawn for the final accuracy.")] = 10,
    keep: Annotated[float, Opt(help="edge-popup: share of each layer that is kept.")] = 0.5,
    preset: Annotated[str | None, Opt(help="paper, lecode or fast (default: paper where it covers the pair)")] = None,
    seed: Seed = None,
    iterations: Iterations = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    device: Annotated[str | None, Opt(help="auto, cpu, cuda, cuda:N or mps")] = None,
    set_: Annotated[list[str] | None, Opt("--set", metavar="SECTION.KEY=VALUE", help="Any other setting.")] = None,
    out: Out = Path("runs"),
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Find masks under which a net with untrained weights classifies well.

    The same command goes on where it stopped.
    """
    from fastlth.experiments.supermasks.plan import Plan, check, settings

    plan = Plan(method=method, criterion=criterion, powers=powers, signed_constant=signed_constant,
                signed_constant_multiplier=signed_constant_multiplier, rescale=rescale, sigmoid_bias=sigmoid_bias,
                rounded=rounded, samples=samples, keep=keep)  # fmt: skip
    own = dict(parse_setting(text) for text in set_ or [])
    asked = {**settings(method, model), **own} | given({
        "train.iterations": length(iterations, epochs), "train.batch_size": batch_size, "train.lr": lr,
        "seeds.base": seed, "compute.device": device,
    })  # fmt: skip
    if asked.keys() & {"prune.alpha", "prune.formulas"}:  # options of a criterion: of this one
        asked.setdefault("prune.criterion", plan.criterion)
    composed = compose(model, dataset, preset=preset, settings=asked)
    check(composed.recipe, plan)
    _check_own(own, method, criterion)

    from fastlth.cli.show import console, json_document, teller
    from fastlth.experiments.supermasks.run import supermask as find
    from fastlth.ui import StopGuard, TrialLines

    screen = console()
    for note in composed.notes:
        screen.print(note, highlight=False, soft_wrap=True)
    with StopGuard() as guard:
        document = find(composed.recipe, plan, out=out, data_dir=data_dir, stopped=guard,
                        show=teller(screen, TrialLines(screen)))  # fmt: skip
    for sentence in _sentences(document):
        screen.print(sentence, highlight=False, soft_wrap=True)
    if json:
        json_document(document)


def _check_own(own: dict[str, Any], method: str, criterion: str) -> None:
    """Raises RecipeError for settings of pruning that this way of finding masks does not look at."""
    if criterion in SIGN_TESTS and method == "one-shot":
        check_looked_at(own, [name for name in LOOKED_AT if name != "prune.rate"], f"criterion {criterion}")
        check_factors(own, "a sign test asks for no rate")
    check_looked_at(own, LOOKED_AT if method == "one-shot" else [], f"supermask --method {method}")


def _sentences(document: dict[str, Any]) -> list[str]:
    if document["method"] != "one-shot":
        many = len(document["test_accuracies"])
        means = f", the mean of {many} masks" if many > 1 else ""
        return [f"test accuracy {document['test_accuracy']:.2%}{means}; density {document['density']:.2%}; "
                f"in {document['folder']}"]  # fmt: skip
    lines = []
    for which, words in (("init", "initial weights"), ("signed_constant", "signed constants")):
        b = document["best"][which]
        lines.append(f"{words}: test accuracy {b['test_accuracy']:.2%} at density {b['density']:.2%} (best on "
                     f"validation images), {b['highest_test_accuracy']:.2%} at most")  # fmt: skip
    return [*lines, f"in {document['folder']}"]
