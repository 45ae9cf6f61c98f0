"""A reproduced figure: its pictures, and a table of its numbers beside the paper's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

from fastlth.experiments.figures.declare import Against, Between, Figure, Instability, Over, Picture, Stated, Table
from fastlth.experiments.figures.scale import Job, left_out, within
from fastlth.experiments.figures.work import Line, Measured
from fastlth.experiments.supermasks.run import place
from fastlth.report import document as pages
from fastlth.report import provenance, published, subject
from fastlth.report.curves import low_end
from fastlth.report.document import Code, Document, Section
from fastlth.report.figure import Axis, Curves, Look, Panel, Point, Series, summarise
from fastlth.store.run import RECIPE, parent_folder, read_recipe

NEAR = 0.15  # a round stands for a stated density if it is this close to it, relatively
TICKS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)

QUANTITIES = {
    "early_stop_iteration": Axis("early-stop iteration", "early_stop_iteration", whole=True, zero=True),
    "early_stop_test_accuracy": Axis("test accuracy at early stop", "test_accuracy_at_early_stop", percent=True),
    "early_stop_validation_accuracy": Axis(
        "validation accuracy at early stop", "validation_accuracy_at_early_stop", percent=True
    ),
    "test_accuracy": Axis("test accuracy", "test_accuracy", percent=True),
    "train_accuracy": Axis("training accuracy at the end", "train_accuracy_at_end", percent=True),
    "validation_loss": Axis("validation loss", "validation_loss"),
    "test_instability": Axis("instability", "instability", percent=True),
}
SCALES = {
    "paper": "At the paper's scale.",
    "short": "At short scale: fewer iterations, rounds, replicates and draws than the paper's.",
    "smoke": "At smoke scale: digits in place of the paper's data, ResNet-8 in place of ResNets, Conv-2 in place of "
             "the other nets with convolutions, 8 iterations. This shows that everything works; the numbers mean "
             "nothing.",
}  # fmt: skip


@dataclass(frozen=True)
class Beside:
    """A number of the paper and ours; None where this scale has no such round."""

    panel: str
    line: str
    quantity: str
    density: float | None
    paper: str
    here: str | None


def document(figure: Figure, scale: str, lines: Sequence[Line], out: Path, command: str) -> Document:
    """The report of a figure; ``command`` is the one that makes it again."""
    drawn = tuple(draw(figure, picture, lines) for picture in figure.pictures)
    compared = beside(figure, lines)
    gains = "Gains are over the dense net of the same panel, the paper's over its own."
    lead = [f"{figure.source}: {figure.what}.", SCALES[scale], *([figure.note] if figure.note else []),
            *left_out(figure, scale)]  # fmt: skip
    return Document(
        f"Reproduction of {figure.name}", tuple(lead),
        (
            Section("Pictures", drawn, "Means over replicates and draws; bands reach from the lowest to the highest."),
            Section("Beside the paper", _beside_table(compared),
                    gains if compared else "No number of the paper is on record for this figure."),
            Section("How it was made", tuple(_made(lines, out))),
            Section("Commands", (Code("This figure", (command,)),)),
        ),
    )  # fmt: skip


def draw(figure: Figure, picture: Picture, lines: Sequence[Line]) -> Curves:
    """One picture as plain numbers."""
    match picture:
        case Against():
            return _against(picture, lines)
        case Over():
            return _over(picture, lines)
        case Between():
            return _between(lines)
        case Instability():
            return _instability(lines)
        case Table():
            return _table(picture, lines)


def _against(picture: Against, lines: Sequence[Line]) -> Curves:
    labels = list(dict.fromkeys(line.label for line in lines))
    axis = QUANTITIES[picture.quantity]
    end = picture.quantity == "test_accuracy"
    when = f" at iteration {picture.at:,} of the paper's schedule" if picture.at else " at the end" if end else ""
    panels: list[Panel] = []
    least = 1.0
    for name in dict.fromkeys(line.panel for line in lines):
        series: list[Series] = []
        stars: tuple[Point, ...] = ()
        for line in (one for one in lines if one.panel == name):
            points = _by_round(line, partial(_value, picture, line.job), "kept" if picture.counted else "density")
            least = min([least, *(p.x for p in points)])
            j = labels.index(line.label)
            series.append(Series(line.label, points, Look(colour=j, marker=j, dash=j if line.follow else 0)))
            if line.follow is None and line.job.arm.published and points and picture.at is None:
                stars += _stars(line, picture.quantity, points)
        if stars:
            series.append(Series("published", stars, Look(colour=-1, marker=-1, line=False)))
        panels.append(Panel(name if len({line.panel for line in lines}) > 1 else "", tuple(series)))
    caption = "Stars: the paper's gain over its own dense net, applied to ours." if _starred(panels) else ""
    name = picture.quantity.replace("_", "-") + (f"-at-{picture.at}" if picture.at else "")
    x = Axis("weights kept", "kept", whole=True, log=True, inverted=True)
    if not picture.counted:
        x = Axis("weights kept", "density", percent=True, log=True, inverted=True,
                 ticks=tuple(t for t in TICKS if t >= 0.9 * least))  # fmt: skip
    return Curves(name, (axis.label + when).capitalize(), caption, x, axis, tuple(panels))


def _by_round(line: Line, value: Callable[[Measured], float | None], against: str) -> tuple[Point, ...]:
    rounds = sorted({m.result["round"] for m in line.found if "round" in m.result})
    made = []
    for k in rounds:
        same = [m for m in line.found if m.result["round"] == k]
        made.append(summarise(fmean(m.result[against] for m in same), [value(m) for m in same]))
    return tuple(p for p in made if p is not None)


def _value(picture: Against, job: Job, measured: Measured) -> float | None:
    if picture.at is None:
        return measured.result.get(picture.quantity)
    wanted = job.iteration(picture.at)
    nearest = min(evaluations(measured), key=lambda e: abs(e["iteration"] - wanted), default=None)
    return None if nearest is None else nearest.get("test_accuracy")


def evaluations(measured: Measured) -> list[Mapping[str, Any]]:
    """The evaluations while that net was trained, in order."""
    if measured.metrics is None:
        return []
    return [e for e in _read(measured.metrics) if e["round"] == measured.result["round"]]


@lru_cache(maxsize=64)
def _read(file: Path) -> tuple[Mapping[str, Any], ...]:
    return tuple(subject.evaluations(file))


def _stars(line: Line, quantity: str, points: Sequence[Point]) -> tuple[Point, ...]:
    arm = line.job.arm
    known = [p for p in published.values(arm.model, arm.dataset) if p.quantity == quantity]
    return tuple(Point(p.density, p.beside(points[0].y)) for p in known if p.density >= 0.97 * points[-1].x)


def _starred(panels: Iterable[Panel]) -> bool:
    return any(s.look.marker == -1 for p in panels for s in p.series)


def _over(picture: Over, lines: Sequence[Line]) -> Curves:
    axis = QUANTITIES[picture.quantity]
    panels = []
    for chosen in picture.panels:
        series: list[Series] = []
        for line in (one for one in lines if one.label in chosen.labels):
            for k in within(chosen.rounds, line.job.recipe.prune.rounds):
                same = [m for m in line.found if m.result["round"] == k]
                if not same:
                    continue
                by_iteration: dict[int, list[float | None]] = {}
                for measured in same:
                    for e in evaluations(measured):
                        by_iteration.setdefault(int(e["iteration"]), []).append(e.get(picture.quantity))
                points = tuple(p for x, v in sorted(by_iteration.items()) if (p := summarise(x, v)) is not None)
                label = f"{_percent(same[0].result['density'])}{'' if line.follow is None else ', ' + line.label}"
                look = Look(colour=len(series) if k else -1, dash=len(series), marker=None)
                series.append(Series(label, points, look))
        panels.append(Panel(chosen.title, tuple(series)))
    if axis.percent:
        lows = [low_end(sorted(p.y for s in panel.series for p in s.points)) for panel in panels]
        axis = replace(axis, low=min((low for low in lows if low), default=None) if all(lows) else None)
    x = Axis("iteration", "iteration", whole=True, zero=True)
    name = f"{picture.quantity.replace('_', '-')}-over-training"
    return Curves(name, f"{axis.label.capitalize()} over training", "Named by the share of weights kept.", x, axis,
                  tuple(panels))  # fmt: skip


def _copies(lines: Sequence[Line]) -> Iterable[tuple[str, Line, int, int, list[Measured]]]:
    """(label, line, round, k, pairs) of all lines that are pairs of copies."""
    for line in lines:
        keys = dict.fromkeys((m.result["round"], m.result["iteration"]) for m in line.found if "alphas" in m.result)
        for round, k in keys:
            same = [m for m in line.found if (m.result["round"], m.result["iteration"]) == (round, k)]
            yield f"{line.label}, {_percent(same[0].result['density'])}", line, round, k, same


def _between(lines: Sequence[Line]) -> Curves:
    panels: dict[str, list[Series]] = {}
    for label, line, _, k, same in _copies(lines):
        series = panels.setdefault(line.panel, [])
        alphas = same[0].result["alphas"]
        for split, dash in (("test", 0), ("train", 1)):
            points = (summarise(a, [m.result[f"{split}_error"][i] for m in same]) for i, a in enumerate(alphas))
            look = Look(colour=len(series) // 2, dash=dash, marker=None)
            name = f"{label}, k = {k:,}, {'test' if split == 'test' else 'training'} images"
            series.append(Series(name, tuple(p for p in points if p is not None), look))
    return Curves(
        "interpolation", "Error on the line between two copies", "The copies are at 0 and 1.",
        Axis("alpha", "alpha"), Axis("error", "error", percent=True),
        tuple(Panel(name, tuple(s)) for name, s in panels.items()),
    )  # fmt: skip


def _instability(lines: Sequence[Line]) -> Curves:
    panels: dict[str, dict[str, list[Point]]] = {}
    for label, line, _, k, same in _copies(lines):
        point = summarise(k, [m.result["test_instability"] for m in same])
        if point is not None:
            panels.setdefault(line.panel, {}).setdefault(label, []).append(point)
    return Curves(
        "instability", "Instability", "Below 2 % a net is called stable.",
        Axis("iteration at which the copies part", "iteration", whole=True), QUANTITIES["test_instability"],
        tuple(Panel(name, tuple(Series(label, tuple(sorted(points, key=lambda p: p.x)), Look(colour=i, marker=i))
                                for i, (label, points) in enumerate(series.items())))
              for name, series in panels.items()),
    )  # fmt: skip


def _table(picture: Table, lines: Sequence[Line]) -> Curves:
    panels, labels = (list(dict.fromkeys(found)) for found in zip(*((n.panel, n.label) for n in lines), strict=True))
    alone = len(panels) == 1  # then the lines stand side by side, each under its name
    series = []
    for i, label in enumerate(labels):
        found = [(i if alone else panels.index(line.panel), line) for line in lines if line.label == label]
        points = (summarise(x, [m.result[picture.quantity] for m in line.found]) for x, line in found)
        look = Look(colour=i, marker=i, line=False)
        series.append(Series(label, tuple(p for p in points if p is not None), look, legend=not alone))
    names = [label.replace(" ", "\n") for label in labels] if alone else panels
    x = Axis(panels[0] if alone else "net", "place" if alone else "net", ticks=tuple(map(float, range(len(names)))),
             names=tuple(names))  # fmt: skip
    axis = QUANTITIES[picture.quantity]
    return Curves(f"{picture.quantity.replace('_', '-')}-by-net", axis.label.capitalize(), "", x, axis,
                  (Panel("", tuple(series)),))  # fmt: skip


def beside(figure: Figure, lines: Sequence[Line]) -> list[Beside]:
    """What the paper states in numbers, and the same of ours, for all that was drawn."""
    stated = list(figure.stated)
    quantities = {p.quantity for p in figure.pictures if isinstance(p, Against) and p.at is None}
    for line in lines:
        if line.follow is None and line.job.arm.published:
            arm = line.job.arm
            stated += [
                Stated(panel=arm.panel, line=line.label, quantity=p.quantity, density=p.density, gain=p.gain,
                       earlier=p.earlier)
                for p in published.values(arm.model, arm.dataset) if p.quantity in quantities
            ]  # fmt: skip
    panels = {line.panel for line in lines}
    return [_beside(one, lines) for one in dict.fromkeys(stated) if one.panel in panels]


def _beside(stated: Stated, lines: Sequence[Line]) -> Beside:
    here = [line for line in lines if line.panel == stated.panel]
    own = _mean(next((line for line in here if line.label == stated.line), None), stated.quantity, stated.density)
    dense = _mean(next((line for line in here if line.follow is None), None), stated.quantity, 1.0)
    text: str | None = None
    if stated.gain is not None:
        paper = _gain(stated.gain)
        text = None if own is None or dense is None else _gain(own - dense)
    elif stated.earlier is not None:
        paper = _earlier(stated.earlier)
        text = None if own is None or dense is None or own == 0 else _earlier(dense / own)
    else:
        assert stated.value is not None
        paper = QUANTITIES[stated.quantity].text(stated.value)
        text = None if own is None else QUANTITIES[stated.quantity].text(own)
    return Beside(stated.panel, stated.line, QUANTITIES[stated.quantity].label, stated.density, paper, text)


def _mean(line: Line | None, quantity: str, density: float | None) -> float | None:
    """Over the replicates and draws of the round nearest to a density; None if there is none near it."""
    if line is None or not line.found:
        return None
    found = [m.result for m in line.found if m.result.get(quantity) is not None]
    if density is not None and found:
        nearest = min((r["density"] for r in found), key=lambda d: abs(math.log(d / density)))
        if abs(math.log(nearest / density)) > NEAR:
            return None
        found = [r for r in found if abs(r["density"] - nearest) < 1e-3 * nearest]
    return fmean(r[quantity] for r in found) if found else None


def _beside_table(rows: Sequence[Beside]) -> tuple[pages.Table, ...]:
    if not rows:
        return ()
    texts = tuple(
        (r.panel, r.line, r.quantity, "" if r.density is None else _percent(r.density), r.paper, r.here or "-")
        for r in rows
    )
    return (pages.Table("", ("panel", "line", "quantity", "density", "paper", "here"), texts),)


def _made(lines: Sequence[Line], out: Path) -> Iterable[pages.Table]:
    rows = []
    jobs = list({id(line.job): line.job for line in lines}.values())
    for job in jobs:
        own = [m.result for line in lines if line.job is job for m in line.found]
        seconds = sum(r.get("seconds", 0.0) for r in own)
        seeds = sorted({m.seed for line in lines if line.job is job for m in line.found})
        r = job.recipe
        rows.append((job.arm.panel, job.arm.label, f"{r.model.name} on {r.data.name}", f"{r.train.iterations:,}",
                     str(r.prune.rounds), ", ".join(map(str, seeds)), f"{seconds:,.0f}",
                     parent_folder(out, r).name))  # fmt: skip
    yield pages.Table("", ("panel", "line", "net and data", "iterations", "rounds", "seeds", "seconds", "run"),
                      tuple(rows))  # fmt: skip
    runs = [parent_folder(out, job.recipe) for job in jobs if job.plan is None]
    if runs:
        known = provenance.environment(subject.read(runs[:1])[0])
    else:
        known = provenance.machine(read_recipe(place(out, jobs[0].recipe) / RECIPE)[1])
    if known:
        yield pages.Table("Machine", (), tuple(known.items()))


def _gain(value: float) -> str:
    return f"{100 * value:+.2f} points"


def _earlier(value: float) -> str:
    return f"{value:.2f} times earlier"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if value >= 0.001 else f"{100 * value:.2g} %"
