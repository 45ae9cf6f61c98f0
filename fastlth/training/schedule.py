"""The learning rate, and where evaluations fall, as closed forms of the iteration."""

from __future__ import annotations

from fastlth.recipe import ScheduleSection


def lr_at(iteration: int, lr: float, schedule: ScheduleSection) -> float:
    """Learning rate of step ``iteration`` (the first step is 0): warm-up lr * i / k, then times gamma per milestone."""
    if iteration < schedule.warmup:
        return lr * iteration / schedule.warmup
    return lr * schedule.gamma ** sum(iteration >= m for m in schedule.milestones)


def next_evaluation(done: int, every: int, last: int) -> int:
    """The first evaluation after ``done`` steps: a multiple of ``every``, or the last iteration."""
    return min((done // every + 1) * every, last)
