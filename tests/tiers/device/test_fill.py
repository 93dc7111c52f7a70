"""How a slot of the device is filled: for a demand and for a promotion, and what is left when it is not."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from consumers import PLAN, RECORDS, device_of, record_bytes
from readers import RamReader
from stores import keys

from moetier.tiers.cache.pool import SlotState
from moetier.tiers.device.copies import Copies
from moetier.tiers.device.device_pool import DevicePool, DeviceSlots
from moetier.tiers.device.fill import DeviceDemand, DeviceFill
from moetier.tiers.device.promoter import Promoter
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor
from moetier.tiers.source import Lease
from moetier.tiers.stats import TierCounters, TierStats

KEY, OTHER, THIRD = keys(0, 0, 1, 2)


class Filling:
    """The parts of a device tier that fill its slots, of which there are three."""

    def __init__(self, host: HostTier) -> None:
        self.host, self.device, self.counters = host, device_of(), TierCounters("device")
        self.slots = DeviceSlots(self.device, PLAN, {"records": 3}, "lru", self.counters)
        monitor, layout = Monitor(), PLAN.layouts["records"]
        promoter = Promoter(
            host,
            monitor,
            self.counters,
            promote=lambda lease: self.fill.promote(lease),
            make_room=lambda: None,
            yields=lambda: False,
        )
        self.copies = Copies(self.device, layout.record_bytes)
        self.fill = DeviceFill(monitor, self.slots, self.copies, self.counters, promoter, lambda: None)

    @property
    def pool(self) -> DevicePool:
        return self.slots.pool(KEY.block)

    @property
    def stats(self) -> TierStats:
        return self.slots.stats()

    def lease(self, key: ExpertKey, *, is_valid: bool = True) -> Lease[memoryview]:
        """A lease that may end as soon as it is copied."""
        (lease,) = self.host.acquire([key])
        return lease._replace(proof=lambda: is_valid)

    def copy(self, *wanted: ExpertKey, is_valid: bool = True) -> DeviceDemand:
        """A demand that has what was copied for it."""
        demand = DeviceDemand(self.pool, caller=1)
        for key in wanted:
            assert self.fill.copy_for(demand, self.lease(key, is_valid=is_valid), time.perf_counter(), wait=True)
        return demand


@pytest.fixture
def filling() -> Iterator[Filling]:
    with HostTier(RamReader(PLAN, RECORDS), slots={"records": 12}) as host:
        filling = Filling(host)
        yield filling
        filling.device.finish()
        filling.copies.close()


def test_a_record_is_copied_and_pinned(filling: Filling) -> None:
    demand = filling.copy(KEY)
    (slot,) = demand.ready
    filling.device.finish()
    assert record_bytes(filling.pool.records[slot]) == RECORDS[KEY]
    assert (filling.stats.ready, filling.stats.leased, filling.stats.waits) == (1, 1, 1)
    assert filling.stats.bytes_in == filling.pool.slot_bytes
    assert demand.filling is None


def test_a_record_that_another_demand_has_copied_is_not_copied_again(filling: Filling) -> None:
    first, second = filling.copy(KEY), filling.copy(KEY)
    assert first.ready == second.ready
    assert (filling.stats.joined, filling.stats.bytes_in) == (1, filling.pool.slot_bytes)


def test_a_record_that_was_replaced_meanwhile_is_discarded(filling: Filling) -> None:
    demand = filling.copy(KEY, is_valid=False)
    assert (demand.ready, demand.filling) == ([], None)
    assert filling.pool.state_of(KEY) is SlotState.EMPTY
    assert (filling.stats.discarded, filling.stats.failures) == (1, 0)


def test_a_copy_that_fails_leaves_an_empty_slot(filling: Filling) -> None:
    filling.device.copy_error = RuntimeError("the device is gone")
    with pytest.raises(RuntimeError, match="gone"):
        filling.copy(KEY)
    assert filling.pool.state_of(KEY) is SlotState.EMPTY
    assert not filling.slots.is_filling
    assert (filling.stats.discarded, filling.stats.failures) == (0, 1)
    assert filling.copy(KEY).ready


def test_a_demand_that_does_not_wait_gets_no_slot_of_another(filling: Filling) -> None:
    holders = filling.copy(KEY, OTHER, THIRD)
    demand = DeviceDemand(filling.slots.pool(1), caller=2)
    lease = filling.lease(ExpertKey(1, 0))
    assert not filling.fill.copy_for(demand, lease, time.perf_counter(), wait=False)
    assert filling.stats.evictions == 0
    filling.pool.unpin(holders.ready.pop())
    assert filling.fill.copy_for(demand, lease, time.perf_counter(), wait=False)
    assert filling.stats.evictions == 1


def test_a_record_that_is_not_requested_is_not_promoted(filling: Filling) -> None:
    filling.fill.promote(filling.lease(KEY))
    assert filling.pool.state_of(KEY) is SlotState.EMPTY
    assert filling.stats.prefetched == 0


def test_a_repair_leaves_the_pins_of_demands_alone(filling: Filling) -> None:
    demand = filling.copy(KEY)
    filling.copy(OTHER)  # its demand is cut off before it is among the others
    filling.fill.repair([demand])
    assert (filling.stats.ready, filling.stats.leased) == (2, 1)


def test_a_fill_that_is_left_is_undone(filling: Filling) -> None:
    demand = DeviceDemand(filling.pool, caller=1)
    slot = filling.pool.choose(KEY.block)
    assert slot is not None
    demand.begin_fill(slot, KEY)
    filling.pool.begin_fill(slot, KEY)
    filling.fill.end(demand)
    assert filling.pool.state_of(KEY) is SlotState.EMPTY
    filling.fill.end(demand)
    assert filling.copy(KEY).ready
