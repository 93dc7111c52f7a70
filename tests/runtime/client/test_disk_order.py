"""A client of a daemon reads and writes pages of keys and values when it waits for no records."""

from __future__ import annotations

import itertools
import threading

import pytest
from cuts import cut
from readers import PATIENCE
from threads import Task

from moetier.runtime.client import disk_order
from moetier.runtime.client.disk_order import ClientDiskOrder


class Read:
    """A thread that reads a page: ``begun`` once it may, and it ends with ``end``."""

    def __init__(self, order: ClientDiskOrder) -> None:
        self.begun, self.end = threading.Event(), threading.Event()
        self.task = Task(lambda: self._read(order))

    def _read(self, order: ClientDiskOrder) -> None:
        with order.reading_page():
            self.begun.set()
            assert self.end.wait(PATIENCE)


def test_a_page_waits_for_a_miss_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_order, "PAGE_PATIENCE", PATIENCE)
    order = ClientDiskOrder()
    with order.waiting_for_records():
        read = Read(order)
        assert not read.begun.wait(0.1)
        assert order.is_reading_page, "no prefetch is requested meanwhile"
    assert read.begun.wait(PATIENCE)
    read.end.set()
    read.task.result()
    assert not order.is_reading_page
    monkeypatch.setattr(disk_order, "PAGE_PATIENCE", 0.05)
    with order.waiting_for_records(), order.reading_page():
        pass


def test_a_write_waits_for_misses_and_pages_unless_it_is_urgent() -> None:
    order, is_urgent = ClientDiskOrder(), threading.Event()
    with order.waiting_for_records():
        write = Task(lambda: order.wait_to_write(lambda: False))
        urgent = Task(lambda: order.wait_to_write(is_urgent.is_set))
        is_urgent.set()
        with order.waiting_for_records():
            pass
        urgent.result()
        read = Read(order)
        assert read.begun.wait(PATIENCE)
        assert write.thread.is_alive()
    assert write.thread.is_alive()
    read.end.set()
    write.result()


def test_a_write_that_becomes_urgent_waits_no_longer() -> None:
    order, begun, is_urgent = ClientDiskOrder(), threading.Event(), threading.Event()

    def asked() -> bool:
        begun.set()
        return is_urgent.is_set()

    with order.waiting_for_records():
        write = Task(lambda: order.wait_to_write(asked))
        assert begun.wait(PATIENCE)
        is_urgent.set()
        write.result()


def test_an_error_of_a_miss_ends_its_wait() -> None:
    order = ClientDiskOrder()
    with pytest.raises(ZeroDivisionError), order.waiting_for_records():
        raise ZeroDivisionError
    order.wait_to_write(lambda: False)


def test_an_exception_from_outside_leaves_no_wait_behind() -> None:
    for way in ("waiting_for_records", "reading_page"):
        for number in itertools.count():
            order = ClientDiskOrder()

            def work(order: ClientDiskOrder = order, way: str = way) -> None:
                with getattr(order, way)():
                    pass

            exception = cut(work, number)
            Task(lambda order=order: order.wait_to_write(lambda: False)).result()
            assert not order.is_reading_page
            if exception is None:
                break
        assert number > 2
