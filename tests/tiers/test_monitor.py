from __future__ import annotations

import gc
import threading

import pytest
from threads import Task

from moetier.tiers.monitor import Monitor


def test_it_is_a_lock() -> None:
    monitor, count = Monitor(), 0

    def add() -> None:
        nonlocal count
        for _ in range(2000):
            with monitor:
                seen = count
                count = seen + 1

    for task in [Task(add) for _ in range(4)]:
        task.result()
    assert count == 8000


def test_sleepers_wake_and_hold_the_lock_again() -> None:
    monitor, asleep, awake, go = Monitor(), 0, [], False

    def sleep() -> None:
        nonlocal asleep
        with monitor:
            asleep += 1
            while not go:
                monitor.sleep()
            assert monitor._lock.locked()
            awake.append(threading.current_thread())

    tasks = [Task(sleep) for _ in range(3)]
    while True:
        with monitor:
            if asleep == 3:
                monitor.wake()  # for nothing: they sleep on
                go = True
                monitor.wake()
                break
    for task in tasks:
        task.result()
    assert len(awake) == 3


def test_a_posted_work_is_done_at_once_or_by_the_holder() -> None:
    monitor, done = Monitor(), []
    monitor.post(lambda: done.append("at once"))
    assert done == ["at once"]
    with monitor:
        monitor.post(lambda: done.append("later"))  # by the very thread that holds it: a lock would wait for ever
        Task(lambda: monitor.post(lambda: done.append("from elsewhere"))).result()
        assert done == ["at once"]
    assert done == ["at once", "later", "from elsewhere"]


def test_a_posted_work_is_done_before_its_holder_sleeps() -> None:
    """What a sleeper waits for may be just what was posted while it held the lock."""
    monitor, given = Monitor(), False

    def give() -> None:
        nonlocal given
        given = True
        monitor.wake()

    def sleep() -> None:
        with monitor:
            monitor.post(give)
            while not given:
                monitor.sleep()

    Task(sleep).result()


def test_an_error_leaves_the_lock_free() -> None:
    monitor = Monitor()
    with pytest.raises(KeyError), monitor:
        raise KeyError
    assert not monitor._lock.locked()


def test_finalizers_may_post_at_any_moment() -> None:
    """With the garbage collector at work on nearly every allocation, also while the lock is held."""
    monitor, made, ended = Monitor(), 0, 0

    def end() -> None:
        nonlocal ended
        ended += 1

    class Lost:
        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            monitor.post(end)

    def work() -> None:
        nonlocal made
        for _ in range(300):
            with monitor:
                for _ in range(5):
                    Lost()
                    made += 1

    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for task in [Task(work) for _ in range(2)]:
            task.result()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert ended == made == 3000
