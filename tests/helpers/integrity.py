"""Checks that the parts of a tier's state agree. They read private attributes, as most invariants show nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from moetier.tiers.arena.directory import NO_ENTRY, Directory
from moetier.tiers.cache.pool import SlotPool
from moetier.tiers.host.demands import AsyncCaller, Demand, LoadState
from moetier.tiers.host.ledger import Ledger
from moetier.tiers.host.loads import Loads
from moetier.tiers.host.tier import HostTier
from moetier.tiers.host.waiting import WaitingDemands
from moetier.tiers.layout import ExpertKey


def check_integrity(tier: Any) -> None:
    """Assert in a transition that slots, partitions, loads, callers and directory of a host or device tier agree."""
    if isinstance(tier, HostTier):
        tier._monitor.run(check_ledger, tier._ledger)
    else:
        tier._monitor.run(_check_device, tier)


def _check_device(tier: Any) -> None:
    for pool in tier._slots.pools.values():
        check_pool(pool)
    assert all(tier._slots.slot_of(key) is not None for key in tier._promoter.outcomes.unused)


def check_ledger(ledger: Ledger) -> None:
    """Assert that slots, partitions, loads, demands and the directory agree."""
    for pool in ledger.slots.pools.values():
        check_pool(pool)
        held = Counter(slot for demand in ledger._demands if demand.pool is pool for slot in demand.slots)
        assert held == {slot: pins for slot, pins in enumerate(pool._pins) if pins}
        loading = {key for key, is_loading in pool.contents() if is_loading}
        assert loading == {load.key for load in ledger.loads if load.pool is pool}
        assert all(demand in ledger._demands and demand.is_idle and demand.pending for demand in pool.starved)
    check_directory(ledger._directory, ledger.slots.contents())
    assert {load for demand in ledger._demands for load in demand.loads} <= set(ledger.loads)
    check_loads(ledger.loads)
    queue = ledger._prefetches
    followed = {*queue._outcomes._began, *queue._outcomes.unused, *queue._warmed}
    assert all(key in queue._copied or ledger.slots.slot_of(key) is not None for key in followed)
    _check_waiting(ledger.waiting, ledger._demands)


def check_pool(pool: SlotPool) -> None:
    """Assert that each slot is in one state, and each key in one slot and in the right partition."""
    held = {key: slot for slot, (key, _) in enumerate(pool.contents()) if key is not None}
    assert held == pool._slots
    assert sorted([*held.values(), *pool._free]) == list(range(pool.slot_count))
    assert pool._loading <= set(held.values())
    pins = pool._pins
    assert min(pins) >= 0
    assert not any(pins[slot] for slot in pool._free)
    placed = [(key, number) for number, policy in enumerate(pool.partitions._policies) for key in policy]
    assert sorted(placed) == sorted((key, pool.partitions._number_of[key.block]) for key in held)
    sizes = [len(policy) for policy in pool.partitions._policies]
    assert sizes == [len(list(policy)) for policy in pool.partitions._policies]


def check_loads(loads: Loads) -> None:
    """Assert that the loads, the demands that wait for them, and the queue agree."""
    by_key = {load.key: load for load in loads}
    assert loads._loads == by_key
    for load in loads:
        assert load.waiters == [demand for demand in load.waiters if load in demand.loads]
    waiting = [load for queue in loads._queue._queues.values() for load in queue]
    queued = [load for load in waiting if load.state is LoadState.QUEUED]
    assert all(by_key[load.key] is load for load in queued)
    assert {load.key for load in queued} == {load.key for load in loads if load.state is LoadState.QUEUED}


def check_directory(directory: Directory, states: Sequence[tuple[ExpertKey | None, bool]]) -> None:
    """Assert that the directory agrees with ``states`` (see ``Directory.repair``), unless it was closed."""
    if directory._is_closed:
        return
    table = [NO_ENTRY] * directory._layout.keys
    for slot, (key, is_loading) in enumerate(states):
        assert directory.generation(slot) & 1 == is_loading, f"slot {slot}"
        if not is_loading:
            assert directory.content(slot) == key, f"slot {slot}"
            if key is not None:
                table[directory._number(key)] = slot
    assert directory._table.tolist() == table


def _check_waiting(waiting: WaitingDemands, demands: Collection[Demand]) -> None:
    """Assert that no asynchronous demand is lost, and that none of them waits although it can go on."""
    for caller in {demand.caller for demand in demands if isinstance(demand.caller, AsyncCaller)}:
        assert set(caller.demands.values()) == {demand for demand in demands if demand.caller is caller}
        assert caller.outstanding <= caller.max_leases
        for demand in caller.demands.values():
            rechecked = demand in waiting._rechecks
            assert rechecked or not demand.ready, "slots that are ready are granted at once"
            assert rechecked or not demand.is_over
            waits = bool(demand.pending) and demand.is_idle
            assert rechecked or waits == (demand in waiting._deadlines)
            assert not caller.is_full or demand not in demand.pool.starved
            assert rechecked or caller.is_full or not waits or demand in demand.pool.starved
    assert all(demand in demands for demand in (*waiting._rechecks, *waiting._deadlines))
