"""Figures of masks: density per layer and round, overlap between rounds and between replicates."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fastlth.report.curves import density_axis
from fastlth.report.figure import Axis, Curves, Look, Matrices, Panel, Point, Series, Square, summarise
from fastlth.report.subject import Replicate, Subject

COLOURS = 7  # layers that still get a colour each; more get the shades of a sequence
MANY_ROUNDS = 13  # rounds of a matrix; of more every second, third ...

Masks = Mapping[str, NDArray[np.uint8]]


def density_per_layer(subjects: Sequence[Subject]) -> Curves:
    """The first replicate's: with layer-wise pruning all have the same counts."""
    panels = []
    for s in subjects:
        masks = s.replicates[0].pruned_at
        series = []
        for i, (name, at) in enumerate(masks.items()):
            points = tuple(Point(float(k), _kept(at, k) / at.size) for k in range(len(s.replicates[0].rounds)))
            few = len(masks) <= COLOURS
            depth = None if few else i / (len(masks) - 1)
            look = Look(colour=i, dash=i if few else i % 4, marker=i if few else None, depth=depth)
            series.append(Series(name.removesuffix(".weight"), points, look))
        panels.append(Panel(s.label if len(subjects) > 1 else "", tuple(series)))
    seeds = "" if all(len(s.replicates) == 1 for s in subjects) else f" Seed {subjects[0].replicates[0].seed}."
    return Curves(
        "density-per-layer", "Density per layer", f"Weights kept in each layer that is pruned.{seeds}",
        Axis("round", "round", whole=True), Axis("weights kept in the layer", "density", percent=True, log=True),
        tuple(panels),
    )  # fmt: skip


def overlap_between_rounds(subjects: Sequence[Subject]) -> Matrices:
    """Intersection over union of the masks of each two rounds of a search."""
    panels = []
    for s in subjects:
        one = s.replicates[0]
        count = len(one.rounds) if one.pruned_at else 0
        rounds = list(range(0, count, -(-count // MANY_ROUNDS) or 1))
        values = tuple(tuple(_rounds_overlap(one, a, b) for b in rounds) for a in rounds)
        panels.append(Square(s.label if len(subjects) > 1 else "", tuple(map(str, rounds)), values))
    caption = ("Weights kept in both rounds / weights kept in either, of those that may be pruned. Masks of one "
               "search are nested, so this is the ratio of their sizes.")  # fmt: skip
    return Matrices("overlap-rounds", "Mask overlap between rounds", caption, "round", "overlap", tuple(panels))


def _rounds_overlap(one: Replicate, a: int, b: int) -> float:
    both = either = 0
    for at in one.pruned_at.values():
        in_a, in_b = (at == 0) | (at > a), (at == 0) | (at > b)
        both += int((in_a & in_b).sum())
        either += int((in_a | in_b).sum())
    return both / either if either else 1.0


def overlap_between_replicates(subjects: Sequence[Subject]) -> Curves:
    """Do other seeds keep the same weights? For each two replicates, relative to what chance gives."""
    series = []
    repeated = [s for s in subjects if len(s.replicates) > 1 and min(len(r.rounds) for r in s.replicates) > 1]
    for i, s in enumerate(repeated):
        finished = min(len(r.rounds) for r in s.replicates)
        pairs = list(itertools.combinations([r.pruned_at for r in s.replicates], 2))
        found = [summarise(s.results(k)[0]["density"], [_times_chance(a, b, k) for a, b in pairs])
                 for k in range(1, finished)]  # fmt: skip
        points = tuple(p for p in found if p is not None)
        series.append(Series("tickets" if len(subjects) == 1 else s.label, points, Look(colour=i, marker=i)))
    ends = [p.x for s in series for p in s.points]
    if ends:
        chance = (Point(max(ends), 1.0), Point(min(ends), 1.0))
        series.append(Series("chance", chance, Look(colour=-1, dash=2, marker=None, thin=True)))
    caption = ("Weights that two replicates both keep / as many as random masks with their counts per layer share. "
               "Replicates differ in initial weights, order and split, and the units of their layers have no order in "
               "common. The number of pairs is given as replicates.")  # fmt: skip
    return Curves(
        "overlap-replicates", "Mask overlap between replicates", caption, density_axis(repeated, ends),
        Axis("kept by both / by chance", "overlap_relative_to_chance"), (Panel("", tuple(series)),),
    )  # fmt: skip


def _times_chance(a: Masks, b: Masks, round: int) -> float | None:
    """Weights in both masks / the number expected of random masks with these counts per layer."""
    both, expected = 0, 0.0
    for name, at in a.items():
        one, other = (at == 0) | (at > round), (b[name] == 0) | (b[name] > round)
        both += int((one & other).sum())
        expected += int(one.sum()) * int(other.sum()) / at.size
    return both / expected if expected else None


def _kept(at: NDArray[np.uint8], round: int) -> int:
    return int(((at == 0) | (at > round)).sum())
