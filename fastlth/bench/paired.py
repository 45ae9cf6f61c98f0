"""The paired timer: which of two ways is faster, on a machine that is never quiet.

Blocks of A and B alternate in random order, and only ratios within a pair count, since a neighbour slows down
both. Every third pair is a control, A against A: where the control strays from 1 no ratio is reported. (Measured
on a shared machine: medians of sequential runs called a 5 % slowdown anything from 30 % faster to 9 % slower; paired
medians stayed within 2 to 8 %.)
"""

from __future__ import annotations

import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Work = Callable[[int], object]
"""does the thing n times and waits for it"""

BLOCK_SECONDS = 0.02
MIN_PAIRS, MAX_PAIRS = 12, 400
CONTROL_STRAY = 0.10  # |median log ratio| of A against A above which nothing is reported
PRECISE = 0.01  # half width of the log-ratio interval at which measuring stops


@dataclass(frozen=True)
class Paired:
    """Seconds per call of both, and the ratio of B's to A's: above 1, A is faster."""

    seconds_a: float
    seconds_b: float
    ratio: float | None
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
        """Whether the control was off, so that the ratio is None."""
        return self.ratio is None


def paired(
    a: Work, b: Work, *, budget: float, seed: int = 0, block: float = BLOCK_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Paired:  # fmt: skip
    """Compare ``a`` with ``b`` for at most about ``budget`` seconds, less if the ratio is precise earlier."""
    rng = random.Random(seed)

    def seconds(work: Work, calls: int) -> float:
        began = clock()
        work(calls)
        return (clock() - began) / calls

    began = clock()
    calls_a, calls_b = (_calls(functools.partial(seconds, work), block) for work in (a, b))
    times_a: list[float] = []
    times_b: list[float] = []
    ratios: list[float] = []
    control: list[float] = []
    while len(ratios) < MAX_PAIRS:
        first_a = rng.random() < 0.5
        if first_a:
            ta = seconds(a, calls_a)
            tb = seconds(b, calls_b)
        else:
            tb = seconds(b, calls_b)
            ta = seconds(a, calls_a)
        times_a.append(ta)
        times_b.append(tb)
        ratios.append(math.log(tb / ta))
        if len(ratios) % 3 == 0:
            one, two = seconds(a, calls_a), seconds(a, calls_a)
            control.append(math.log(one / two) * (1 if first_a else -1))
        if len(ratios) >= MIN_PAIRS and len(ratios) % 6 == 0:
            low, high = interval(ratios, rng)
            if clock() - began > budget or high - low < 2 * PRECISE:
                break
        elif clock() - began > 2 * budget and len(control) > 1:
            break
    low, high = interval(ratios, rng)
    control_low, control_high = interval(control, rng)
    stray = abs(statistics.median(control)) > CONTROL_STRAY
    deciles = statistics.quantiles(times_a, n=10)
    return Paired(
        seconds_a=statistics.median(times_a), seconds_b=statistics.median(times_b),
        ratio=None if stray else math.exp(statistics.median(ratios)), low=math.exp(low), high=math.exp(high),
        control_low=math.exp(control_low), control_high=math.exp(control_high), pairs=len(ratios),
        quantiles_a=(deciles[0], statistics.median(times_a), deciles[8]),
    )  # fmt: skip


def interval(log_ratios: Sequence[float], rng: random.Random, resamples: int = 400) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    n = len(log_ratios)
    medians = sorted(statistics.median(rng.choices(log_ratios, k=n)) for _ in range(resamples))
    return medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1]


def _calls(seconds: Callable[[int], float], block: float) -> int:
    """How often to call so that a block lasts at least ``block`` seconds; the first calls are the warm-up."""
    seconds(1)
    calls = 1
    while (taken := seconds(calls) * calls) < block:
        calls = max(calls + 1, math.ceil(calls * min(10.0, 1.3 * block / max(taken, 1e-9))))
    return calls
