"""Running a search for real: consumes the events of ``search.py``, keeps the run directory, can be stopped.

started run        -> its result, or it goes on from the last save
every safe point   -> a save when one is due, a stop when one was asked for
every round        -> metrics, search.ticket
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from fastlth import sinks, together
from fastlth.analysis import collapses, layer_records, net_units, replicate_overlap
from fastlth.composition import with_own
from fastlth.data.sources import Source, load_for
from fastlth.errors import DeviceError, RecipeError, Stopped
from fastlth.metrics import record
from fastlth.models import skeleton, weight_names
from fastlth.pruning import layer_rates
from fastlth.pruning.budget import one_shot_rate
from fastlth.pruning.criteria import SIGN_TESTS
from fastlth.recipe import ComputeSection, Recipe
from fastlth.saving import Saver
from fastlth.search import Event, InRound, RoundFinished, RoundStarted, Said, find_tickets, over, winning_round
from fastlth.side_by_side import side_by_side
from fastlth.store import ticket as tickets
from fastlth.store.metrics_file import MetricsFile
from fastlth.store.run import RECIPE, Run, parent_folder, run_folders
from fastlth.tickets import theta0
from fastlth.training import faults
from fastlth.training.engines.base import Engine, Member
from fastlth.training.engines.make import make_engine
from fastlth.training.kept import check as check_kept
from fastlth.training.parallel import lead
from fastlth.training.parallel import team as parallel
from fastlth.training.parallel.team import Team
from fastlth.training.resolve import device, engine, environment, kernels, loader, resolve
from fastlth.training.shifted import swap
from fastlth.training.trainer import ChunkDone


@dataclass(frozen=True)
class Started:
    """A search begins or goes on: what ``show`` gets before the first event."""

    path: Path
    recipe: Recipe
    compute: ComputeSection
    measured: Mapping[str, float]
    """images/s of the candidates that were timed to replace ``auto``"""
    rounds_done: int
    resumed: bool
    moved: str | None
    """what is not as it was when the run began, so that its bits may differ from here on"""
    replicate: tuple[int, int]
    """(this one, how many)"""


@dataclass(frozen=True)
class Notice:
    """Something a person should know; the search goes on."""

    text: str


Happening = Started | Notice | Event


@dataclass(frozen=True)
class Beside:
    """What happens to one of several replicates that run side by side."""

    replicate: int
    """its place among them, from 0"""
    seed: int
    event: Happening


Answer = TypeVar("Answer")
Settled = tuple[ComputeSection, str | None, Mapping[str, float]]
Tell = Callable[[Happening], None]
Show = Callable[[Happening | Beside], None]


@dataclass(frozen=True)
class Replicate:
    """One seed's finished search."""

    seed: int
    path: Path
    rounds: tuple[Mapping[str, Any], ...]

    @property
    def ticket(self) -> Path:
        """Its ticket file."""
        return self.path / "search.ticket"


@dataclass(frozen=True)
class Search:
    """The result of ``run``. With several replicates, ``rounds`` are their means."""

    recipe: Recipe
    replicates: tuple[Replicate, ...]

    @property
    def ticket(self) -> Path:
        """The first replicate's ticket file."""
        return self.replicates[0].ticket

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """Per round its result, as in ``find-ticket --json``: means where there are several replicates."""
        return _means([r.rounds for r in self.replicates])

    @property
    def winning_round(self) -> int | None:
        """The winning ticket's round, by the means of all replicates, or None."""
        return winning_round([r.rounds for r in self.replicates])

    @functools.cached_property
    def mask_overlap(self) -> list[dict[str, Any]]:
        """Per round, how far the masks of the replicates agree (docs/metrics.md), read from their tickets.

        Empty for one replicate. Raises TicketError where a ticket file has been damaged since.
        """
        if len(self.replicates) == 1:
            return []
        overlap = replicate_overlap([tickets.load(r.ticket, masks_only=True) for r in self.replicates])
        return overlap[: len(self.rounds)]

    def to_json(self) -> dict[str, Any]:
        """The document of ``find-ticket --json``."""
        document = {
            "run": str(self.replicates[0].path),
            "ticket": str(self.ticket),
            "recipe_digest": self.recipe.digest,
            "rounds": self.rounds,
            "winning_round": self.winning_round,
        }
        if len(self.replicates) > 1:
            document["replicates"] = [{"seed": r.seed, "rounds": [dict(x) for x in r.rounds]} for r in self.replicates]
            document["mask_overlap"] = self.mask_overlap
        return document


def run(
    recipe: Recipe, *, out: str | Path = "runs", data_dir: str | Path | None = None, replicates: int = 1,
    fresh: bool = False, log: Sequence[str] = (), show: Show = lambda _: None,
    stopped: Callable[[], int | None] = lambda: None, resolved: Mapping[str, Any] | None = None,
    model: str | Callable[..., Any] | None = None, data: str | Callable[..., Any] | None = None,
    team: Team | None = None,
) -> Search:  # fmt: skip
    """Find tickets, or go on where an earlier call with the same recipe stopped; like the command.

    Replicate r is the search of seed ``recipe.seeds.base + r``, with its own run directory; several are trained at
    once where that is faster (``together.py``). ``log`` names further
    places for the metrics, of ``sinks.SINKS``. ``stopped`` is asked at every safe point, twice a second or after each
    step where one takes longer; if it returns a signal number, the state is saved and Stopped is raised.
    ``resolved``, another run's, is what ``auto`` becomes where a run has not settled that yet. ``model`` and ``data``
    take the place of the recipe's: functions, or their names (docs/own-nets.md). ``team`` is what ``processes`` gives:
    with it they train each net together.
    """
    recipe = with_own(recipe, model, data)
    check(recipe, team)
    log = sinks.check(log)
    source = load_for(recipe.data, data_dir)
    seeds = [dataclasses.replace(recipe.seeds, base=recipe.seeds.base + r) for r in range(replicates)]
    with ExitStack() as opened:
        directories = [
            opened.enter_context(Run.open(Path(out), dataclasses.replace(recipe, seeds=s), fresh=fresh)) for s in seeds
        ]
        many = replicates > 1 and team is None
        workers = together.threads(directories, source, resolved) if many else 1

        settled: dict[int, Settled] = {}

        def task(r: int, member: Member | None, show: Tell, stopped: Callable[[], int | None]) -> Replicate:
            one = directories[r]

            def settle() -> Settled:
                others = next((d.resolved for d in directories if d.resolved), resolved)
                return settled.get(r) or _settle(one, one.recipe, source, others, team)

            with member or nullcontext():
                return _run_one(one, one.recipe, source, settle, (r, replicates), log, show, stopped, data_dir,
                                member, team)  # fmt: skip

        def beside(r: int, member: Member | None) -> Callable[[Tell, Callable[[], bool]], Replicate]:
            return lambda hand_on, failed: task(
                r, member, hand_on, lambda: stopped() or (signal.SIGTERM if failed() else None)
            )

        def leave(member: Member | None) -> None:
            with member or nullcontext():
                """Who never begins is not waited for."""

        def at_once(members: Mapping[int, Member | None], workers: int) -> dict[int, Replicate]:
            numbers = list(members)
            tasks = [beside(r, member) for r, member in members.items()]
            ended = side_by_side(tasks, workers=workers, left_out=lambda i: leave(members[numbers[i]]),
                                 show=lambda i, e: show(Beside(numbers[i], seeds[numbers[i]].base, e)))  # fmt: skip
            return dict(zip(numbers, ended, strict=True))

        done: dict[int, Replicate] = {}
        if workers > 1:
            done = at_once(dict.fromkeys(range(replicates)), workers)
        elif many and (todo := together.candidates(directories)):
            for r in todo:
                first = next((d.resolved for d in directories if d.resolved), resolved)
                settled[r] = _settle(directories[r], directories[r].recipe, source, first)
            runs = {r: (directories[r], compute) for r, (compute, _, _) in settled.items()}
            with faults.told(device(recipe.compute.device), lambda: "start the same command again"):
                for members in together.groups(runs, source, lambda text: show(Notice(text))):
                    done |= at_once(members, len(members))
                    members.clear()  # nothing may hold this group's memory when the next is made
        for r in range(replicates):
            if r not in done:
                done[r] = task(r, None, show, stopped)
        return Search(recipe, tuple(done[r] for r in range(replicates)))


def in_one_step(recipe: Recipe, density: float) -> Recipe:
    """``recipe`` with the rate at which its first pruning ends at or just below ``density``. Raises RecipeError."""
    if recipe.prune.criterion in SIGN_TESTS:
        raise RecipeError(f"criterion {recipe.prune.criterion} decides itself how many weights go and cannot prune to "
                          "a density; choose another one")  # fmt: skip
    model = skeleton(recipe)
    shapes = {n: tuple(model.get_parameter(n).shape) for n in weight_names(model)}
    rate = one_shot_rate(shapes, recipe.prune, density)
    return dataclasses.replace(recipe, prune=dataclasses.replace(recipe.prune, rate=rate))


@contextlib.contextmanager
def processes(data_dir: str | Path | None = None) -> Iterator[Team | None]:
    """The processes that torchrun started, None where it did not. The body runs in the first of them, which hands the
    team to ``run`` or ``resume``; in the others it does not run: they train along and leave by SystemExit."""
    with parallel.join() as team:
        if team is None:
            yield None
        elif team.rank == 0:
            with lead.leading(team):
                yield team
        else:
            lead.follow(team, lambda data: load_for(data, data_dir))
            raise SystemExit(0)


def check(recipe: Recipe, team: Team | None = None) -> None:
    """Everything that can be wrong with a recipe on this machine, before any file is touched.

    Raises RecipeError (a net that does not fit the images, contradictory rates, a loader that is not
    installed, an engine that cannot train it, gradients of convolutions that it has not) or DeviceError.
    """
    layer_rates(weight_names(skeleton(recipe)), recipe.prune)
    if team is not None:
        parallel.check(recipe, team.size)
    device(recipe.compute.device)
    loader(recipe.compute.loader, recipe)
    kernels(recipe.compute.kernels, device(recipe.compute.device))
    engine(recipe)
    swap(skeleton(recipe), recipe.compute.shifted)
    check_kept(recipe)
    together.check(recipe)


def prepare(recipe: Recipe, *, out: str | Path = "runs", data_dir: str | Path | None = None) -> Path:
    """The run directory of a recipe and its seed, made without training anything if it is not there.

    It holds the recipe and what ``auto`` became; a search goes on from there. Raises as ``run`` does.
    """
    check(recipe)
    folders = run_folders(parent_folder(Path(out), recipe))
    numbers = [number for seed, number in folders if seed == recipe.seeds.base]
    if numbers and ((path := folders[recipe.seeds.base, max(numbers)]) / RECIPE).exists():
        return path
    source = load_for(recipe.data, data_dir)
    with Run.open(Path(out), recipe) as directory:
        _settle(directory, recipe, source, None)
        return directory.path


def resume(
    path: str | Path, *, data_dir: str | Path | None = None, log: Sequence[str] = (), show: Show = lambda _: None,
    stopped: Callable[[], int | None] = lambda: None, team: Team | None = None,
) -> Search:  # fmt: skip
    """Go on with the search in the run directory ``path``, with the recipe it holds.

    ``log`` as in ``run``: a run does not remember it, since it is about who looks on, not about the search.
    """
    log = sinks.check(log)
    with Run.reopen(Path(path)) as directory:
        recipe = directory.recipe
        source = load_for(recipe.data, data_dir)
        if team is not None:
            parallel.check(recipe, team.size)
        one = _run_one(directory, recipe, source, lambda: _settle(directory, recipe, source, None, team), (0, 1), log,
                       show, stopped, data_dir, None, team)  # fmt: skip
        return Search(recipe, (one,))


def _run_one(
    directory: Run, recipe: Recipe, source: Source, settle: Callable[[], Settled], replicate: tuple[int, int],
    log: Sequence[str], show: Tell, stopped: Callable[[], int | None], data_dir: str | Path | None,
    member: Member | None = None, team: Team | None = None,
) -> Replicate:  # fmt: skip
    ticket, state = directory.ticket(theta0), directory.state()
    rounds = ticket.rounds if ticket else ()
    if over(recipe, rounds):
        if state is None:
            directory.drop_state()  # killed after the last round was saved, before its state was removed
        return Replicate(recipe.seeds.base, directory.path, tuple(rounds[: recipe.prune.rounds + 1]))
    compute, moved, measured = settle()
    compute = dataclasses.replace(compute, together=(directory.resolved or {}).get("together", compute.together))
    made: Engine | None = (
        member if team is None else lead.LeadingEngine(team, dataclasses.replace(recipe, compute=compute), source)
    )
    show(Started(directory.path, recipe, compute, measured, len(rounds), bool(ticket or state), moved, replicate))
    with (
        MetricsFile(directory.metrics_path) as metrics,
        sinks.Sinks(log, directory.path, recipe, lambda text: show(Notice(text))) as others,
        Saver(directory, recipe, metrics) as saver,
        faults.told(compute.device, lambda: f"what was saved is kept; go on with: "
                                            f"{_resume_command(directory, data_dir, log)}"),
    ):  # fmt: skip
        metrics.cut(int(state.info["metrics_bytes"]) if state else ticket.metrics_bytes if ticket else 0)
        collapsed: set[str] = set()
        agreed = member.in_step.agreed if member else _alone
        for event in find_tickets(recipe, source, compute, ticket=ticket, state=state, engine=made):
            if line := record(event):
                metrics.write(line)
                others.write(line)
            show(Notice(event.text) if isinstance(event, Said) else event)
            if isinstance(event, RoundStarted) and ticket:
                found = collapses(net_units(recipe, ticket.mask(event.round)))
                for layer in sorted(found.keys() - collapsed):  # once, not in every round from here on
                    show(Notice(f"warning: in round {event.round} {layer} {found[layer]}"))
                collapsed |= found.keys()
            if isinstance(event, InRound) and isinstance(event.event, ChunkDone):
                place = event.round, event.event.iteration
                if number := agreed(place, "stop", stopped):
                    saver.state(event)
                    one = " (this replicate; the same command as before: all)" if replicate[1] > 1 else ""
                    command = _resume_command(directory, data_dir, log)
                    raise Stopped(f"stopped and saved; go on with{one}: {command}", number)
                if agreed(place, "save", saver.due):
                    saver.state(event)
            elif isinstance(event, RoundFinished):
                ticket, k = event.ticket, event.round
                before = ticket.rewind if k or not ticket.rewind_iteration else theta0(recipe)
                previous = ticket.mask(k - 1) if k else None
                for line in layer_records(recipe, k, ticket.mask(k), previous, before, event.trained()):
                    metrics.write(line)
                saver.round(event)
                rounds = ticket.rounds
    return Replicate(recipe.seeds.base, directory.path, tuple(rounds))


def _alone(_place: tuple[int, int], _question: str, ask: Callable[[], Answer]) -> Answer:
    """A replicate that need not agree with others."""
    return ask()


def _resume_command(directory: Run, data_dir: str | Path | None, log: Sequence[str]) -> str:
    """To be pasted into a shell; the recipe knows neither where the data lie nor who looks on."""
    where = ["--data-dir", str(data_dir)] if data_dir else []
    logs = [word for name in log for word in ("--log", name)]
    return shlex.join(["fastlth", "resume", str(directory.path), *where, *logs])


def _settle(
    directory: Run, recipe: Recipe, source: Source, resolved: Mapping[str, Any] | None, team: Team | None = None
) -> Settled:
    """The compute section of this run: as it was resolved at its first start, else as ``resolved`` says, else resolved
    now; written down. With what is not as it was then, and the images/s that were measured."""
    kept: Mapping[str, Any] | None = None
    moved: str | None = None
    for before in (directory.resolved, resolved):
        if before is None or kept is not None:
            continue
        names = [f.name for f in dataclasses.fields(ComputeSection) if f.name in before]
        compute = ComputeSection(**{name: before[name] for name in names})
        try:
            device(compute.device)
            engine(dataclasses.replace(recipe, compute=compute))
            kept = before
        except DeviceError:
            moved = moved or f"{compute.device} is not there any more"
        except RecipeError as error:
            moved = moved or str(error)
    shared = kept is None or (compute.engine, compute.compile, compute.kept) == ("dense", "off", {})
    if team is not None and not shared:
        kept, moved = None, f"{team.size} processes train it, by the dense engine"
    measured: Mapping[str, float] = {}
    if kept is None:
        asked = recipe if team is None else parallel.narrowed(recipe)
        choice = resolve(asked, lambda candidate: make_engine(candidate, source))
        compute, measured = choice.compute, choice.images_per_second
        kept = choice.to_dict()
    here = environment(compute) | ({} if team is None else {"processes": str(team.size)})
    there = kept.get("environment", here)
    if there != here and moved is None:
        now, then = ({"processes": "1", **e} for e in (here, there))
        moved = ", ".join(f"{k} {then.get(k)} -> {now.get(k)}" for k in now | then if then.get(k) != now.get(k))
    if directory.resolved is None or moved:
        log = [*(directory.resolved or kept).get("moved", []), *([moved] if moved else [])]
        directory.write_recipe(recipe, {**kept, "environment": here, **({"moved": log} if log else {})})
    return compute, moved, measured


def _means(replicates: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    if len(replicates) == 1:
        return [dict(r) for r in replicates[0]]
    return [
        {k: fmean(r[k] for r in same) if isinstance(v, int | float) and k != "round" else v for k, v in same[0].items()}
        for same in zip(*replicates, strict=False)
    ]
