"""Where metrics go besides metrics.jsonl: TensorBoard and Weights & Biases, when asked for.

A sink gets every line of metrics.jsonl. It changes no result, so it is not part of a recipe, and it cannot hurt a run:
the first time one fails it is dropped, with a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from fastlth.errors import RecipeError, unknown
from fastlth.recipe import Recipe

Record = Mapping[str, Any]
Warn = Callable[[str], None]


class Sink(Protocol):
    """Who gets every line of ``metrics.jsonl`` too."""

    def write(self, record: Record) -> None:
        """Take over one line."""

    def close(self) -> None:
        """Hand over what is still held back."""


class TensorBoard:
    """Event files in <run>/tensorboard. Steps count on over all rounds; results of rounds have the round as step.

    After a crash some steps are made again; TensorBoard is told to forget what it had of them.
    """

    def __init__(self, run: Path, recipe: Recipe) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = partial(SummaryWriter, str(run / "tensorboard"))
        self._writer: SummaryWriter | None = None
        self._per_round = recipe.train.iterations

    def write(self, record: Record) -> None:
        step = step_of(record, self._per_round)
        if self._writer is None:
            self._writer = self._open(purge_step=None if record["event"] == "round" else step)
        for name, value in values_of(record).items():
            self._writer.add_scalar(name, value, step)
        if record["event"] == "round":
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB:
    """One W&B run per run directory, in the project ``fastlth``; a resumed search goes on in its run.

    Its id lies in <run>/wandb/id, since the same recipe may run elsewhere too.
    """

    def __init__(self, run: Path, recipe: Recipe) -> None:
        import wandb

        name = f"{run.absolute().parent.name}-{run.name}"
        file = run / "wandb" / "id"
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            file.write_text(uuid4().hex)
        self._run = wandb.init(
            project="fastlth", name=name, id=file.read_text(), resume="allow", dir=str(run), config=recipe.to_dict()
        )
        self._per_round = recipe.train.iterations
        for event in ("evaluation", "early_bird"):
            self._run.define_metric(f"{event}/*", step_metric="step")
        self._run.define_metric("round/*", step_metric="round")

    def write(self, record: Record) -> None:
        name = "round" if record["event"] == "round" else "step"
        self._run.log({name: step_of(record, self._per_round), **values_of(record)})

    def close(self) -> None:
        self._run.finish()


SINKS: dict[str, Callable[[Path, Recipe], Sink]] = {"tensorboard": TensorBoard, "wandb": WandB}


def check(names: Sequence[str]) -> tuple[str, ...]:
    """The names without repetition; "a,b" stands for two. Raises RecipeError for one that is unknown or not installed.

    (Before a run begins, a missing package is an error, since it would be missed for the whole run.)
    """
    asked = dict.fromkeys(part.strip() for name in names for part in name.split(","))
    for name in asked:
        if name not in SINKS:
            raise RecipeError(unknown("sink", name, SINKS))
        if find_spec(name) is None:
            raise RecipeError(f"--log {name} needs the package {name}; install fastlth[{name}]")
    return tuple(asked)


class Sinks:
    """All sinks of a run; none of its methods raises."""

    def __init__(self, names: Sequence[str], run: Path, recipe: Recipe, warn: Warn) -> None:
        self._warn = warn
        self._sinks: dict[str, Sink] = {}
        for name in names:
            self._guard(name, partial(self._open, name, run, recipe))

    def write(self, record: Record) -> None:
        """Give a line to every sink; one that fails is told of and left out from then on."""
        for name, sink in list(self._sinks.items()):
            self._guard(name, partial(sink.write, record))

    def _open(self, name: str, run: Path, recipe: Recipe) -> None:
        self._sinks[name] = SINKS[name](run, recipe)

    def _guard(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._sinks.pop(name, None)
            said = " ".join(str(error).split()) or "no reason given"
            self._warn(f"--log {name} failed and is dropped, the search goes on ({type(error).__name__}: {said})")

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *_: object) -> None:
        for name, sink in list(self._sinks.items()):
            self._guard(name, sink.close)
        self._sinks.clear()


def step_of(record: Record, iterations: int) -> int:
    """A round's number, or the iteration of an evaluation counted over all rounds."""
    return int(record["round"]) if record["event"] == "round" else record["round"] * iterations + record["iteration"]


def values_of(record: Record) -> dict[str, float]:
    """ "evaluation/validation_loss" and so on: the numbers of a record, named by what they are."""
    return {
        f"{record['event']}/{key}": value
        for key, value in record.items()
        if isinstance(value, int | float) and key not in ("round", "iteration")
    }
