"""The report of one or several searches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from fastlth.report import curves, layers, provenance, published
from fastlth.report.controls import Result
from fastlth.report.document import Code, Document, Item, Section, Table
from fastlth.report.subject import Subject
from fastlth.search import over

NONE = "-"  # not measured, as in an imported ticket
HEADER = ("density", "kept", "early stop", "test acc. there", "test acc. at end", "train acc.", "seconds", "images/s")


def document(subjects: Sequence[Subject], command: str, rounds: Sequence[int] | None = None) -> Document:
    """``command`` is the one that makes this report; ``rounds`` are those whose training curves are drawn."""
    early, stop, end, train, seconds, speed = curves.by_density(subjects)
    accuracy, loss = curves.training(subjects, rounds)
    titles = list(dict.fromkeys(s.title for s in subjects))
    return Document(
        "Lottery tickets: " + ", ".join(titles),
        tuple(_sentence(s, alone=len(subjects) == 1) for s in subjects),
        (
            Section("Tickets", (early, stop, end, train), curves.legend(subjects)),
            Section("Training", (accuracy, loss)),
            Section("Masks", (layers.density_per_layer(subjects), layers.overlap_between_rounds(subjects),
                              layers.overlap_between_replicates(subjects))),
            Section("Speed", (seconds, speed)),
            Section("Rounds", tuple(_rounds(s, alone=len(subjects) == 1) for s in subjects),
                    "Means over replicates where there are several. Tickets are chosen on validation images and "
                    "reported on test images."),
            Section("Controls", tuple(_controls(s, alone=len(subjects) == 1) for s in subjects if s.controls()),
                    "Means over draws and replicates."),
            Section("Published values", tuple(_published(subjects)),
                    "Stated in the papers, for their budgets and their own dense nets."),
            Section("Recipe", tuple(_recipe(s, alone=len(subjects) == 1) for s in subjects)),
            Section("Environment", tuple(_environment(s, alone=len(subjects) == 1) for s in subjects)),
            Section("Commands", (
                Code("Made by", tuple(line for s in subjects for line in provenance.commands(s))),
                Code("This report", (command,)),
            )),
        ),
    )  # fmt: skip


def _sentence(subject: Subject, alone: bool) -> str:
    """What came out, in a sentence or two."""
    name = "" if alone else f"{subject.label}: "
    count = len(subject.replicates)
    runs = "one run" if count == 1 else f"{count} replicates"
    asked = subject.recipe.prune.rounds
    if not subject.rounds and subject.controls():
        return f"{name}Controls only ({'; '.join(subject.controls())}); no round of a search is finished ({runs})."
    if not subject.rounds:
        return f"{name}No round is finished yet ({runs}, {asked + 1} rounds asked for)."
    seeds = "seed" if count == 1 else "seeds"
    sure = f"{runs}, {seeds} {', '.join(str(r.seed) for r in subject.replicates)}"
    least = min(len(r.rounds) for r in subject.replicates)
    if not all(over(subject.recipe, r.rounds) for r in subject.replicates):
        sure += f", so far: {least} of {asked + 1} rounds finished"
    winner = subject.winner
    if not _known(subject.values(0, "early_stop_test_accuracy")):
        return f"{name}Masks of {subject.rounds - 1} prunings; nothing was trained or measured here ({sure})."
    if winner is None:
        return (f"{name}No winning ticket: no pruned round was as good as the dense one on validation images, and as "
                f"quick ({sure}).")  # fmt: skip
    density = subject.results(winner)[0]["density"]
    fields = ("early_stop_test_accuracy", "early_stop_iteration")
    (accuracy, iteration), (dense, slower) = ([_mean(subject.values(k, f)) or 0.0 for f in fields] for k in (winner, 0))
    return (f"{name}Winning ticket: round {winner}, {density:.2%} of the weights. Test accuracy at early stop "
            f"{accuracy:.2%} (dense {dense:.2%}), reached at iteration {iteration:,.0f} (dense {slower:,.0f}); "
            f"{sure}.")  # fmt: skip


def _rounds(subject: Subject, alone: bool) -> Table:
    rows = []
    for k in range(subject.rounds):
        results = subject.results(k)
        engines = dict.fromkeys(r.get("engine") or NONE for r in results)
        rows.append((str(k), *_numbers(results), ", ".join(engines)))
    return Table("" if alone else subject.label, ("round", *HEADER, "engine"), tuple(rows), marked=subject.winner)


def _controls(subject: Subject, alone: bool) -> Table:
    rows = tuple((name, str(len(results)), *_numbers(results))
                 for name, draws in subject.controls().items() for results in draws)  # fmt: skip
    return Table("" if alone else subject.label, ("control", "trainings", *HEADER), rows)


def _numbers(results: Sequence[Result]) -> tuple[str, ...]:
    """What ``HEADER`` names."""
    return (
        f"{results[0]['density']:.2%}", _text(results[0].get("kept"), ","),
        *(_text(_mean(r.get(field) for r in results), form) for field, form in (
            ("early_stop_iteration", ",.0f"), ("early_stop_test_accuracy", ".2%"), ("test_accuracy", ".2%"),
            ("train_accuracy", ".2%"), ("seconds", ",.1f"), ("images_per_second", ",.0f"))),
    )  # fmt: skip


def _published(subjects: Sequence[Subject]) -> Iterable[Item]:
    pairs = dict.fromkeys((s.recipe.model.name, s.recipe.data.name) for s in subjects)
    for model, dataset in pairs:
        names = {"early_stop_test_accuracy": "test accuracy at early stop", "early_stop_iteration": "early stop",
                 "test_accuracy": "test accuracy at the end"}  # fmt: skip
        rows = tuple((names[p.quantity], p.says, p.source) for p in published.values(model, dataset))
        if rows:
            yield Table(f"{model} on {dataset}", ("quantity", "against the dense net", "source"), rows)


def _recipe(subject: Subject, alone: bool) -> Table:
    preset, differences = provenance.nearest(subject.recipe)
    title = "" if alone else f"{subject.label}: "
    title += f"as preset {preset}" if preset else "no preset covers this pair"
    title += ", except" if preset and differences else ""
    header = ("setting", f"preset {preset}" if preset else "default", "here")
    rows = tuple((d.setting, NONE if d.preset is None else str(d.preset), str(d.here)) for d in differences)
    return Table(title, header if rows else (), (*rows, *_digest(subject, bool(rows))))


def _digest(subject: Subject, table: bool) -> tuple[tuple[str, ...], ...]:
    digest = subject.recipe.digest[:8]
    return (("recipe digest", "", digest) if table else ("recipe digest", digest),)


def _environment(subject: Subject, alone: bool) -> Table:
    found = provenance.environment(subject) or {"environment": "not recorded: imported masks"}
    return Table("" if alone else subject.label, (), tuple(found.items()))


def _known(values: Iterable[float | None]) -> list[float]:
    return [v for v in values if v is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return fmean(known) if known else None


def _text(value: Any, form: str) -> str:
    return NONE if value is None else format(value, form)
