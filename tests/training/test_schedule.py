"""Learning rates and evaluation points against their definitions, step by step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlth.composition import compose
from fastlth.recipe import ScheduleSection
from fastlth.training.schedule import lr_at, next_evaluation


def test_warm_up_rises_linearly_from_zero_and_then_stays():
    schedule = ScheduleSection(warmup=4)
    assert [lr_at(i, 0.1, schedule) for i in range(7)] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert lr_at(0, 0.1, schedule) == 0.0


def test_without_warm_up_the_first_step_has_the_whole_rate():
    assert [lr_at(i, 1.2e-3, ScheduleSection()) for i in (0, 1, 49_999)] == [1.2e-3] * 3


def test_milestones_multiply_by_gamma_from_their_own_iteration_on():
    schedule = ScheduleSection(milestones=(3, 5), gamma=0.5)
    assert [lr_at(i, 1.0, schedule) for i in range(7)] == [1, 1, 1, 0.5, 0.5, 0.25, 0.25]


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), unique=True, max_size=4), st.floats(0.01, 1))
def test_milestones_agree_with_torchs_scheduler(milestones, gamma):
    milestones.sort()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    torchs = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma)
    schedule = ScheduleSection(milestones=tuple(milestones), gamma=gamma)
    for iteration in range(64):
        assert lr_at(iteration, 0.1, schedule) == pytest.approx(torchs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        torchs.step()


def test_vgg19s_rates_are_the_papers():
    """Figure 2 and section 5: 0.1 after a warm-up of 10,000, a tenth of it after 80 epochs and again after 120."""
    recipe = compose("vgg19", "cifar-10", preset="paper").recipe
    expected = {
        0: 0.0, 1: 1e-5, 5_000: 0.05, 9_999: 0.09999, 10_000: 0.1, 80 * 703 - 1: 0.1,
        80 * 703: 0.01, 120 * 703 - 1: 0.01, 120 * 703: 0.001, 112_479: 0.001,
    }  # fmt: skip
    assert {i: lr_at(i, recipe.train.lr, recipe.schedule) for i in expected} == pytest.approx(expected)


def points(every: int, last: int) -> list[int]:
    """Where evaluations fall, each found from the one before."""
    found = [next_evaluation(0, every, last)]
    while found[-1] < last and len(found) <= last:  # ends even if the next one never comes
        found.append(next_evaluation(found[-1], every, last))
    return found


def test_evaluations_fall_on_multiples_and_on_the_last_iteration():
    assert points(100, 350) == [100, 200, 300, 350]
    assert points(100, 300) == [100, 200, 300]
    assert points(1000, 30) == [30]
    assert points(1, 3) == [1, 2, 3]


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 200), st.data())
def test_the_next_evaluation_is_the_first_after_what_is_done(every, last, data):
    done = data.draw(st.integers(0, last - 1))
    expected = min(i for i in range(done + 1, last + 1) if i % every == 0 or i == last)
    assert next_evaluation(done, every, last) == expected
