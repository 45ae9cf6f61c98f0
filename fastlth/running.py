"""Running a search for real: consumes the events of ``search.py``, keeps the run directory, can be stopped.

started run        -> its result, or it goes on from the last save
every safe point   -> a save when one is due, a stop when one was asked for
every round        -> metrics, search.ticket
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastlth import sinks, together
from fastlth.analysis import collapses, layer_records, net_units
from fastlth.composition import Composed, with_own
from fastlth.data.sources import Source, load_for
from fastlth.errors import RecipeError, Stopped
from fastlth.happenings import Beside, Happening, Notice, Show, Started, Tell
from fastlth.metrics import record
from fastlth.models import skeleton, weight_names
from fastlth.pruning import layer_rates
from fastlth.pruning.budget import one_shot_rate
from fastlth.pruning.criteria import SIGN_TESTS
from fastlth.recipe import Recipe
from fastlth.results import Replicate, Search
from fastlth.saving import Saver
from fastlth.search import InRound, RoundFinished, RoundStarted, Said, asked, find_tickets, over
from fastlth.settling import Settled, settle
from fastlth.side_by_side import side_by_side
from fastlth.store.metrics_file import MetricsFile
from fastlth.store.run import RECIPE, Run, parent_folder, run_folders
from fastlth.tickets import theta0
from fastlth.training import faults
from fastlth.training.available import device, engine, kernels, loader
from fastlth.training.engines.base import Engine, Member
from fastlth.training.kept import check as check_kept
from fastlth.training.parallel import lead
from fastlth.training.parallel import team as parallel
from fastlth.training.parallel.team import Team
from fastlth.training.shifted import swap
from fastlth.training.trainer import ChunkDone

Answer = TypeVar("Answer")


def run(
    recipe: Recipe | Composed, *, out: str | Path = "runs", data_dir: str | Path | None = None, replicates: int = 1,
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
    if isinstance(recipe, Composed):
        recipe = recipe.recipe
    recipe = with_own(recipe, model, data)
    check(recipe, team)
    members = _replicates(recipe, replicates)
    log = sinks.check(log)
    source = load_for(recipe.data, data_dir)
    with ExitStack() as opened:
        directories = [opened.enter_context(Run.open(Path(out), member, fresh=fresh)) for member in members]
        searches = _Searches(directories, source, resolved, log, show, stopped, data_dir, team)
        found = Search(recipe, tuple(searches.all()))
        found.save_overlap()
        return found


def _replicates(recipe: Recipe, count: int) -> list[Recipe]:
    if recipe.seeds.base + count > 2**32:
        raise RecipeError(f"{count} replicates from seed {recipe.seeds.base} on need seeds up to "
                          f"{recipe.seeds.base + count - 1}; the last is 2**32 - 1; give a lower --seed")  # fmt: skip
    return [recipe.replicate(r) for r in range(count)]


@dataclass
class _Searches:
    """The replicates of a search, at once or one after the other."""

    directories: Sequence[Run]
    source: Source
    resolved: Mapping[str, Any] | None
    log: Sequence[str]
    show: Show
    stopped: Callable[[], int | None]
    data_dir: str | Path | None
    team: Team | None
    settled: dict[int, Settled] = field(default_factory=dict)

    def all(self) -> list[Replicate]:
        """Their results, in order."""
        done: dict[int, Replicate] = {}
        todo = together.unfinished(self.directories)
        if len(todo) > 1 and self.team is None:
            if (workers := together.threads(self.directories, todo, self.source, self.resolved)) > 1:
                done = self._at_once(dict.fromkeys(todo), workers, len(todo))
            elif together.grouped(self.directories[0].recipe):
                done = self._in_groups(todo)
        for r in range(len(self.directories)):
            if r not in done:
                done[r] = self._one(r, None, self.show, self.stopped)
        return [done[r] for r in sorted(done)]

    def _in_groups(self, todo: Sequence[int]) -> dict[int, Replicate]:
        """Of those that the graph engine trains at once."""
        done: dict[int, Replicate] = {}
        for r in todo:  # before the first begins, since a GPU is timed for one of them at a time
            self.settled[r] = self._settle(r)
        runs = {r: (self.directories[r], compute) for r, (compute, _, _) in self.settled.items()}
        where = device(self.directories[0].recipe.compute.device)
        with faults.told(where, lambda: "start the same command again"):
            for members in together.groups(runs, self.source, lambda text: self.show(Notice(text))):
                done |= self._at_once(members, len(members), len(todo))
                members.clear()  # nothing may hold this group's memory when the next is made
        return done

    def _at_once(self, members: Mapping[int, Member | None], workers: int, of: int) -> dict[int, Replicate]:
        numbers = list(members)

        def beside(r: int) -> Callable[[Tell, Callable[[], bool]], Replicate]:
            return lambda hand_on, failed: self._one(
                r, members[r], hand_on, lambda: self.stopped() or (signal.SIGTERM if failed() else None)
            )

        def show(i: int, event: Happening) -> None:
            self.show(Beside(numbers[i], self.directories[numbers[i]].recipe.seeds.base, of, event))

        def leave(i: int) -> None:  # who never begins is not waited for
            if (member := members[numbers[i]]) is not None:
                member.__exit__()

        tasks = [beside(r) for r in numbers]
        ended = side_by_side(tasks, workers=workers, show=show, left_out=leave)
        return dict(zip(numbers, ended, strict=True))

    def _one(self, r: int, member: Member | None, show: Tell, stopped: Callable[[], int | None]) -> Replicate:
        with member or nullcontext():
            return self._search(r, member, show, stopped)

    def _search(self, r: int, member: Member | None, show: Tell, stopped: Callable[[], int | None]) -> Replicate:
        """One replicate, by the engine ``member`` or by one of its own."""
        directory, recipe = self.directories[r], self.directories[r].recipe
        ticket, state = directory.ticket(theta0), directory.state()
        rounds = ticket.rounds if ticket else ()
        if over(recipe, rounds):
            if state is None:
                directory.drop_state()  # killed after the last round was saved, before its state was removed
            return Replicate(recipe.seeds.base, directory.path, tuple(asked(recipe, rounds)))
        compute, moved, measured = self.settled.get(r) or self._settle(r)
        compute = dataclasses.replace(compute, together=(directory.resolved or {}).get("together", compute.together))
        made: Engine | None = member
        if self.team is not None:
            made = lead.LeadingEngine(self.team, dataclasses.replace(recipe, compute=compute), self.source)
        at = int(state.info["progress"]["iteration"]) if state else 0
        show(Started(directory.path, recipe, compute, measured, len(rounds), at, bool(ticket or state), moved,
                     (r, len(self.directories))))  # fmt: skip
        with (
            MetricsFile(directory.metrics_path) as metrics,
            sinks.Sinks(self.log, directory.path, recipe, lambda text: show(Notice(text))) as others,
            Saver(directory, recipe, metrics) as saver,
            faults.told(compute.device, lambda: f"what was saved is kept; go on with: "
                                                f"{_resume_command(directory, self.data_dir, self.log)}"),
        ):  # fmt: skip
            metrics.cut(int(state.info["metrics_bytes"]) if state else ticket.metrics_bytes if ticket else 0)
            collapsed: set[str] = set()
            agreed = member.in_step.agreed if member else _alone
            for event in find_tickets(recipe, self.source, compute, ticket=ticket, state=state, engine=made):
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
                        one = " (this replicate; the same command as before: all)" if len(self.directories) > 1 else ""
                        command = _resume_command(directory, self.data_dir, self.log)
                        raise Stopped(f"stopped and saved; go on with{one}: {command}", number)
                    if agreed(place, "save", saver.due):
                        saver.state(event)
                elif isinstance(event, RoundFinished):
                    ticket, rounds = event.ticket, event.ticket.rounds
                    for about in _of_layers(recipe, event):
                        metrics.write(about)
                    saver.round(event)
        return Replicate(recipe.seeds.base, directory.path, tuple(rounds))

    def _settle(self, r: int) -> Settled:
        others = next((d.resolved for d in self.directories if d.resolved), self.resolved)
        return settle(self.directories[r], self.directories[r].recipe, self.source, others, self.team)


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
        settle(directory, recipe, source, None)
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
        return Search(recipe, tuple(_Searches([directory], source, None, log, show, stopped, data_dir, team).all()))


def _of_layers(recipe: Recipe, event: RoundFinished) -> Iterable[Mapping[str, Any]]:
    """A line for each layer of a round that ended."""
    ticket, k = event.ticket, event.round
    before = ticket.rewind if k or not ticket.rewind_iteration else theta0(recipe)
    previous = ticket.mask(k - 1) if k else None
    return layer_records(recipe, k, ticket.mask(k), previous, before, event.trained())


def _alone(_place: tuple[int, int], _question: str, ask: Callable[[], Answer]) -> Answer:
    """A replicate that need not agree with others."""
    return ask()


def _resume_command(directory: Run, data_dir: str | Path | None, log: Sequence[str]) -> str:
    """To be pasted into a shell; the recipe knows neither where the data lie nor who looks on."""
    where = ["--data-dir", str(data_dir)] if data_dir else []
    logs = [word for name in log for word in ("--log", name)]
    return shlex.join(["fastlth", "resume", str(directory.path), *where, *logs])
