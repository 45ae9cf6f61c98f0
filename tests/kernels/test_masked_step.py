"""One pass over all weights makes the step of torch.optim in float64, and leaves nothing at a pruned weight."""

import numpy as np
import pytest
import torch
from fastlth_kernels import masked_step as ms
from fastlth_kernels.bitmask import pack
from hypothesis import given, settings

from tests.kernels.cases import STEP, Stepping, check_step

CASE = {"shapes": [(5, 784), (3, 3, 3, 64), (5,)], "density": 0.5, "seed": 1, "momentum": 0.9, "nesterov": False,
        "weight_decay": 1e-2, "lr": 0.1, "bf16_grads": True, "copies": True, "steps": 3, "dense": True}  # fmt: skip


@settings(deadline=None, max_examples=20)
@given(STEP)
def test_random_steps(case):
    pytest.importorskip("triton")
    from tests.kernels.interpreter import interpreter

    with interpreter():
        check_step(case)


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [("sgd", {}), ("sgd", {"nesterov": True}), ("sgd", {"momentum": 0.0}), ("adam", {}), ("adamw", {})],
)
def test_kernel(interpreted, optimizer, changes):
    """Several blocks per tensor, rows of whole words and not, a tensor without a mask."""
    check_step({**CASE, "optimizer": optimizer, **changes})


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_reference(optimizer):
    stepping = Stepping({**CASE, "optimizer": optimizer})
    stepping.check(stepping.ours(kernel=False))


@settings(deadline=None, max_examples=30)
@given(STEP)
def test_random_reference(case):
    stepping = Stepping(case)
    stepping.check(stepping.ours(kernel=False))


def test_adam_keeps_its_digits_over_many_steps(interpreted):
    """1 - beta^t in fp32: the naive difference would be wrong by 1e-4 in the first steps."""
    for case in ({"steps": 1, "lr": 1.0}, {"steps": 12, "lr": 0.1}):
        check_step({**CASE, "optimizer": "adam", "shapes": [(7, 33)], "dense": False, **case})


@pytest.mark.parametrize("kernel", [False, True])
def test_decay_that_nearly_cancels_the_gradient(interpreted, kernel):
    """What is left of both may be all rounding, and Adam makes a whole step of it: no fp32 step is exact there."""
    stepping = Stepping({**CASE, "optimizer": "adam", "shapes": [(64,)], "dense": False, "bf16_grads": False,
                         "density": 1.1, "steps": 1})  # fmt: skip
    left = torch.logspace(-12, -2, 64, dtype=torch.float64)
    stepping.grads = [[(left - 1e-2 * stepping.start[0].double()).float()]]
    stepping.check(stepping.ours(kernel))


def arguments(optimizer="sgd"):
    """The tensors of a small public call."""
    w = [torch.randn(4, 33, generator=torch.Generator().manual_seed(2)), torch.ones(5)]
    adam = optimizer != "sgd"
    first, second = [torch.zeros_like(t) for t in w], [torch.zeros_like(t) for t in w] if adam else []
    words = [pack(torch.rand(4, 33, generator=torch.Generator().manual_seed(3)) < 0.5)]
    words.append(torch.empty(0, dtype=torch.int32))
    copies = [torch.empty_like(t, dtype=torch.bfloat16) for t in w]
    group = (w, [torch.ones_like(t) for t in w], first, second, copies, words)
    settings_ = ms.step_settings(0.1, momentum=0.9)
    return [*group, settings_, torch.zeros(2048, dtype=torch.int32), *ms.step_table(*group), optimizer, True]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_opcheck(optimizer):
    torch.library.opcheck(ms.masked_step, arguments(optimizer))


def test_compiles_into_one_graph_and_sees_a_changed_learning_rate():
    compiled = torch.compile(lambda *a: ms.masked_step(*a), fullgraph=True, backend="aot_eager")
    eager, ours = arguments(), arguments()
    for lr in (0.1, 0.3):
        for a, step in ((eager, ms.masked_step), (ours, compiled)):
            a[6][ms.LR] = lr
            step(*a)
    for group in (0, 2, 4):  # weights, momentum, copies
        assert all(torch.equal(a, b) for a, b in zip(eager[group], ours[group], strict=True))


def test_refusals():
    good = arguments("adam")
    for place, value, says in (
        (10, "lion", "lion"), (3, [], "second moments"), (1, good[1][:1], "as many"),
        (0, [good[0][0].double(), good[0][1]], "float64"), (5, [good[5][0].long(), good[5][1]], "int32"),
        (5, [good[5][0][:3].clone(), good[5][1]], "has \\(4, 2\\)"), (0, [], "at least one"),
        (1, [good[1][0].t().contiguous().t(), good[1][1]], "contiguous"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            ms.masked_step(*good[:place], value, *good[place + 1 :])


def test_unaligned_tensors_are_refused():
    w = [torch.zeros(65)[1:]]
    with pytest.raises(ValueError, match="16 bytes"):
        ms.step_table(w, [torch.zeros(64)], [], [], [], [torch.empty(0, dtype=torch.int32)])


def test_bytes():
    """The promise of the design: 20 bytes a weight and one bit, where the naive sequence moves 72."""
    assert ms.step_bytes(8, "sgd", momentum=True) == 8 * 20 + 1
    assert ms.step_bytes(8, "adam", copy=True) == 8 * 30 + 1


def test_settings_hold_the_small_differences():
    values = ms.step_settings(0.1, betas=(0.9, 0.999)).tolist()
    assert np.allclose(values[7], 0.001, rtol=1e-7) and np.allclose(values[4], 0.1, rtol=1e-7)
