"""The paired timer: which of two ways is faster, on a machine that is never quiet.

A, B and a control (A once more) are timed in blocks, in all orders equally often, and only ratios within such a
round count, since a neighbour slows down all three. The control must come out at 1: where it strays, or where the
ratio's own interval spans a factor of two, no ratio is reported. (Measured on a shared machine: medians of sequential
runs called a 5 % slowdown anything from 30 % faster to 9 % slower; paired medians stayed within 2 to 8 %.)
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Work = Callable[[int], object]
"""does the thing n times; a device may still be at it when it returns"""
Timed = Callable[[int], float]
"""does the thing n times and says how many seconds that took"""

BLOCK_SECONDS = 0.02
# Before each block: OpenMP's threads go on spinning for about 6 ms after their work, on the next one's cores.
REST_SECONDS = 0.01
MIN_PAIRS, MAX_PAIRS = 6, 400  # of fewer than 6 samples even the smallest and largest are no 95 % interval
STOP_FROM = 24  # pairs from which on measuring stops when the ratio is precise: of fewer, too many look so by luck
PRECISE = 0.01  # half width of the log-ratio interval at which it is
# The control strays when its median is off by more than STRAY, or surely (by its whole interval) by more than BIAS.
STRAY, BIAS = 0.10, 0.03
WIDE = math.log(2)  # of a log-ratio interval that says too little; threads that wait for each other can do that


@dataclass(frozen=True)
class Paired:
    """Seconds per call of both, and the ratio of B's to A's: above 1, A is faster."""

    seconds_a: float
    seconds_b: float
    ratio: float | None
    """None where the control strayed or the interval is too wide"""
    low: float
    """lower end of the ratio's 95 % bootstrap interval"""
    high: float
    control_low: float
    control_high: float
    """the same interval for A against A"""
    pairs: int
    quantiles_a: tuple[float, float, float]
    """10, 50 and 90 % of A's seconds per call"""

    @property
    def strayed(self) -> bool:
        """Whether the machine was too restless, so that the ratio is None."""
        return self.ratio is None


def paired(
    a: Work, b: Work, *, budget: float, seed: int = 0, block: float = BLOCK_SECONDS, least_calls: int = 1,
    wait: Callable[[], object] = lambda: None, clock: Callable[[], float] = time.perf_counter,
) -> Paired:  # fmt: skip
    """Compare ``a`` with ``b`` for at most ``budget`` seconds, less if the ratio is precise earlier.

    Works so slow that ``MIN_PAIRS`` pairs (18 blocks) take longer get those. A block lasts at least ``block`` seconds
    and has at least ``least_calls`` calls (on a GPU: 100 launches). ``wait`` returns when the device has done all that
    it was given; it is called at both ends of a block, and never within one.
    """

    def timed(work: Work) -> Timed:
        def seconds(calls: int) -> float:
            wait()
            began = clock()
            work(calls)
            wait()
            return clock() - began

        return seconds

    first, second = timed(a), timed(b)
    return alternate(
        first, second, first, budget=budget, seed=seed, block=block, least_calls=least_calls, clock=clock
    )  # fmt: skip


def alternate(
    a: Timed, b: Timed, control: Timed, *, budget: float, seed: int = 0, block: float = BLOCK_SECONDS,
    least_calls: int = 1, clock: Callable[[], float] = time.perf_counter,
) -> Paired:  # fmt: skip
    """``paired`` for ways that time themselves. ``control`` is A again, or its twin in another process."""
    rng = random.Random(seed)
    began = clock()
    for timed in (a, b) if control is a else (a, b, control):
        timed(1)  # the first call warms up
    sides = [_Side(timed, block, least_calls) for timed in (a, b, control)]
    for side in sides:
        side.seconds()  # finds how many calls make a block
    times: list[tuple[float, ...]] = []
    look_at = STOP_FROM
    for order in _orders(rng):
        taken = {i: sides[i].seconds() for i in order}
        times.append((taken[0], taken[1], taken[2]))
        pairs = len(times)
        if pairs < MIN_PAIRS:
            continue
        if pairs >= look_at:
            look_at = math.ceil(1.2 * pairs)  # looking after each pair would favour intervals narrow by luck
            low, high = interval(_log_ratios(times, 1), rng)
            if high - low < 2 * PRECISE:
                break
        if pairs == MAX_PAIRS or (clock() - began) * (pairs + 1) / pairs > budget:
            break
    return _summary(times, rng)


def interval(log_ratios: Sequence[float], rng: random.Random, resamples: int = 400) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    n = len(log_ratios)
    medians = sorted(statistics.median(rng.choices(log_ratios, k=n)) for _ in range(resamples))
    return medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1]


class _Side:
    """One way, and how often it is called in a block."""

    def __init__(self, timed: Timed, block: float, calls: int) -> None:
        self._timed, self._block, self._calls = timed, block, calls

    def seconds(self) -> float:
        """Per call, over a block. One that turns out too short does not count and is repeated with more calls."""
        time.sleep(REST_SECONDS)
        while (taken := self._timed(self._calls)) < self._block:
            more = min(10.0, 1.3 * self._block / max(taken, 1e-9))
            self._calls = max(self._calls + 1, math.ceil(self._calls * more))
        return taken / self._calls


def _orders(rng: random.Random) -> Iterator[tuple[int, ...]]:
    """All orders of three, shuffled, again and again: chance alone could let one go first too often."""
    orders = list(itertools.permutations(range(3)))
    while True:
        rng.shuffle(orders)
        yield from orders


def _log_ratios(times: Sequence[tuple[float, ...]], side: int) -> list[float]:
    return [math.log(t[side] / t[0]) for t in times]


def _summary(times: Sequence[tuple[float, ...]], rng: random.Random) -> Paired:
    ratios, control = _log_ratios(times, 1), _log_ratios(times, 2)
    low, high = interval(ratios, rng)
    control_low, control_high = interval(control, rng)
    strayed = abs(statistics.median(control)) > STRAY or control_low > BIAS or control_high < -BIAS
    strayed = strayed or high - low > WIDE
    of_a = [t[0] for t in times]
    deciles = statistics.quantiles(of_a, n=10)
    return Paired(
        seconds_a=statistics.median(of_a), seconds_b=statistics.median(t[1] for t in times),
        ratio=None if strayed else math.exp(statistics.median(ratios)), low=math.exp(low), high=math.exp(high),
        control_low=math.exp(control_low), control_high=math.exp(control_high), pairs=len(times),
        quantiles_a=(deciles[0], statistics.median(of_a), deciles[8]),
    )  # fmt: skip
