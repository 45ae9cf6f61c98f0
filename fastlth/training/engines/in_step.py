"""Replicates that are trained together go in step: a stretch is made when all have asked for it.

Each search runs in a thread of its own and knows nothing of the others. A stretch of steps ends where the first of them
wants to stop; one that has left is no longer waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

Answer = TypeVar("Answer")
Make = Callable[[int, int, Collection[int]], None]
"""makes the steps [first, last) of all; the replicates that wait for them are named"""


class InStep:
    """``turn`` is to be held by whoever touches what the replicates share."""

    def __init__(self, count: int, make: Make) -> None:
        self.turn = threading.Condition()
        self._make = make
        self._wants: dict[int, _Want] = {}
        self._live = set(range(count))
        self._broken: BaseException | None = None
        self._place, self._answers = (-1, -1), dict[str, Any]()

    def run(self, replicate: int, first: int, last: int) -> float:
        """Returns when the steps [first, last) of ``replicate`` are made, with the seconds that they took: the same
        number for all who asked for the same. Where they cannot be made every replicate gets the error, and no step
        is made any more: some of them may have been."""
        with self.turn:
            mine = self._wants[replicate] = _Want(first, last)
            while mine.next < last:
                self._go_on()
                if mine.next < last:
                    self.turn.wait()
            del self._wants[replicate]
            return mine.seconds

    def agreed(self, place: tuple[int, int], question: str, ask: Callable[[], Answer]) -> Answer:
        """What ``ask`` says at a place (round, iteration) that all replicates come to: the answer that the first of
        them got is everyone's. Those who stop or save together go on together."""
        with self.turn:
            if place != self._place:  # nobody gets here before all others have left the place before
                self._place, self._answers = place, {}
            if question not in self._answers:
                self._answers[question] = ask()
            answer: Answer = self._answers[question]
            return answer

    def leave(self, replicate: int) -> None:
        """The others no longer wait for it."""
        with self.turn:
            self._live.discard(replicate)
            self._wants.pop(replicate, None)
            self.turn.notify_all()  # whoever wakes up first goes on

    def _go_on(self) -> None:
        """Make the steps that all replicates are waiting for, if they are."""
        if self._broken is not None:
            raise self._broken
        waiting = {r: want for r, want in self._wants.items() if want.next < want.last}
        if not waiting or set(waiting) != self._live:
            return
        at = {want.next for want in waiting.values()}
        assert len(at) == 1, f"replicates are out of step: they are at iterations {sorted(at)}"
        begin, end, started = at.pop(), min(want.last for want in waiting.values()), time.perf_counter()
        try:
            self._make(begin, end, waiting.keys())
        except BaseException as error:
            self._broken = error
            self.turn.notify_all()
            raise
        taken = time.perf_counter() - started
        for want in waiting.values():
            want.next = end
            want.seconds += taken
        self.turn.notify_all()


@dataclass
class _Want:
    next: int
    last: int
    seconds: float = 0.0
