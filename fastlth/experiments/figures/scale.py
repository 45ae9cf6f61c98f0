"""A figure at a scale: its arms as jobs, each with a recipe.

paper   as declared
short   the budget of preset ``fast``: its iterations, evaluations and rounds; 3 replicates, one draw
smoke   digits and seconds, to see that everything works: ResNet-8 in place of ResNets, Conv-2 in place of the other
        nets with convolutions

Warm-up, milestones, rewind points and all other iterations shrink in proportion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from fastlth.catalogue import has_batch_norm, lenet_widths
from fastlth.composition import compose, presets_for
from fastlth.errors import RecipeError, unknown
from fastlth.experiments.figures.declare import Arm, Branched, Carried, Copied, Figure, Follow
from fastlth.experiments.supermasks.plan import Plan
from fastlth.recipe import ComputeSection, DataSection, EvaluateSection, Recipe, ScheduleSection

SCALES = ("paper", "short", "smoke")
SHORT_REPLICATES = 3
SHORT_SUPERMASK = 20  # epochs, in place of the paper's hundreds
SMOKE_ITERATIONS, SMOKE_ROUNDS, SMOKE_EVERY, SMOKE_BATCH, SMOKE_POINTS = 8, 2, 4, 20, 3
SMOKE_COMPUTE = ComputeSection(device="cpu", precision="fp32", compile="off", channels_last="off", loader="resident",
                               engine="dense", threads=1, shifted=())  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """An arm with the recipe it is trained with at some scale."""

    arm: Arm
    recipe: Recipe
    replicates: int
    follow: tuple[Follow, ...]
    plan: Plan | None
    ratio: Fraction
    """an iteration of the paper is this many here"""

    def iteration(self, papers: int) -> int:
        """An iteration of the paper at this scale."""
        return round(papers * self.ratio)


def jobs(figure: Figure, scale: str) -> list[Job]:
    """Of all arms that can be trained. Raises RecipeError for an unknown scale, and where nothing can be trained."""
    if scale not in SCALES:
        raise RecipeError(unknown("scale", scale, SCALES))
    if not figure.ready:
        raise RecipeError(f"{figure.name} needs {' and '.join(figure.needs)}, which fastlth does not have yet; choose "
                          "another figure ('fastlth reproduce --list' shows all)")  # fmt: skip
    return [_job(arm, scale) for arm in figure.ready if scale == "paper" or arm.small]


def left_out(figure: Figure, scale: str) -> tuple[str, ...]:
    """What the figure lacks at a scale, a sentence each."""
    missing = [f"{_names(a for a in figure.arms if a.missing == need)}: not drawn; needs {need}."
               for need in figure.needs]  # fmt: skip
    long = [a for a in figure.ready if scale != "paper" and not a.small]
    return (*missing, *([f"{_names(long)}: left out at {scale} scale."] if long else []))


def _names(arms: Iterable[Arm]) -> str:
    return ", ".join(dict.fromkeys(arm.panel or arm.label for arm in arms))


def _job(arm: Arm, scale: str) -> Job:
    covered = presets_for(arm.model, arm.dataset)
    preset = arm.preset if arm.preset in covered else None
    settings = {**arm.settings, "prune.rounds": arm.rounds}
    recipe = compose(arm.model, arm.dataset, preset=preset, settings=settings).recipe
    if scale == "paper":
        return Job(arm=arm, recipe=recipe, replicates=arm.replicates, follow=arm.follow, plan=arm.supermask,
                   ratio=Fraction(1))  # fmt: skip
    if scale == "smoke":
        ratio = Fraction(SMOKE_ITERATIONS, recipe.train.iterations)
        small = _shrunk(_on_digits(recipe), ratio, min(arm.rounds, SMOKE_ROUNDS), SMOKE_EVERY)
        return _limited(arm, small, 1, ratio)
    ratio, every, rounds = _short(arm, recipe, covered)
    return _limited(arm, _shrunk(recipe, ratio, rounds, every), min(arm.replicates, SHORT_REPLICATES), ratio)


def _short(arm: Arm, recipe: Recipe, covered: list[str]) -> tuple[Fraction, int, int]:
    """How much shorter trainings are, iterations between evaluations, rounds."""
    if arm.supermask is not None and arm.supermask.method != "one-shot":
        per_epoch = recipe.train.iterations_per_epoch(recipe.data.train_images)
        ratio = Fraction(SHORT_SUPERMASK * per_epoch, recipe.train.iterations)
        return min(Fraction(1), ratio), recipe.evaluate.every, 0
    if "fast" not in covered:
        return Fraction(1, 10), recipe.evaluate.every, min(arm.rounds, arm.short_rounds or arm.rounds)
    fast = compose(arm.model, arm.dataset, preset="fast").recipe
    whole = compose(arm.model, arm.dataset, preset=covered[0]).recipe.train.iterations
    rounds = min(arm.rounds, arm.short_rounds or fast.prune.rounds)
    return Fraction(fast.train.iterations, whole), fast.evaluate.every, rounds


def _shrunk(recipe: Recipe, ratio: Fraction, rounds: int, every: int) -> Recipe:
    schedule = ScheduleSection(
        warmup=round(recipe.schedule.warmup * ratio), gamma=recipe.schedule.gamma, scale=recipe.schedule.scale,
        milestones=tuple(sorted({max(1, round(m * ratio)) for m in recipe.schedule.milestones})),
    )  # fmt: skip
    iterations = max(1, round(recipe.train.iterations * ratio))
    rewind = min(round(recipe.prune.rewind_to * ratio) or min(1, recipe.prune.rewind_to), iterations - 1)
    return dataclasses.replace(
        recipe, train=dataclasses.replace(recipe.train, iterations=iterations), schedule=schedule,
        prune=dataclasses.replace(recipe.prune, rounds=rounds, rewind_to=rewind),
        evaluate=EvaluateSection(every=every, test=recipe.evaluate.test),
    )  # fmt: skip


def _on_digits(recipe: Recipe) -> Recipe:
    name = recipe.model.name
    if lenet_widths(name) is None:
        name = "lenet-300-100" if name == "lenet-5" else "resnet-8" if name.startswith("resnet") else "conv-2"
    norm = recipe.model.norm_init if has_batch_norm(name) else "one"
    return dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, name=name, batch_norm=False, norm_init=norm),
        data=DataSection(name="digits", normalise=recipe.data.normalise), compute=SMOKE_COMPUTE,
        train=dataclasses.replace(recipe.train, batch_size=min(recipe.train.batch_size, SMOKE_BATCH)),
    )  # fmt: skip


def _limited(arm: Arm, recipe: Recipe, replicates: int, ratio: Fraction) -> Job:
    """The job with what follows it made to fit fewer rounds and iterations."""
    smoke = recipe.data.name == "digits"
    plan = arm.supermask
    if plan is not None and smoke:
        one_shot = plan.method == "one-shot"
        plan = dataclasses.replace(plan, powers=SMOKE_ROUNDS) if one_shot else dataclasses.replace(plan, samples=2)
    follow = tuple(_fitting(f, recipe, ratio, smoke) for f in arm.follow)
    return Job(arm=arm, recipe=recipe, replicates=replicates, follow=follow, plan=plan, ratio=ratio)


def within(rounds: Iterable[int], last: int) -> tuple[int, ...]:
    """Those rounds, the last one in place of all that are later."""
    return tuple(dict.fromkeys(min(k, last) for k in rounds))


def _fitting(follow: Follow, recipe: Recipe, ratio: Fraction, smoke: bool) -> Follow:
    last = recipe.prune.rounds
    match follow:
        case Branched():
            return dataclasses.replace(follow, trials=1, rounds=within(follow.rounds, last))
        case Copied():
            at = tuple(dict.fromkeys(min(round(k * ratio), recipe.train.iterations - 1) for k in follow.at))
            return dataclasses.replace(
                follow, rounds=within(follow.rounds, last), at=at[:2] if smoke else at, pairs=follow.pairs[:1],
                points=SMOKE_POINTS if smoke else follow.points,
            )  # fmt: skip
        case Carried():
            dataset = "digits" if smoke else follow.dataset
            return dataclasses.replace(follow, dataset=dataset, rounds=within(follow.rounds, last))
