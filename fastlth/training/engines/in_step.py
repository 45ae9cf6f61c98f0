"""Replicates that are trained together go in step: a stretch is made when all have asked for it.

Each search runs in a thread of its own and knows nothing of the others. A stretch of steps ends where the first of them
wants to stop; one that has left is no longer waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

Make = Callable[[int, int, Collection[int]], None]
"""makes the steps [first, last) of all; the replicates that wait for them are named"""


class InStep:
    """``turn`` is to be held by whoever touches what the replicates share."""

    def __init__(self, count: int, make: Make) -> None:
        self.turn = threading.Condition()
        self._make = make
        self._wants: dict[int, list[int]] = {}  # replicate -> [next iteration, end]
        self._live = set(range(count))

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
