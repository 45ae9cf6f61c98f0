"""Figures of searches: accuracy, early stop and speed against density, and training curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fastlth.report import published
from fastlth.report.controls import Result
from fastlth.report.figure import Axis, Curves, Look, Panel, Point, Series, summarise
from fastlth.report.subject import Subject

MANY_TICKS = 9
CHOSEN = 5  # rounds whose training is drawn where none are asked for


def by_density(subjects: Sequence[Subject]) -> list[Curves]:
    """One figure per measured quantity of a round, all subjects and their branches in each."""
    return [
        against_density(
            subjects, "accuracy-early-stop", "Accuracy at early stop", "early_stop_test_accuracy",
            "Test accuracy at the iteration of the lowest validation loss.",
            Axis("test accuracy at early stop", "test_accuracy_at_early_stop", percent=True), reference=True,
        ),
        against_density(
            subjects, "early-stop", "Early stop", "early_stop_iteration",
            "Iteration of the lowest validation loss: earlier means quicker to learn.",
            Axis("early-stop iteration", "early_stop_iteration", whole=True, zero=True), reference=True,
        ),
        against_density(
            subjects, "accuracy-end", "Accuracy at the end of training", "test_accuracy",
            "Test accuracy after the last iteration.",
            Axis("test accuracy at the end", "test_accuracy_at_end", percent=True), reference=True,
        ),
        against_density(
            subjects, "train-accuracy", "Training accuracy at the end", "train_accuracy",
            "Accuracy on training images after the last iteration.",
            Axis("training accuracy at the end", "train_accuracy_at_end", percent=True), reference=True,
        ),
        against_density(
            subjects, "seconds", "Seconds per round", "seconds",
            "Training and evaluation of one round.", Axis("seconds per round", "seconds", zero=True),
        ),
        against_density(
            subjects, "images-per-second", "Speed", "images_per_second",
            "Training images per second, evaluations left out.",
            Axis("images per second", "images_per_second", whole=True, zero=True),
        ),
    ]  # fmt: skip


def legend(subjects: Sequence[Subject]) -> str:
    """What all figures of ``by_density`` have in common."""
    band = "Lines are means over replicates, bands reach from the lowest to the highest. "
    repeated = any(len(s.replicates) > 1 for s in subjects)
    return f"{band if repeated else ''}Thin dots: the dense net. Ring: the winning ticket, chosen on validation images."


def against_density(
    subjects: Sequence[Subject], name: str, title: str, field: str, caption: str, y: Axis, reference: bool = False
) -> Curves:
    """``reference`` adds what ours is to be compared with: the dense net, the winning ticket, the papers' values."""
    alone = len(subjects) == 1
    series: list[Series] = []
    rings: list[Series] = []
    stars: list[Series] = []
    for i, s in enumerate(subjects):
        tickets = _points((s.results(k) for k in range(s.rounds)), field)
        if tickets:
            series.append(Series("tickets" if alone else s.label, tickets, Look(colour=i, marker=i)))
        for j, (control, draws) in enumerate(s.controls().items(), start=1):
            if points := _points(draws, field):
                look = Look(colour=j, dash=j, marker=j) if alone else Look(colour=i, dash=j, marker=i + j)
                label = control.replace("-", " ")
                series.append(Series(label if alone else f"{s.label}, {label}", points, look))
        if reference and tickets:
            series.append(_dense(s, tickets, i, alone))
            rings += _ring(s, field, i, first=not rings)
            if s.title not in {t.title for t in subjects[:i]}:
                stars += _published(s, tickets, field)
    found = [p.x for s in series for p in s.points]
    caption += " Stars: the paper's gain over its own dense net, at its budget, applied to ours." if stars else ""
    return Curves(name, title, caption, density_axis(subjects, found), y, (Panel("", (*series, *rings, *stars)),))


def _points(rounds: Iterable[Sequence[Result]], field: str) -> tuple[Point, ...]:
    """A point for each round in which the field was measured."""
    made = (summarise(results[0]["density"], [r.get(field) for r in results]) for results in rounds if results)
    return tuple(point for point in made if point is not None)


def _dense(subject: Subject, tickets: tuple[Point, ...], colour: int, alone: bool) -> Series:
    level = tickets[0]
    ends = (tickets[0].x, tickets[-1].x) if len(tickets) > 1 else (tickets[0].x,)
    points = tuple(Point(x, level.y, level.low, level.high, level.count) for x in ends)
    label = "dense" if alone else f"{subject.label}, dense"
    return Series(label, points, Look(colour=-1 if alone else colour, dash=2, marker=None, thin=True), legend=alone)


def _ring(subject: Subject, field: str, colour: int, first: bool) -> list[Series]:
    winner = subject.winner
    points = () if winner is None else _points([subject.results(winner)], field)
    look = Look(colour=colour, ring=True, line=False)
    return [Series("winning ticket", points, look, legend=first)] if points else []


def _published(subject: Subject, tickets: tuple[Point, ...], field: str) -> list[Series]:
    """The papers' values within the densities that were searched."""
    least, dense = min(p.x for p in tickets), tickets[0]
    known = published.values(subject.recipe.model.name, subject.recipe.data.name)
    found = [p for p in known if p.quantity == field and p.density >= 0.97 * least]
    points = tuple(Point(p.density, p.beside(dense.y)) for p in sorted(found, key=lambda p: -p.density))
    return [Series("published", points, Look(colour=-1, marker=-1, line=False))] if points else []


def density_axis(subjects: Sequence[Subject], found: Sequence[float]) -> Axis:
    """Logarithmic, dense on the left, as in the papers; labels at the rounds' own densities where all share them."""
    searched = [[float(s.results(k)[0]["density"]) for k in range(s.rounds)] for s in subjects]
    longest = max(searched, key=len, default=[])
    ticks: list[float] = [1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001]
    if longest and all(densities == longest[: len(densities)] for densities in searched):
        ticks = longest[:: -(-len(longest) // MANY_TICKS)]
    least = min(found, default=1.0)
    return Axis("weights kept", "density", percent=True, log=True, inverted=True,
                ticks=tuple(t for t in ticks if t >= 0.9 * least))  # fmt: skip


def training(subjects: Sequence[Subject], rounds: Sequence[int] | None = None) -> list[Curves]:
    """Accuracy and loss against iteration for chosen rounds, a panel for each subject."""
    test = all(s.recipe.evaluate.test == "always" for s in subjects)
    which = "test" if test else "validation"
    chosen = {s.label: choose(s, rounds) for s in subjects}
    repeated = any(len(s.replicates) > 1 for s in subjects)
    told = "; lines are means over replicates, bands their range" if repeated else ""
    accuracy = _over_iterations(
        subjects, chosen, "training-accuracy", "Training curves", f"{which}_accuracy",
        f"Accuracy on {which} images while training, for chosen rounds{told}. The first, steep part may be cut off.",
        Axis(f"{which} accuracy", f"{which}_accuracy", percent=True),
    )  # fmt: skip
    loss = _over_iterations(
        subjects, chosen, "validation-loss", "Validation loss", "validation_loss",
        f"Its lowest point is the early stop{told}.", Axis("validation loss", "validation_loss"),
    )  # fmt: skip
    return [accuracy, loss]


def choose(subject: Subject, asked: Sequence[int] | None = None) -> list[int]:
    """The rounds to draw: those asked for, else the dense one, the winning one, the last and some between."""
    seen = sorted({int(e["round"]) for r in subject.replicates for e in r.evaluations})
    if asked is not None:
        return [k for k in asked if k in seen]
    if len(seen) <= CHOSEN:
        return seen
    spread = [seen[round(i * (len(seen) - 1) / (CHOSEN - 1))] for i in range(CHOSEN)]
    winner = subject.winner
    if winner is not None and winner in seen and winner not in spread:
        nearest = min(spread[1:-1], key=lambda k: abs(k - winner))
        spread[spread.index(nearest)] = winner
    return sorted(set(spread))


def _over_iterations(
    subjects: Sequence[Subject], chosen: Mapping[str, Sequence[int]], name: str, title: str, field: str,
    caption: str, y: Axis,
) -> Curves:  # fmt: skip
    panels: list[Panel] = []
    lows = []
    for s in subjects:
        series: list[Series] = []
        for i, k in enumerate(chosen[s.label]):
            by_iteration: dict[int, list[float | None]] = {}
            for replicate in s.replicates:
                for e in replicate.evaluations:
                    if e["round"] == k:
                        by_iteration.setdefault(int(e["iteration"]), []).append(e.get(field))
            points = tuple(p for x, v in sorted(by_iteration.items()) if (p := summarise(x, v)) is not None)
            label = _round_label(s, k)
            series.append(Series(label, points, Look(colour=-1 if k == 0 else i - 1, dash=i, marker=None)))
        panels.append(Panel(s.label if len(subjects) > 1 else "", tuple(series)))
        lows.append(low_end(sorted(p.y for one in series for p in one.points)))
    if y.percent:
        y = replace(y, low=min(filter(None, lows), default=None) if all(lows) else None)
    x = Axis("iteration", "iteration", whole=True, zero=True)
    return Curves(name, title, caption, x, y, tuple(panels))


def low_end(values: Sequence[float]) -> float | None:
    """Where an accuracy axis may begin so that the part that matters, near the top, is not flat; None: at the start."""
    if len(values) <= 20:
        return None
    low = values[len(values) // 8]
    return max(0.0, low - 0.15 * (values[-1] - low)) or None


def _round_label(subject: Subject, round: int) -> str:
    results = subject.results(round)
    density = f"{results[0]['density']:.1%}".replace("%", " %") if results else "under way"
    return f"round {round}, {density}"
