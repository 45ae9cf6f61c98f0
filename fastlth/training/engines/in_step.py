"""Replicates that are trained together go in step: a stretch is made when all have asked for it.

Each search runs in a thread of its own and knows nothing of the others. A stretch of steps ends where the first of them
wants to stop; one that has left is no longer waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import Any, TypeVar

Answer = TypeVar("Answer")
Make = Callable[[int, int, Collection[int]], None]
"""makes the steps [first, last) of all; the replicates that wait for them are named"""


class InStep:
    """``turn`` is to be held by whoever touches what the replicates share."""

    def __init__(self, count: int, make: Make) -> None:
        self.turn = threading.Condition()
        self._make = make
        self._wants: dict[int, list[int]] = {}  # replicate -> [next iteration, end]
        self._live = set(range(count))
        self._place, self._answers = (-1, -1), dict[str, Any]()

    def run(self, replicate: int, first: int, last: int) -> None:
        """Returns when the steps [first, last) of ``replicate`` are made, with ``turn`` held meanwhile. If they cannot
        be made, each replicate gets to know in its turn."""
        with self.turn:
            self._wants[replicate] = [first, last]
            while True:
                self._go_on()
                if self._wants[replicate][0] >= last:
                    break
                self.turn.wait()
            del self._wants[replicate]

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
        waiting = {r: want for r, want in self._wants.items() if want[0] < want[1]}
        if not waiting or set(waiting) != self._live:
            return
        at = {want[0] for want in waiting.values()}
        assert len(at) == 1, f"replicates are out of step: they are at iterations {sorted(at)}"
        begin, end = at.pop(), min(want[1] for want in waiting.values())
        self._make(begin, end, waiting.keys())
        for want in waiting.values():
            want[0] = end
        self.turn.notify_all()
