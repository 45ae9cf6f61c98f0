"""Control runs on a finished search (docs/branches.md): what each kind of branch starts from.

RUN/branches/<kind>-<digest8>/branch.toml             kind and options
RUN/branches/<kind>-<digest8>/recipe.toml             the recipe of its trainings, and what auto became
RUN/branches/<kind>-<digest8>/round-<k>/trial-<t>/    one training (trial.py); round-1 with a density
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from fastlth import toml
from fastlth.composition import adjust, without_effect
from fastlth.errors import RecipeError, TicketError
from fastlth.experiments.at_init import check_images, masks_at_init, shares_at_init
from fastlth.experiments.control import Control
from fastlth.experiments.trial import Show, Start, Stop, Trial
from fastlth.experiments.workbench import MASKS, NOISE, VALUES, Workbench, branch_name, draw_key, plain
from fastlth.masks import Masks
from fastlth.pruning import budget, prune
from fastlth.pruning.criteria import SIGN_TESTS
from fastlth.recipe import PruneSection, Recipe
from fastlth.search import winning_or_last
from fastlth.store import atomic
from fastlth.training.engines.base import Engine
from fastlth.training.engines.make import make_engine, make_splits
from fastlth.training.gradients import gradients
from fastlth.training.schedule import lr_at


@dataclass(frozen=True)
class Branch:
    """What a branch found: one result per round and trial, in the form of ``find-ticket --json``."""

    run: Path
    folder: Path
    control: Control
    recipe: Recipe
    trials: tuple[Mapping[str, Any], ...]

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """One entry per round, numbers as means over its trials."""
        found = []
        for k in dict.fromkeys(t["round"] for t in self.trials):
            same = [t for t in self.trials if t["round"] == k]
            entry = {
                n: fmean(t[n] for t in same) if isinstance(v, int | float) and len(same) > 1 and n != "round" else v
                for n, v in same[0].items()
                if n != "trial"
            }
            found.append({**entry, "trials": len(same)})
        return found

    def to_json(self) -> dict[str, Any]:
        """The document of ``branch --json``."""
        return {
            "run": str(self.run),
            "branch": str(self.folder),
            **self.control.options(),
            "recipe_digest": self.recipe.digest,
            "rounds": self.rounds,
            "trials": [dict(t) for t in self.trials],
        }


def branch(
    run: str | Path, control: Control, *, rounds: Sequence[int] | str | None = None, trials: int | None = None,
    settings: Mapping[str, Any] | None = None, data_dir: str | Path | None = None,
    show: Show = lambda _: None, stopped: Stop = lambda: None,
) -> Branch:  # fmt: skip
    """Train the control on the given rounds' masks, or go on where an earlier call stopped.

    ``rounds`` are numbers, "all" (every pruned round), or the winning ticket's (the last one's if there is none) where
    not given; with ``control.density`` there are none. ``settings`` change the recipe of the control's trainings, not
    its data. ``stopped`` is asked at every safe point; if it returns a signal number, the state is saved and
    Stopped is raised. Raises RecipeError for what contradicts itself, TicketError for a run that cannot be used.
    """
    bench = Workbench(Path(run), data_dir, show, stopped)
    count = control.trials(trials)
    changed = _changed(bench.recipe, settings or {}, control)
    recipe, first = _schedule(control, changed)
    which = _rounds(bench, control, rounds)
    folder, digest = bench.folder(control, recipe)
    work = _Work(bench, control, recipe, first, folder, digest)
    work.check(which)
    for note in without_effect(settings or {}, changed):
        show(note)
    results = [work.train(k, t) for k in which for t in range(count)]
    return Branch(bench.path, folder, control, recipe, tuple(results))


def planned(recipe: Recipe, control: Control) -> tuple[Recipe, str]:
    """The recipe of the trainings of a search's branch, and the branch's folder in RUN/branches, before it is there."""
    bare = dataclasses.replace(recipe, prune=plain(recipe.prune))
    trained = _schedule(control, bare)[0]
    return trained, branch_name(control.kind, control.digest(trained.digest))


class _Work:
    """One branch: what round k, trial t starts from."""

    def __init__(
        self, bench: Workbench, control: Control, recipe: Recipe, first: int, folder: Path, digest: str
    ) -> None:
        self._bench, self._control, self._recipe, self._first = bench, control, recipe, first
        self._folder, self._digest = folder, digest
        self._ready: tuple[Recipe, Engine] | None = None
        """the recipe without ``auto``, and its engine"""

    def check(self, rounds: Iterable[int]) -> None:
        """Raise RecipeError, before anything is trained or written, where what is asked for cannot be had."""
        kind, density = self._control.kind, self._control.density
        for round in rounds:
            if kind == "one-shot" or (kind in ("finetune", "lr-rewind") and density is not None):
                self._one_shot_rate(round)
            elif kind == "random-prune":
                self._random_shares(round)
            elif kind == "prune-at-init":
                shares_at_init(self._bench, self._control, self._recipe, self._target(round))
                check_images(self._recipe, self._control)

    def train(self, round: int, trial: int = 0) -> dict[str, Any]:
        """The result of one training, made only where it is not there yet."""
        job = Trial(self._folder, self._digest, round, trial)
        if done := job.result():
            return done
        chained = self._control.chains
        if chained and round > 1:
            self.train(round - 1)
        recipe, engine = self._settled()
        result = job.run(recipe, engine, lambda: self._start(round, trial), keep=chained,
                         show=self._bench.show, stopped=self._bench.stopped)  # fmt: skip
        if chained and round > 1:
            Trial(self._folder, self._digest, round - 1).drop_trained()
        return result

    def _settled(self) -> tuple[Recipe, Engine]:
        if self._ready is None:
            recipe = self._bench.settle(self._recipe, self._folder)
            self._ready = recipe, make_engine(recipe, self._bench.source)
            atomic.write(self._folder / "branch.toml", toml.dumps({"branch": self._control.options()}).encode())
        return self._ready

    def _start(self, round: int, trial: int) -> Start:
        bench, control = self._bench, self._control
        match control.kind:
            case "random-reinit":
                return self._reset(bench.finished().mask(round), round, trial, fresh=True)
            case "noise":
                begin = self._reset(bench.finished().mask(round), round, trial, fresh=False)
                key = draw_key(self._recipe.seeds, NOISE, round, trial)
                assert control.sigma is not None
                return dataclasses.replace(begin, values=bench.noisy(begin.values, control.sigma, key))
            case "random-prune":
                return self._reset(self._random(round, trial), round, trial, fresh=control.reinit)
            case "one-shot":
                return self._reset(self._cut(round, bench.dense()), round, trial, fresh=control.reinit)
            case "continued":
                return self._reset(self._without_reset(round), round, trial, fresh=False)
            case "prune-at-init":
                theta0 = bench.theta0()
                key = draw_key(self._recipe.seeds, MASKS, round, trial)
                return Start(masks_at_init(bench, control, self._recipe, self._target(round), theta0, key), theta0, 0)
        before = bench.dense() if round == 1 or not control.chains else self._trained(round - 1)
        masks = self._pruned(round, before) if control.chains else self._cut(round, before)
        return Start(masks, before, self._first)

    def _reset(self, masks: Masks, round: int, trial: int, *, fresh: bool) -> Start:
        """Kept weights at their rewind values; a fresh draw has no early training and starts with iteration 0."""
        bench = self._bench
        if fresh:
            return Start(masks, bench.fresh(draw_key(self._recipe.seeds, VALUES, round, trial)), 0)
        ticket = bench.finished()
        return Start(masks, ticket.rewind(), ticket.file.rewind_iteration)

    def _random(self, round: int, trial: int) -> Masks:
        bench, shares = self._bench, self._random_shares(round)
        return budget.random_masks(bench.prunable, shares, numbers=bench.numbers, round=round,
                                   key=draw_key(self._recipe.seeds, MASKS, round, trial))  # fmt: skip

    def _random_shares(self, round: int) -> budget.Budget:
        bench, strategy = self._bench, self._control.strategy or "layer"
        kept = self._target(round)
        if isinstance(kept, float):
            return budget.of_density(strategy, bench.shapes, self._recipe.prune, kept)
        if strategy == "layer":
            return budget.of_masks(kept)
        return budget.of_total(strategy, bench.prunable, sum(int(m.sum()) for m in kept.values()))

    def _target(self, round: int) -> float | Masks:
        """A density, or the masks whose counts are wanted."""
        if self._control.density is not None:
            return self._control.density
        return self._bench.finished().mask(round)

    def _cut(self, round: int, trained: Mapping[str, Tensor]) -> Masks:
        """The dense trained net pruned in one step, to the density asked for or to the round's."""
        section = dataclasses.replace(self._recipe.prune, rate=self._one_shot_rate(round))
        return self._prune(section, self._bench.full_masks(), trained, 1)

    def _one_shot_rate(self, round: int) -> float:
        section = self._recipe.prune
        if section.criterion in SIGN_TESTS:
            raise RecipeError(f"criterion {section.criterion} decides itself how many weights go and cannot prune to "
                              "a density; use a search with another criterion")  # fmt: skip
        bench, density = self._bench, self._control.density
        if density is not None:
            return budget.one_shot_rate(bench.shapes, section, density)
        sizes = {n: math.prod(shape) for n, shape in bench.shapes.items()}
        pruned = sum(int((~m).sum()) for m in bench.finished().mask(round).values())
        return budget.one_shot_rate(bench.shapes, section, 1 - Fraction(pruned, sum(sizes.values())))

    def _pruned(self, round: int, trained: Mapping[str, Tensor]) -> Masks:
        """Round ``round`` of a chain: its masks so far, pruned by the weights that training left."""
        before = self._masks(round - 1)
        return self._prune(self._recipe.prune, before, trained, round)

    def _prune(self, section: PruneSection, masks: Masks, trained: Mapping[str, Tensor], round: int) -> Masks:
        initial = self._bench.finished().rewind()  # w_i of the criteria that look at it
        recipe, source = self._settled()[0], self._bench.source
        return prune(section, masks, initial, trained, numbers=self._bench.numbers, round=round,
                     key=recipe.seeds.key("prune"),
                     gradients=lambda: gradients(recipe, make_splits(recipe, source)["train"], initial))  # fmt: skip

    def _masks(self, round: int) -> Masks:
        if round == 0:
            return self._bench.full_masks()
        return Trial(self._folder, self._digest, round).masks(self._bench.prunable)

    def _trained(self, round: int) -> dict[str, Tensor]:
        return Trial(self._folder, self._digest, round).trained(self._masks(round))

    def _without_reset(self, round: int) -> Masks:
        """Frankle & Carbin 2019, appendix B, strategy 2: train, prune, train on, prune. Training on with the schedule
        as from the start is lr-rewind, whose files are used."""
        chain = Control(kind="lr-rewind")
        work = _Work(self._bench, chain, self._recipe, 0, *self._bench.folder(chain, self._recipe))
        if Trial(work._folder, work._digest, round).result():
            return work._masks(round)
        if round > 1:
            work.train(round - 1)
        return work._pruned(round, work._trained(round - 1) if round > 1 else self._bench.dense())


def _schedule(control: Control, recipe: Recipe) -> tuple[Recipe, int]:
    """The recipe of the trainings, and the iteration at which one that keeps trained weights begins.

    Fine-tuning goes on where training ended: the learning rate stays what it was at the last step, also where the
    schedule was to go on, and so do the epochs' numbers.
    A rewound schedule begins as many steps before its end as were asked for (Renda et al. 2020, section 2).
    """
    length = recipe.train.iterations
    steps = control.iterations or length
    if control.kind == "finetune":
        held = _held(recipe)
        return dataclasses.replace(held, train=dataclasses.replace(held.train, iterations=length + steps)), length
    if steps > length:
        raise RecipeError(f"--iterations must be at most the schedule's {length}, got {steps}")
    return recipe, length - steps


def _held(recipe: Recipe) -> Recipe:
    """``recipe`` with a learning rate that stays, after the last iteration, what it was there."""
    train, schedule, last = recipe.train, recipe.schedule, recipe.train.iterations - 1
    if schedule.warmup > last:
        train = dataclasses.replace(train, lr=lr_at(last, train.lr, schedule))
        schedule = dataclasses.replace(schedule, warmup=0, milestones=())
    reached = tuple(m for m in schedule.milestones if m <= last)
    return dataclasses.replace(recipe, train=train, schedule=dataclasses.replace(schedule, milestones=reached))


def _changed(recipe: Recipe, settings: Mapping[str, Any], control: Control) -> Recipe:
    for name in settings:
        shared = name in ("seeds.base", "seeds.init", "seeds.split", "seeds.prune")
        if shared or name.split(".")[0] in ("model", "data", "prune", "store"):
            raise RecipeError(f"{name} belongs to the search and its controls share it; search again with another one")
    if not control.from_start:
        return adjust(recipe, settings)
    changed = adjust(_rewinding_to(0, recipe), settings)  # may be shorter than the rewind point, which it never meets
    late = recipe.prune.rewind_to
    return _rewinding_to(late, changed) if late < changed.train.iterations else changed


def _rewinding_to(k: int, recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, prune=dataclasses.replace(recipe.prune, rewind_to=k))


def _rounds(bench: Workbench, control: Control, rounds: Sequence[int] | str | None) -> list[int]:
    if control.density is not None:
        if rounds is not None:
            raise RecipeError(f"a round and --density {control.density:g} contradict each other; give one")
        return [1]
    results = bench.finished().rounds
    last = len(results) - 1
    if last < 1:
        raise TicketError(f"{bench.path} has no pruned round yet; go on with: fastlth resume {bench.path}")
    if rounds is None:
        return [winning_or_last(results)]
    if isinstance(rounds, str):
        if rounds != "all":
            raise RecipeError(f"rounds must be numbers or all, got '{rounds}'")
        return list(range(1, last + 1))
    return _known(rounds, last)


def _known(rounds: Iterable[int], last: int) -> list[int]:
    wanted = sorted(set(rounds))
    for k in wanted:
        if not 1 <= k <= last:
            raise RecipeError(f"round {k} is not a pruned round of this search; choose from 1 to {last}")
    return wanted
