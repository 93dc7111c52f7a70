"""Pages of keys and values have their turns between reads of records: demands, pages, prefetches, writes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from host_tiers import PLAN, RECORDS, take
from readers import PATIENCE, GatedReader
from stores import keys
from threads import Task

from moetier.tiers.disk_order import DiskOrder
from moetier.tiers.host import disk_order
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey

DEMANDED, PREFETCHED = ExpertKey(0, 0), ExpertKey(1, 0)


@pytest.fixture
def gate() -> Iterator[GatedReader]:
    reader = GatedReader(PLAN, RECORDS)
    yield reader
    reader.open()


class PageRead:
    """A thread that reads a page: ``begun`` once it may, and it ends with ``end``."""

    def __init__(self, order: DiskOrder) -> None:
        self.begun, self.end = threading.Event(), threading.Event()
        self.task = Task(lambda: self._read(order))

    def _read(self, order: DiskOrder) -> None:
        with order.reading_page():
            self.begun.set()
            assert self.end.wait(PATIENCE)


def test_a_page_waits_for_a_demand(gate: GatedReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_order, "PAGE_PATIENCE", PATIENCE)
    with HostTier(gate, slots={"records": 12}) as tier:
        demand = Task(lambda: take(tier, 0, 0))
        gate.wait_begun(DEMANDED)
        page = PageRead(tier.disk_order)
        assert not page.begun.wait(0.1)
        gate.release(DEMANDED)
        demand.result()
        assert page.begun.wait(PATIENCE)
        page.end.set()
        page.task.result()


def test_a_page_does_not_wait_for_a_demand_that_hangs(gate: GatedReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_order, "PAGE_PATIENCE", 0.1)
    with HostTier(gate, slots={"records": 12}) as tier:
        demand = Task(lambda: take(tier, 0, 0))
        gate.wait_begun(DEMANDED)
        page = PageRead(tier.disk_order)
        assert page.begun.wait(PATIENCE)
        page.end.set()
        page.task.result()
        gate.open()
        demand.result()


def test_a_prefetch_waits_for_a_page(gate: GatedReader) -> None:
    with HostTier(gate, slots={"records": 12}) as tier:
        page = PageRead(tier.disk_order)
        assert page.begun.wait(PATIENCE)
        tier.prefetch(1, keys(1, 0))
        demand = Task(lambda: take(tier, 0, 0))
        gate.wait_begun(DEMANDED)  # a demand does not wait
        gate.release(DEMANDED)
        demand.result()
        assert set(gate.reads) == {DEMANDED}
        page.end.set()
        gate.wait_begun(PREFETCHED)
        gate.open()


@pytest.mark.parametrize("what", ["demand", "prefetch", "page"])
def test_a_write_waits_for_all_reads(gate: GatedReader, what: str) -> None:
    with HostTier(gate, slots={"records": 12}) as tier:
        page = None
        if what == "demand":
            Task(lambda: take(tier, 0, 0))
            gate.wait_begun(DEMANDED)
        elif what == "prefetch":
            tier.prefetch(1, keys(1, 0))
            gate.wait_begun(PREFETCHED)
        else:
            page = PageRead(tier.disk_order)
            assert page.begun.wait(PATIENCE)
        may_write = threading.Event()

        def write() -> None:
            tier.disk_order.wait_to_write(lambda: False)
            may_write.set()

        task = Task(write)
        assert not may_write.wait(0.1)
        gate.open()
        if page is not None:
            page.end.set()
        task.result()


def test_a_write_that_has_become_urgent_waits_for_one_read_at_most(gate: GatedReader) -> None:
    with HostTier(gate, slots={"records": 12}) as tier:
        demand, is_urgent = Task(lambda: take(tier, 0, 0, 1)), threading.Event()
        gate.wait_begun(DEMANDED)
        write = Task(lambda: tier.disk_order.wait_to_write(is_urgent.is_set))
        is_urgent.set()
        gate.release(DEMANDED)
        write.result()
        gate.open()
        demand.result()


def test_nothing_waits_for_a_tier_that_is_closed(gate: GatedReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_order, "PAGE_PATIENCE", PATIENCE)
    tier = HostTier(gate, slots={"records": 12})
    demand = Task(lambda: take(tier, 0, 0))
    gate.wait_begun(DEMANDED)
    page, write = PageRead(tier.disk_order), Task(lambda: tier.disk_order.wait_to_write(lambda: False))
    page.end.set()
    closing = Task(tier.close)
    page.task.result()
    write.result()
    gate.open()
    closing.result()
    with pytest.raises(Exception, match="closed"):
        demand.result()
    tier.disk_order.wait_to_write(lambda: False)
