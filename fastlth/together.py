"""Replicates at once: which of them, in which way, and how many at a time.

    threads    the sparse engine on a CPU: one thread each, as many as there are processors
    batched    the graph engine: one batched net (``engines/fleet.py``)
    streams    the graph engine: a stream each in one graph (``engines/streams.py``)
    alone      one after the other

Where ``compute.together`` is auto, a GPU is asked which of the last three is fastest. The answer is written beside what
else was resolved, so that a search that goes on does so in the same way.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from fastlth.data.sources import Source
from fastlth.errors import RecipeError
from fastlth.recipe import ComputeSection, Recipe
from fastlth.search import over
from fastlth.side_by_side import cores
from fastlth.store.inspect import summary
from fastlth.store.run import Run
from fastlth.tickets import theta0
from fastlth.training.available import device, engine, environment
from fastlth.training.engines import fleet, room, streams
from fastlth.training.engines.base import Member
from fastlth.training.engines.fleet import Fleet
from fastlth.training.engines.graph import GraphEngine
from fastlth.training.engines.make import make_engine
from fastlth.training.engines.streams import Streams
from fastlth.training.resolve import resolve

UNSUPPORTED = {"batched": fleet.unsupported, "streams": streams.unsupported}
GAIN = 1.05
"""by which replicates at once must be faster than one after the other"""
PROBE = 4
"""replicates that are timed at once"""
CALLS, STEPS = 7, 20
STREAMS = 8
"""streams at most: what more of them would bring has not been measured"""
Clock = Callable[[], float]


def check(recipe: Recipe) -> None:
    """Raises RecipeError where replicates of the recipe cannot be trained in the way it asks for."""
    asked = recipe.compute.together
    if asked in UNSUPPORTED and (reason := UNSUPPORTED[asked](recipe)):
        raise RecipeError(f"compute.together {asked} cannot train this: {reason}; use auto or alone")
    if asked in UNSUPPORTED and not _graphed(recipe):
        raise RecipeError(f"compute.together {asked} is the graph engine's, got --engine {recipe.compute.engine} on "
                          f"{device(recipe.compute.device)}; use --engine graph or compute.together auto")  # fmt: skip


def unfinished(directories: Sequence[Run]) -> list[int]:
    """The replicates that are still to be done."""
    return [r for r, d in enumerate(directories)
            if not (d.ticket_path.exists() and over(d.recipe, summary(d.ticket_path).rounds))]  # fmt: skip


def threads(directories: Sequence[Run], todo: Sequence[int], source: Source, resolved: Mapping[str, Any] | None) -> int:
    """How many replicates of ``todo`` run side by side, one thread each, or 1; settles what ``auto`` becomes if they
    do."""
    recipe = directories[0].recipe
    if len(todo) < 2 or recipe.compute.together == "alone":
        return 1
    if device(recipe.compute.device) != "cpu" or engine(recipe) in ("dense", "graph"):
        return 1
    if resolved is None and all(d.resolved is None for d in directories):
        first = directories[todo[0]]
        recipe = first.recipe
        narrow = _with_compute(recipe, threads=recipe.compute.threads or 1)
        choice = resolve(narrow, lambda candidate: make_engine(candidate, source))
        if choice.compute.engine == "sparse":
            first.write_recipe(recipe, {**choice.to_dict(), "environment": environment(choice.compute)})
    resolved = next((d.resolved for d in directories if d.resolved), resolved)
    if resolved is None or resolved["engine"] != "sparse":
        return 1
    return min(len(todo), max(1, cores() // int(resolved["threads"])))


def grouped(recipe: Recipe) -> bool:
    """Whether the graph engine may train replicates of the recipe at once."""
    return _graphed(recipe) and recipe.compute.together != "alone" and bool(_ways(recipe))


def groups(
    settled: Mapping[int, tuple[Run, ComputeSection]], source: Source, tell: Callable[[str], None]
) -> Iterator[dict[int, Member]]:
    """Engines of the replicates that are trained at once, by their number, one group after the other: as many at a time
    as are at the same step (one that was killed may be behind), were resolved alike, and as memory holds. Whoever is
    in no group is alone. ``settled`` has the run and what ``auto`` became of each replicate that is still to be done;
    ``tell`` gets what a person should know."""
    alike: dict[Any, list[int]] = {}
    for r, (directory, compute) in settled.items():
        ticket, state = directory.ticket(theta0), directory.state()
        at = len(ticket.rounds) if ticket else 0, state.info["progress"]["iteration"] if state else 0
        key = at, dataclasses.replace(compute, together="auto", kept={}), tuple(compute.kept.items())
        alike.setdefault(key, []).append(r)
    recipes = {r: dataclasses.replace(d.recipe, compute=compute) for r, (d, compute) in settled.items()}
    for same in alike.values():
        if len(same) == 1:
            continue
        way = _way([recipes[r] for r in same], source, tell)
        for directory, _ in (settled[r] for r in same):
            if (own := directory.resolved) is not None and own.get("together") != way:
                directory.write_recipe(directory.recipe, {**own, "together": way})
        if way != "alone":
            yield from _fitting(way, same, recipes, source, tell)


def _fitting(
    way: str, same: Sequence[int], recipes: Mapping[int, Recipe], source: Source, tell: Callable[[str], None]
) -> Iterator[dict[int, Member]]:
    where = recipes[same[0]].compute.device
    waiting = room.groups(same, _most(way, recipes[same[0]], source, len(same)))
    while waiting:
        group, made = waiting.pop(0), None
        gc.collect()  # the group before: its members and what they share know each other
        if len(group) == 1:
            continue
        try:
            made = _made(way, [recipes[r] for r in group], source)
        except torch.OutOfMemoryError:
            half = -(-len(group) // 2)
            waiting = room.groups(group, half) + waiting
            tell(f"{where} has not memory enough for {len(group)} replicates at once: {half} are trained at a time")
        if made is not None:
            yield dict(zip(group, made.members, strict=True))
    made = None
    gc.collect()  # who is trained alone needs the memory


def _graphed(recipe: Recipe) -> bool:
    """Whether the graph engine may train the recipe."""
    auto = recipe.compute.engine == "auto" and _on_cuda(device(recipe.compute.device))
    return auto or recipe.compute.engine == "graph"


def _on_cuda(where: str) -> bool:
    return where.startswith("cuda")


def _way(recipes: Sequence[Recipe], source: Source, tell: Callable[[str], None]) -> str:
    asked, where = recipes[0].compute.together, recipes[0].compute.device
    if recipes[0].compute.engine != "graph":
        if asked in UNSUPPORTED:
            tell(f"compute.together {asked} is the graph engine's, and the {recipes[0].compute.engine} engine is "
                 "faster here: replicates train one after the other; --engine graph insists")  # fmt: skip
        return "alone"
    if asked in UNSUPPORTED and (reason := UNSUPPORTED[asked](recipes[0])):
        tell(f"compute.together {asked} cannot train this: {reason}; replicates train one after the other")
        return "alone"
    if asked != "auto":
        return asked
    ways = _ways(recipes[0])
    if not _on_cuda(where):  # where a step of two takes as long as two
        return "batched" if "batched" in ways else "alone"
    rates = measured(recipes[:PROBE], source, ways)
    best = max(rates, key=lambda way: rates[way])
    return best if rates[best] > GAIN * rates["alone"] else "alone"


def measured(
    recipes: Sequence[Recipe], source: Source, ways: Sequence[str], clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Images/s of one replicate alone, and of ``recipes`` together in each way that finds memory."""
    rates = {}
    for way in ("alone", *ways):
        made: GraphEngine | Fleet | Streams | None = None  # and the one before is gone
        gc.collect()
        try:
            made = _single(recipes[0], source) if way == "alone" else _made(way, recipes, source)
        except torch.OutOfMemoryError:
            continue
        if made is not None:
            count = 1 if way == "alone" else len(recipes)
            rates[way] = count * recipes[0].train.batch_size / _seconds(made, recipes[0], clock)
    return {"alone": 0.0, **rates}


def _ways(recipe: Recipe) -> list[str]:
    asked = recipe.compute.together
    return [way for way, reason in UNSUPPORTED.items() if asked in ("auto", way) and not reason(recipe)]


def _made(way: str, recipes: Sequence[Recipe], source: Source) -> Fleet | Streams:
    return Fleet(recipes, source) if way == "batched" else Streams(recipes, source)


def _single(recipe: Recipe, source: Source) -> GraphEngine | None:
    made = make_engine(_with_compute(recipe, compact=0.0), source)
    return made if isinstance(made, GraphEngine) else None  # an engine that found no memory is the dense one


def _most(way: str, recipe: Recipe, source: Source, count: int) -> int:
    free = room.free(recipe.compute.device)
    if free is None:
        return count
    if way == "batched":
        return room.fits(recipe, source, free)
    return min(STREAMS, room.measured(lambda: _single(recipe, source), recipe.compute.device, free))


def _seconds(made: GraphEngine | Fleet | Streams, recipe: Recipe, clock: Clock) -> float:
    """Median of a step, of all replicates together."""
    steps, times = min(STEPS, recipe.evaluate.every, recipe.train.iterations), []
    for _ in range(CALLS):
        made.forget()
        began = clock()
        made.advance(0, steps)
        made.wait()
        times.append((clock() - began) / steps)
    return median(times[1:])


def _with_compute(recipe: Recipe, **changes: Any) -> Recipe:
    return dataclasses.replace(recipe, compute=dataclasses.replace(recipe.compute, **changes))
