"""Saving a search while it runs: in a background thread, in order, the costly parts once."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from fastlth.errors import Stopped
from fastlth.models import INIT_VERSION
from fastlth.recipe import Recipe
from fastlth.search import InRound, RoundFinished
from fastlth.store import weights
from fastlth.store.metrics_file import MetricsFile
from fastlth.store.run import Run, State
from fastlth.store.ticket import EncodedTheta, Ticket


class Saver:
    """Saves in a background thread, in order; an error there is raised at the next save or at the end."""

    def __init__(self, directory: Run, recipe: Recipe, metrics: MetricsFile) -> None:
        self._directory, self._every, self._metrics = directory, recipe.store.save_every, metrics
        self._in_seed = recipe.store.theta0 == "seed"
        self._keep = recipe.store.keep_weights
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastlth-save")
        self._pending: list[Future[None]] = []
        self._theta: EncodedTheta | None = None
        self._saved = time.monotonic()
        self._cost = 0.0

    def due(self) -> bool:
        """Whether it is time to save: at the interval asked for, or later where copying the state takes so long
        that it would stop the step for more than 2 % of the time."""
        return time.monotonic() - self._saved >= max(self._every, 50 * self._cost)

    def state(self, event: InRound) -> None:
        """Save where a round stands, in the background. Raises what the save before this one has met."""
        started = time.monotonic()
        self._settle()
        state = event.state()
        self._metrics.sync()
        info = {**state.info, "metrics_bytes": self._metrics.bytes}
        self._submit(self._directory.save_state, State(arrays=state.arrays, info=info))
        self._saved = time.monotonic()
        self._cost = self._saved - started

    def round(self, event: RoundFinished) -> None:
        """Save a finished round: its trained weights if they are kept, then the ticket, then drop the state."""
        self._settle()
        ticket = event.ticket
        self._metrics.sync()
        whole = dataclasses.replace(
            ticket, resolved=self._directory.resolved or {}, metrics_bytes=self._metrics.bytes,
            theta0_seed={"init_version": INIT_VERSION} if self._in_seed else None,
        )  # fmt: skip
        self._submit(self._save_round, whole, event.trained() if self._keep != "none" else None)
        self._saved = time.monotonic()

    def _save_round(self, ticket: Ticket, trained: Mapping[str, NDArray[Any]] | None) -> None:
        path, last = self._directory.path, len(ticket.rounds) - 1
        if trained is not None:
            weights.save(path, last, trained, ticket.trained_mask(last), ticket.recipe.digest)
        if self._theta is None:
            self._theta = EncodedTheta.of(ticket.rewind, stored=not self._in_seed)
        self._directory.save_ticket(ticket, theta=self._theta)
        self._directory.drop_state()
        if self._keep == "last":
            weights.drop_before(path, last)

    def _submit(self, call: Callable[..., None], *args: object) -> None:
        self._pending.append(self._thread.submit(call, *args))

    def _settle(self) -> None:
        while self._pending:
            self._pending.pop(0).result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
        if error is None or isinstance(error, Stopped):
            self._settle()
