"""Tasks in threads of their own: results in order, events in the caller's thread, errors after all have ended."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from fastlth.errors import DivergedError, Stopped
from fastlth.side_by_side import _begin, cores, side_by_side


def test_results_are_in_order_and_events_come_to_the_calling_thread():
    seen, threads = [], set()

    def task(number):
        def run(show, failed):
            threads.add(threading.get_ident())
            for i in range(3):
                show((number, i))
            return number * 10

        return run

    def show(number, event):
        assert threading.current_thread() is threading.main_thread()
        seen.append((number, event))

    assert side_by_side([task(n) for n in range(5)], workers=2, show=show) == [0, 10, 20, 30, 40]
    assert threading.get_ident() not in threads
    assert len(seen) == 15
    for n in range(5):
        assert [event for number, event in seen if number == n] == [(n, 0), (n, 1), (n, 2)]


def test_two_workers_really_run_at_once():
    meet = threading.Barrier(2, timeout=30)
    assert side_by_side([lambda show, failed: meet.wait() >= 0] * 2, workers=2, show=lambda *_: None) == [True, True]


@pytest.mark.parametrize(("tasks", "workers", "most"), [
    (1, 2, [1]), (2, 2, [2, 1]), (3, 2, [3, 2, 1]), (4, 2, [2, 3, 2, 1]), (5, 2, [2, 2, 3, 2, 1]),
    (7, 2, [2, 2, 2, 2, 3, 2, 1]), (5, 3, [5, 4, 3, 2, 1]), (3, 1, [1, 1, 1]),
])  # fmt: skip
def test_no_worker_idles_beside_the_last_tasks(tasks, workers, most):
    """``most``: how many run until the first, second, third... ends; always the one that began first."""
    futures = []
    found = []
    for number in range(tasks):
        found.append(len(_begin(futures, tasks, workers, lambda _: Future(), threading.Event())))
        futures[number].set_result(None)
    assert found == most
    assert _begin(futures, tasks, workers, lambda _: Future(), threading.Event()) == []


def test_one_failure_lets_the_others_save_and_is_the_error_raised():
    saved, begun = threading.Event(), threading.Event()

    def fails(show, failed):
        assert begun.wait(30)
        raise DivergedError("the loss became NaN")

    def runs(show, failed):
        begun.set()
        while not failed():
            pass
        saved.set()
        raise Stopped("stopped and saved", 15)

    def never(show, failed):
        pytest.fail("began after another had failed")

    with pytest.raises(DivergedError):
        side_by_side([runs, fails, never], workers=2, show=lambda *_: None)
    assert saved.is_set()


def test_an_error_in_the_view_ends_all_tasks():
    def runs(show, failed):
        show("event")
        while not failed():
            pass

    def show(number, event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side([runs, runs], workers=2, show=show)


def test_stopped_is_raised_when_all_have_stopped():
    def stops(show, failed):
        raise Stopped("stopped and saved", 2)

    with pytest.raises(Stopped) as stopped:
        side_by_side([stops, stops], workers=2, show=lambda *_: None)
    assert stopped.value.exit_code == 130


def test_there_is_a_processor():
    assert cores() >= 1
