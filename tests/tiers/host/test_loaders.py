"""Loaders: threads that read the records of loads, one each at a time, and report how each read ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
from ledgers import MANIFEST
from readers import PATIENCE

from moetier.tiers.arena.directory import Directory
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.errors import ClosedError, StoreReadError
from moetier.tiers.host.demands import Demand, Load, ThreadCaller
from moetier.tiers.host.ledger import Ledger
from moetier.tiers.host.loaders import Loaders
from moetier.tiers.host.loads import LoadLimits
from moetier.tiers.host.waiting import Notifier
from moetier.tiers.layout import ExpertKey, PoolSlot
from moetier.tiers.locks import Monitor
from moetier.tiers.store.base import Pause

BLOCK = 1
A, B = ExpertKey(BLOCK, 0), ExpertKey(BLOCK, 1)


class Reading:
    """A ledger with loaders, whose reads do what ``read`` says."""

    def __init__(self, read: Callable[[Load, Pause | None], None], *, loaders: int = 2) -> None:
        layout = ArenaLayout.of(MANIFEST, {"big": 3, "small": 6})
        directory = Directory.create(memoryview(bytearray(layout.directory_bytes)), layout)
        self.monitor = Monitor()
        notifier = Notifier(self.monitor)
        self.ledger = Ledger(
            MANIFEST, layout, directory, notifier, LoadLimits(ahead=4, prefetches=1), policy="lru", loads_rest=False
        )
        self.failed = threading.Event()  # a thread has ended with an error
        self.loaders = Loaders(self.monitor, self.ledger.loads, notifier, read, self._run)
        self.loaders.start(loaders)

    def _run(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception:
            self.failed.set()

    def acquire(self, keys: Sequence[ExpertKey]) -> list[PoolSlot]:
        """Wait for all records, and return their slots. Raises the error of a demand that has failed."""
        demand = self.ledger.new_demand(BLOCK, ThreadCaller(threading.get_ident()))
        self.monitor.run(self.ledger.begin, demand, keys)
        slots, is_last = list[PoolSlot](), False
        while not is_last:
            more, is_last = self.monitor.wait_for(self.ledger.next_leases, demand)
            slots += more
        self.monitor.run(self.ledger.end, demand)
        if demand.error is not None:
            raise demand.error
        return slots

    def close(self) -> None:
        self.monitor.run(self.ledger.close, ClosedError("closed", "none"))
        self.loaders.close()


@pytest.fixture
def opened() -> Iterator[list[Reading]]:
    readings: list[Reading] = []
    yield readings
    for reading in readings:
        reading.close()


def test_each_record_is_read_once_and_the_demand_gets_its_slot(opened: list[Reading]) -> None:
    read: list[ExpertKey] = []
    opened.append(reading := Reading(lambda load, pause: read.append(load.key)))
    slots = reading.acquire([A, B])
    assert {reading.ledger.slots.slot_of(key) for key in (A, B)} == {*slots}
    assert sorted(read) == [A, B]
    assert reading.ledger.stats().misses == 2


def test_records_are_read_at_the_same_time(opened: list[Reading]) -> None:
    both = threading.Barrier(2, timeout=PATIENCE)
    opened.append(reading := Reading(lambda load, pause: both.wait()))
    assert len(reading.acquire([A, B])) == 2


def test_an_error_of_a_read_reaches_the_demand_and_ends_no_loader(opened: list[Reading]) -> None:
    def read(load: Load, pause: Pause | None) -> None:
        if load.key == A and not failures:
            failures.append(load.key)
            raise StoreReadError("The disk has failed.", "Replace it.")

    failures: list[ExpertKey] = []
    opened.append(reading := Reading(read, loaders=1))
    with pytest.raises(StoreReadError, match="has failed"):
        reading.acquire([A])
    assert len(reading.acquire([A])) == 1, "the next demand reads afresh"
    assert (reading.ledger.stats().failures, reading.failed.is_set()) == (1, False)


@pytest.mark.parametrize("loaders", [1, 2])
def test_a_prefetch_may_pause_only_beside_another_loader(opened: list[Reading], loaders: int) -> None:
    pauses: list[Pause | None] = []
    arrived = threading.Event()

    def read(load: Load, pause: Pause | None) -> None:
        pauses.append(pause)
        arrived.set()

    opened.append(reading := Reading(read, loaders=loaders))
    reading.monitor.run(reading.ledger.prefetch, BLOCK, [A])
    assert arrived.wait(PATIENCE)
    reading.acquire([B])
    assert [pause is not None for pause in pauses] == [loaders > 1, False]


def test_a_loader_that_fails_itself_is_reported(opened: list[Reading], monkeypatch: pytest.MonkeyPatch) -> None:
    opened.append(reading := Reading(lambda load, pause: None, loaders=1))
    monkeypatch.setattr(reading.ledger.loads, "take", lambda: 1 / 0)
    demand: Demand = reading.ledger.new_demand(BLOCK, ThreadCaller(threading.get_ident()))
    reading.monitor.run(reading.ledger.begin, demand, [A])
    assert reading.failed.wait(PATIENCE)
