"""One search per rewind point (Frankle et al. 2020, "Linear mode connectivity", search over k).

Round 0 is the same training whatever round 1 will rewind to. Where that holds bit for bit, it is made once: the other
searches begin with its result, its mask and its lines of metrics.jsonl, and only make the first k steps again, which
give their theta_k. It holds on a CPU, where bits are reproducible, for the criterion large_final, which does not look
at the values a round began with, and where round 0 was made on this machine with these versions. Elsewhere every
search trains its own dense round.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastlth import copies
from fastlth import masks as mask_tools
from fastlth.data.sources import Source, load_for
from fastlth.errors import Stopped
from fastlth.experiments.settled import compute_of
from fastlth.happenings import Show
from fastlth.recipe import Recipe
from fastlth.results import Search
from fastlth.running import check, run
from fastlth.store import ticket as tickets
from fastlth.store.metrics_file import MetricsFile
from fastlth.store.run import METRICS, RECIPE, Run, read_recipe
from fastlth.tickets import theta0
from fastlth.training.available import environment
from fastlth.training.engines.base import Engine
from fastlth.training.engines.make import make_engine
from fastlth.training.parallel.team import Team
from fastlth.training.trainer import ChunkDone, Progress, train

Stop = Callable[[], int | None]


def search_rewind_points(
    recipes: Sequence[Recipe], *, out: str | Path = "runs", data_dir: str | Path | None = None, replicates: int = 1,
    fresh: bool = False, log: Sequence[str] = (), show: Show = lambda _: None, stopped: Stop = lambda: None,
    team: Team | None = None,
) -> list[Search]:  # fmt: skip
    """The searches of ``recipes``, which differ in ``prune.rewind_to`` alone, each in its own run directory.

    Arguments are those of ``running.run``; what ``auto`` becomes is decided by the first search, for all. Raises
    Stopped with a sentence that says where.
    """
    for recipe in recipes:
        check(recipe, team)
    options: dict[str, Any] = {"out": out, "data_dir": data_dir, "replicates": replicates, "log": log, "show": show,
                               "team": team}  # fmt: skip
    done: list[Search] = []
    try:
        for recipe in recipes:
            resolved = read_recipe(done[0].replicates[0].path / RECIPE)[1] if done else None
            shared = bool(done) and _same_dense_round(recipe, [r.path for r in done[0].replicates])
            if shared:
                source = load_for(recipe.data, data_dir)
                for replicate in done[0].replicates:
                    seeds = dataclasses.replace(recipe.seeds, base=replicate.seed)
                    one = dataclasses.replace(recipe, seeds=seeds)
                    with Run.open(Path(out), one, fresh=fresh) as directory:
                        _begin_after_dense_round(directory, one, replicate.path, source, stopped)
            done.append(run(recipe, fresh=fresh and not shared, stopped=stopped, resolved=resolved, **options))
    except Stopped as stop:
        if len(recipes) == 1:
            raise
        where = f"rewind point {len(done) + 1} of {len(recipes)}; the same command as before: all"
        raise Stopped(f"{stop} ({where})", stop.exit_code - 128) from None
    return done


def _same_dense_round(recipe: Recipe, donors: Sequence[Path]) -> bool:
    """Whether round 0 of ``recipe`` is, bit for bit, the one that the runs in ``donors`` have made."""
    prune = recipe.prune
    plain = prune.criterion == "large_final" and prune.rewinds and not prune.early_bird
    if not plain or recipe.store.keep_weights != "none":
        return False
    for donor in donors:
        _, resolved = read_recipe(donor / RECIPE)
        compute = compute_of(resolved)
        if compute.device != "cpu" or "moved" in resolved or resolved.get("environment") != environment(compute):
            return False
    return True


def _begin_after_dense_round(directory: Run, recipe: Recipe, donor: Path, source: Source, stopped: Stop) -> None:
    """Make a run that has not begun one whose round 0 is done."""
    if directory.resolved is not None:
        return
    _, resolved = read_recipe(donor / RECIPE)
    theirs = tickets.load(donor / "search.ticket", theta0)
    engine = make_engine(dataclasses.replace(recipe, compute=compute_of(resolved)), source)
    mine = dataclasses.replace(
        theirs, recipe=recipe, resolved=resolved, rewind=_theta(engine, recipe, theirs.pruned_at, stopped),
        rewind_iteration=recipe.prune.rewind_to,
        pruned_at={n: (at == 1).astype(np.uint8) for n, at in theirs.pruned_at.items()}, rounds=theirs.rounds[:1],
        theta0_seed=None,
    )  # fmt: skip
    directory.write_recipe(recipe, resolved)
    with MetricsFile(directory.metrics_path) as metrics:
        for line in (donor / METRICS).read_text().splitlines():
            if (values := json.loads(line))["round"] == 0:
                metrics.write(values)
        metrics.sync()
        directory.save_ticket(dataclasses.replace(mine, metrics_bytes=metrics.bytes))


def _theta(engine: Engine, recipe: Recipe, prunable: Iterable[str], stopped: Stop) -> Mapping[str, Any]:
    """theta_k: every parameter and buffer after the first k steps of round 0, as ``find_tickets`` makes them."""
    k, start = recipe.prune.rewind_to, {n: t.detach().clone() for n, t in engine.weights().items()}
    engine.set_masks(mask_tools.full({n: start[n] for n in prunable}))
    engine.rewind(start)
    for event in train(engine, recipe, Progress(0), pause_at=k) if k else ():
        if number := stopped():
            raise Stopped(f"stopped ({signal.Signals(number).name}) while making theta_{k} again", number)
        if event == ChunkDone(k):
            break
    return copies.arrays(engine.weights())
