"""A thread that waits for items gets each of them in time, whatever signals come meanwhile."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty

import pytest
from readers import PATIENCE

from moetier.tiers.inbox import Inbox

POLL_SECONDS = 0.05
HELD_SECONDS = 0.01  # for which another thread keeps the GIL: Python handles signals a fifth of POLL_SECONDS late


class Interrupted(Exception):
    """Raised by the handler of a signal."""


@contextmanager
def signals(handle: Callable[[], None], count: int, pause: Callable[[], float]) -> Iterator[threading.Thread]:
    """Send signals to this process, with pauses, on the thread that is yielded; ``handle`` is called for each."""

    def send() -> None:
        for _ in range(count):
            time.sleep(pause())
            os.kill(os.getpid(), signal.SIGUSR1)

    former = signal.signal(signal.SIGUSR1, lambda *_: handle())
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield thread
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, former)


def test_items_come_in_their_order() -> None:
    inbox = Inbox[int]()
    for number in range(3):
        inbox.put(number)
    assert [inbox.get(0) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(Empty):
            inbox.get(0)
    inbox.put(3)
    assert inbox.get(0) == 3


def test_each_item_of_several_threads_comes_once() -> None:
    inbox = Inbox[tuple[int, int]]()
    threads = [
        threading.Thread(target=lambda first: [inbox.put((first, number)) for number in range(1000)], args=(first,))
        for first in range(3)
    ]
    for thread in threads:
        thread.start()
    got = [inbox.get(PATIENCE) for _ in range(3000)]
    assert [[number for first, number in got if first == each] for each in range(3)] == [[*range(1000)]] * 3


def test_the_timeout_holds_although_signals_are_handled_late() -> None:
    inbox, over, longest = Inbox[None](), threading.Event(), 0.0

    def compute() -> None:
        keep_gil = ctypes.PyDLL(None).usleep
        give_up = time.monotonic() + PATIENCE
        while not over.is_set() and time.monotonic() < give_up:
            keep_gil(int(HELD_SECONDS * 1e6))

    computing = threading.Thread(target=compute)
    computing.start()
    with signals(lambda: None, 60, lambda: random.uniform(0.01, 0.05)) as sending:
        waker = threading.Timer(PATIENCE, inbox.put, (None,))  # what waits for ever is woken, and fails
        waker.start()
        while sending.is_alive():
            began = time.monotonic()
            with pytest.raises(Empty):
                inbox.get(POLL_SECONDS)
            longest = max(longest, time.monotonic() - began)
        waker.cancel()
        over.set()
    computing.join()
    assert longest < PATIENCE / 2


def test_an_exception_of_a_handler_loses_nothing() -> None:
    """At any of its moments: what was put is got, and who puts is never kept waiting."""
    inbox, got, interrupted, gets = Inbox[int](), list[int](), 0, False

    def handle() -> None:
        nonlocal gets
        if gets:
            gets = False
            raise Interrupted

    def put() -> None:
        for number in range(20_000):
            inbox.put(number)
            if number % 50 == 0:
                time.sleep(0.001)
        inbox.put(-1)

    putting = threading.Thread(target=put)
    with signals(handle, 300, lambda: 0.002):
        putting.start()
        deadline = time.monotonic() + PATIENCE
        while (not got or got[-1] != -1) and time.monotonic() < deadline:
            try:
                gets = True
                item = inbox.get(0.001)
                gets = False
            except Empty:
                gets = False
            except Interrupted:
                interrupted += 1
            else:
                got.append(item)
    putting.join(PATIENCE)
    assert not putting.is_alive()
    assert interrupted
    lost = 20_001 - len(got)
    assert got == [*sorted(got[:-1]), -1]
    assert lost <= interrupted  # an item that was just taken out, before it was returned
