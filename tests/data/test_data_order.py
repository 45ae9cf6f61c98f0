"""Splits and orders: permutations, functions of (key, epoch) alone, and any iteration by itself."""

import numpy as np
import pytest
from fastlth_kernels.philox import philox

from fastlth.data.order import CACHE_BYTES, Order, epoch_order, split
from fastlth.errors import RecipeError

KEY = (7, 3)


def key_of(image: int, epoch: int) -> int:
    """The definition, one image at a time: two consecutive words of the stream, the first one on top."""
    draw = philox(2 * image // 4, 0, epoch, 0, KEY)
    high, low = draw[2 * image % 4], draw[2 * image % 4 + 1]
    return int(high) << 32 | int(low)


@pytest.mark.parametrize("epoch", [0, 1, 20_000])
def test_an_epochs_order_sorts_the_images_by_their_keys(epoch: int) -> None:
    order = epoch_order(101, epoch, KEY)
    assert order.dtype == np.int64
    assert order.tolist() == sorted(range(101), key=lambda i: key_of(i, epoch))


def test_orders_differ_by_epoch_and_by_seed() -> None:
    orders = [epoch_order(50, 0, KEY), epoch_order(50, 1, KEY), epoch_order(50, 0, (8, 3)), epoch_order(50, 0, (7, 4))]
    assert len({tuple(o.tolist()) for o in orders}) == 4
    assert all(sorted(o.tolist()) == list(range(50)) for o in orders)


def test_a_split_holds_out_the_images_with_the_smallest_keys() -> None:
    train, validation = split(100, 17, KEY)
    smallest = sorted(range(100), key=lambda i: key_of(i, 0))[:17]
    assert validation.tolist() == sorted(smallest)
    assert train.tolist() == sorted(set(range(100)) - set(smallest))


def test_a_larger_validation_set_contains_the_smaller() -> None:
    assert set(split(100, 10, KEY)[1].tolist()) < set(split(100, 11, KEY)[1].tolist())


@pytest.mark.parametrize("validation", [-1, 100, 101])
def test_a_split_leaves_something_to_train_on(validation: int) -> None:
    with pytest.raises(RecipeError, match=r"data\.validation must be in 0 to 99 .* got"):
        split(100, validation, KEY)


@pytest.mark.parametrize(("drop_last", "per_epoch"), [(True, 3), (False, 4)])
def test_iterations_go_through_one_epoch_after_another(drop_last: bool, per_epoch: int) -> None:
    order = Order(23, 7, drop_last, KEY)
    assert order.iterations_per_epoch == per_epoch
    for iteration in reversed(range(3 * per_epoch)):  # any iteration by itself, in any sequence
        epoch, position, indices = order.batch(iteration)
        assert (epoch, position) == (iteration // per_epoch, iteration % per_epoch * 7)
        assert indices.dtype == np.int64
        assert indices.tolist() == epoch_order(23, epoch, KEY)[position : position + 7].tolist()
        assert len(indices) == (2 if position == 21 else 7)


def test_a_batch_larger_than_the_set_is_refused_where_it_would_be_dropped() -> None:
    with pytest.raises(RecipeError, match=r"train\.batch_size must be at most the 5 training images, got 6"):
        Order(5, 6, True, KEY)
    assert Order(5, 6, False, KEY).batch(1)[2].tolist() == epoch_order(5, 1, KEY).tolist()


def test_orders_are_kept_within_a_memory_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(images: int, epoch: int, key: tuple[int, int]) -> np.ndarray:
        drawn.append(epoch)
        return epoch_order(images, epoch, key)

    monkeypatch.setattr("fastlth.data.order.epoch_order", counted)
    monkeypatch.setattr("fastlth.data.order.CACHE_BYTES", 3 * 10 * 4)  # three epochs of ten images
    order = Order(10, 5, True, KEY)
    for _ in range(2):
        for iteration in range(10):
            order.batch(iteration)
    assert drawn == [0, 1, 2, 3, 4, 3, 4]  # once each, not once per batch; the first three are kept
    assert CACHE_BYTES // (4 * 55_000) > 55  # the real bound holds a whole round of LeNet-300-100's paper recipe
