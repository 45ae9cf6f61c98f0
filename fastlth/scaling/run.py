"""Jobs to workers, from the plan to the last outcome: what ``sweep`` and ``reproduce --on`` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastlth.errors import SomeFailed
from fastlth.experiments.figures.estimate import Paces
from fastlth.experiments.figures.scale import Job
from fastlth.experiments.figures.work import Training
from fastlth.scaling import machine, schedule
from fastlth.scaling.machine import Wanted
from fastlth.scaling.perform import Outcome, Place
from fastlth.scaling.plan import Plan, plan
from fastlth.scaling.tasks import Task, tasks


class Scaled:
    """Jobs cut into tasks for the workers that there are. Raises RecipeError where those cannot be had."""

    def __init__(self, jobs: Sequence[Job], place: Place, wanted: Wanted) -> None:
        self._place, self._wanted = place, wanted
        self.worker, self.workers = machine.workers(wanted)
        self.tasks: list[Task] = tasks(jobs, self.worker)

    def plan(self, say: Callable[[str], None]) -> Plan:
        """Times some intervals of each kind of training on this machine, wherever the tasks will run."""
        paces = Paces(self._place.out, self._place.data_dir, say)
        return plan(self.tasks, self.worker, self.workers, self._place.out, paces.seconds)

    def run(self, show: schedule.Show, stopped: Callable[[], int | None]) -> list[Outcome]:
        """Every task's outcome; whatever happens, workers have ended then."""
        backend = machine.backend(self._wanted, self.worker, self._place)
        try:
            return schedule.run(self.tasks, backend, self._place.out, show=show, stopped=stopped, seconds=_about)
        finally:
            backend.close()


def _about(training: Training) -> float:
    """What a training costs beside others, unmeasured: images times weights that are left, and a bit."""
    return training.steps * training.recipe.train.batch_size * (0.1 + training.density)


def raise_failed(outcomes: Sequence[Outcome], place: Place) -> None:
    """SomeFailed, with the exit code of the first failure, where a task failed."""
    failed = [o for o in outcomes if o.status == "failed"]
    if failed:
        first = failed[0]
        raise SomeFailed(f"{len(failed)} of {len(outcomes)} tasks failed, the first: {first.task}: {first.text}; see "
                         f"{place.log(first.task)}; the same command tries them again", first.code)  # fmt: skip
