from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable

import pytest
from cuts import cut
from threads import Task, sleeps, wait_until

from moetier.tiers.errors import ConfigError
from moetier.tiers.locks import Monitor, UseCount, deferred, posted, transition, waiting


class Account:
    """Each method is a transition, and notes when it runs."""

    def __init__(self) -> None:
        self._monitor = Monitor()
        self.log: list[str] = []
        self.balance = 0

    @transition
    def pay_in(self, amount: int) -> int:
        self.note("pay in")
        self.close()
        self.balance += amount
        self._monitor.wake()
        self.log.append("paid in")
        return self.balance

    @waiting
    def pay_out(self, amount: int) -> int | None:
        if self.balance < amount:
            return None
        self.balance -= amount
        return self.balance

    @posted
    def close(self) -> None:
        self.log.append("closed")

    @deferred
    def note(self, text: str) -> None:
        self.log.append(text)


def test_a_method_runs_when_its_decorator_says() -> None:
    account = Account()
    taker = Task(lambda: account.pay_out(5))
    wait_until(lambda: sleeps(taker.thread))
    account.note("a note")
    assert not account.log, "it runs with the next transition"
    assert account.pay_in(7) == 7
    assert account.log[:2] == ["a note", "paid in"], "what is posted in a transition runs after it"
    assert taker.result() == 2
    account.close()
    assert account.log[2:].count("closed") == 2
    assert account.log.count("pay in") == 1


def test_a_transition_that_calls_another_one_fails_instead_of_waiting_for_itself() -> None:
    account = Account()
    monitor = account._monitor
    with pytest.raises(AssertionError, match="another transition"):
        monitor.run(lambda: account.pay_in(1))
    assert account.pay_in(2) == 2, "the lock is free again"
    assert Task(lambda: account.pay_in(3)).result() == 5


def test_a_thread_goes_on_after_its_interrupted_transition_while_another_holds_the_lock() -> None:
    account, entered, go = Account(), threading.Event(), threading.Event()
    with pytest.raises(ZeroDivisionError):
        account._monitor.run(lambda: 1 // 0)
    other = Task(lambda: account._monitor.run(lambda: (entered.set(), go.wait(60))))
    assert entered.wait(60)
    threading.Timer(0.1, go.set).start()
    assert account.pay_in(2) == 2
    other.result()


def test_transitions_run_one_at_a_time() -> None:
    monitor, count = Monitor(), 0

    def add() -> None:
        nonlocal count
        seen = count
        count = seen + 1

    def work() -> None:
        for _ in range(2000):
            monitor.run(add)

    for task in [Task(work) for _ in range(4)]:
        task.result()
    assert count == 8000


def test_a_transition_that_waits_is_repeated_when_it_is_woken() -> None:
    monitor, looks, awake, go = Monitor(), 0, [], False

    def change() -> bool | None:
        nonlocal looks
        looks += 1
        if go:
            awake.append(threading.current_thread())
        return go or None

    tasks = [Task(lambda: monitor.wait_for(change)) for _ in range(3)]
    wait_until(lambda: all(sleeps(task.thread) for task in tasks))
    before = looks
    monitor.run(monitor.wake)  # for nothing: they sleep on
    wait_until(lambda: looks == before + 3)

    def end() -> None:
        nonlocal go
        go = True
        monitor.wake()

    monitor.run(end)
    assert all(task.result() for task in tasks)
    assert len(awake) == 3


def test_a_posted_work_is_done_at_once_or_behind_the_transition() -> None:
    monitor, done = Monitor(), []
    monitor.post(lambda: done.append("at once"))
    assert done == ["at once"]

    def change() -> None:
        monitor.post(lambda: done.append("later"))  # by the thread in the transition itself: a lock would wait for ever
        Task(lambda: monitor.post(lambda: done.append("from elsewhere"))).result()
        assert done == ["at once"]

    monitor.run(change)
    assert done == ["at once", "later", "from elsewhere"]


def test_a_posted_work_is_done_before_its_poster_sleeps() -> None:
    """A transition may wait for work that was posted during it."""
    monitor, given = Monitor(), False

    def give() -> None:
        nonlocal given
        given = True
        monitor.wake()

    def change() -> bool | None:
        monitor.post(give)
        return given or None

    assert Task(lambda: monitor.wait_for(change)).result()


def test_marked_work_runs_once_after_each_transition_that_marks_or_wakes() -> None:
    monitor, log = Monitor(), list[str]()

    def change(*steps: Callable[[], None]) -> None:
        for step in steps:
            step()
        log.append("changed")

    def work() -> None:
        log.append("worked")
        if log.count("worked") == 1:
            monitor.mark()  # it has to run again

    monitor.run(change, monitor.mark)
    assert log == ["changed"], "there is no work yet"
    monitor.run_after_mark(work)
    monitor.run(change, monitor.mark, monitor.wake, monitor.mark)
    assert log[1:] == ["changed", "worked", "worked"]
    monitor.run(change)
    monitor.run(change, monitor.wake)
    assert log[4:] == ["changed", "changed", "worked"]


def test_marked_work_runs_after_a_later_mark_wherever_an_exception_cuts_one() -> None:
    number = 0
    while True:
        monitor, done = Monitor(), list[int]()
        monitor.run_after_mark(lambda: done.append(1))  # noqa: B023
        if cut(lambda: monitor.run(monitor.mark), number) is None:  # noqa: B023
            break
        done.clear()
        monitor.run(monitor.mark)
        assert done, number
        number += 1
    assert number > 5


def test_an_error_leaves_the_lock_free_and_does_posted_work() -> None:
    monitor, done = Monitor(), []

    def change() -> None:
        monitor.post(lambda: done.append(1))
        raise KeyError

    with pytest.raises(KeyError):
        monitor.run(change)
    assert done == [1]
    assert Task(lambda: monitor.run(lambda: 5)).result() == 5


def test_what_was_cut_is_mended_once_before_the_next_transition() -> None:
    repaired = 0

    def repair() -> None:
        nonlocal repaired
        repaired += 1

    def refuse() -> None:
        raise ConfigError("no", "none")

    monitor = Monitor(repair)
    with pytest.raises(ConfigError):
        monitor.run(refuse)  # of its own accord, where all agrees
    monitor.run(lambda: None)
    assert repaired == 0
    with pytest.raises(ZeroDivisionError):
        monitor.run(lambda: 1 / 0)
    monitor.post(lambda: None)
    monitor.run(lambda: None)
    assert repaired == 1


def test_posted_work_that_always_fails_does_not_stop_other_transitions() -> None:
    monitor = Monitor()
    with pytest.raises(ZeroDivisionError):
        monitor.post(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        monitor.run(lambda: None)  # the work may have been cut from outside, so it is tried again
    assert monitor.run(lambda: 5) == 5


def test_wherever_an_exception_cuts_it_the_lock_is_free_and_posted_work_is_done() -> None:
    """Sleeping threads are woken too."""
    number = 0
    while True:
        done: list[int] = []
        monitor = Monitor(lambda: monitor.wake())  # noqa: B023  # as tiers do
        sleeper = Task(lambda: monitor.wait_for(lambda: bool(done) or None))  # noqa: B023
        wait_until(lambda: sleeps(sleeper.thread))  # noqa: B023

        def change() -> None:
            monitor.post(lambda: done.append(1))  # noqa: B023
            monitor.wake()  # noqa: B023

        def work() -> None:
            monitor.run(change)  # noqa: B023
            monitor.run(monitor.wake)  # noqa: B023

        is_cut = cut(work, number) is not None
        done.append(0)
        Task(lambda: monitor.run(monitor.wake)).result()  # noqa: B023
        assert sleeper.result()
        found = list(done)
        monitor.run(lambda: None)
        assert done == found, "nothing was left to do"
        if not is_cut:
            break
        number += 1
    assert number > 20


def test_finalizers_may_post_at_any_moment() -> None:
    """The garbage collector runs at nearly every allocation, even inside a transition."""
    monitor, made, ended = Monitor(), 0, 0

    def end() -> None:
        nonlocal ended
        ended += 1

    class Lost:
        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            monitor.post(end)

    def change() -> None:
        nonlocal made
        for _ in range(5):
            Lost()
            made += 1

    def work() -> None:
        for _ in range(300):
            monitor.run(change)

    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for task in [Task(work) for _ in range(2)]:
            task.result()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert ended == made == 3000


def test_an_exception_from_outside_leaves_no_use_behind() -> None:
    for number in itertools.count():
        uses = UseCount("The store")

        def work(uses: UseCount = uses) -> None:
            with uses.use():
                pass

        exception = cut(work, number)
        Task(uses.close).result()
        if exception is None:
            break
    assert number > 3
