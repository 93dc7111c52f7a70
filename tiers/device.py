"""The device tier: records where they are computed on. It sees the tier below only as an ExpertSource.

A device does what it is told later, and each stream in its own time. Three orders are kept:

    compute on a slot starts after the copy into it: the stream of the lease waits for the copy's event;
    the copy that refills a slot starts after every use of it: the copy stream waits for an event that was recorded, at
    the end of each lease, on the stream that used it;
    a lease of the host ends after the copy out of it: the caller waits for the copy's event before it takes the next.

Nobody waits for ever: a caller that waits for the host holds no slot of this tier, so all that are held belong to
callers that are awake and compute. Who waits for a slot, a lease of the host in hand, waits for one of those.

What is wished for is promoted in the background (``promoter.py``), where the tier is told to.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial

import torch

from .budget import members, slot_ranges
from .errors import BudgetError, ClosedError
from .keys import ExpertKey
from .manifest import Manifest
from .monitor import Monitor
from .policy import BlockPolicy, plan_groups
from .promoter import Promoter
from .slots import Slots, State
from .source import ExpertSource, Lease
from .stats import TierCounters, TierStats
from .stream import Device, Event, Stream
from .views import SlotViews


class _Pool:
    """The slots of one record geometry. ``first`` is the number of its first slot in the tier."""

    def __init__(self, manifest: Manifest, array: str, first: int, memory: torch.Tensor) -> None:
        """``memory`` [slots * slot_bytes] uint8, on the device."""
        layout = manifest.layouts[array]
        slots = memory.view(-1, layout.slot_bytes)
        self.first = first
        self.slot_bytes = layout.slot_bytes
        self.slots = Slots(len(slots))
        self.policy = BlockPolicy(self.slots, plan_groups(len(slots), members(manifest, array)))
        self.records = [slot[: layout.record_bytes] for slot in slots]
        self.copied: list[Event | None] = [None] * len(slots)  # the end of the copy into a slot
        self.used: list[dict[Stream, Event]] = [{} for _ in slots]  # the end of each stream's last use of a slot

    def clear(self) -> None:
        """The memory goes, or stays as long as a record of it is held."""
        self.records.clear()


class _Visit:
    """One call of acquire."""

    __slots__ = ("leased", "misses", "pool", "ready")

    def __init__(self, pool: _Pool) -> None:
        self.pool = pool
        self.misses = False  # records; the promoter stands back until it leaves
        self.ready: deque[int] = deque()  # pinned, not yielded yet
        self.leased: tuple[int, Stream] | None = None  # pinned; computed on in this stream


class DeviceTier:
    """Equal slots in one allocation per record geometry, least recently used per block, filled from the host's leases.

    One thread must not acquire again inside the loop over an acquire.
    """

    def __init__(
        self,
        source: ExpertSource[memoryview],
        manifest: Manifest,
        *,
        slots: Mapping[str, int],
        device: Device,
        promotes: bool = False,
        on_hits: Callable[[Sequence[ExpertKey]], None] | None = None,
    ) -> None:
        """Allocates ``slots`` by array, as ``slots_for`` gives them, or fewer, with a warning, where the device has no
        room for them. Raises BudgetError when it has none for one token's experts. ``on_hits`` is told what was found
        here: the source hears of the rest by itself. Unless it ``promotes`` what is wished for, a wish ends in the
        source."""
        assert slots.keys() == manifest.layouts.keys()
        self._source = source  # stays its owner's to close
        self._device = device
        self._on_hits = on_hits
        self._manifest = manifest
        self._monitor = Monitor()
        self._counters = TierCounters("device")
        self._views = SlotViews(self._lock_pages, self._retire)
        self._locked: list[torch.Tensor] = []  # host memory that is page-locked
        self._retired: list[torch.Tensor] = []  # that is to be unlocked, since the host has other memory now
        self._pageable = False  # once that has failed
        self._wished: set[int] = set()  # blocks whose wishes were passed on
        self._copying = 0  # slots that a caller is filling now
        self._closed = False
        self._pools: dict[str, _Pool] = {}
        first = 0
        for array, memory in _allocate(device, manifest, slots).items():
            self._pools[array] = _Pool(manifest, array, first, memory)
            first += self._pools[array].slots.count
        self._promoter: Promoter | None = None
        if promotes:
            self._promoter = Promoter(source, self._monitor, self._counters, self._fulfil)

    def acquire(self, keys: Sequence[ExpertKey]) -> Generator[Lease[torch.Tensor], None, None]:
        """As ``ExpertSource`` says. A record is computed on in the stream that is current when its lease is taken.

        Raises MissingExpertError for a key that the model does not have.
        """
        if not keys:
            return
        self._manifest.check_keys(keys[0].block, keys)
        visit = _Visit(self._pool(keys[0].block))
        try:
            missing = self._look(visit, keys)
            while visit.ready:
                yield self._lease(visit)
                self._release(visit)
            if not missing:
                return
            with closing(self._source.acquire(missing)) as leases:
                began = time.perf_counter()
                for lease in leases:
                    copied = self._promote(visit, lease, began)
                    if copied is None:
                        continue  # the host's record was replaced while it was copied: it comes again
                    try:
                        yield self._lease(visit)
                    finally:
                        copied.synchronize()  # the host's lease ends with the next, or with this iterator
                    self._release(visit)
                    began = time.perf_counter()
        finally:
            self._monitor.post(partial(self._leave, visit))

    def prefetch(self, block: int, wishes: Sequence[ExpertKey]) -> None:
        """As ``ExpertSource`` says: what the device lacks is wished for in the host, and promoted from there."""
        self._manifest.check_keys(block, wishes)
        with self._monitor:
            self._check_open()
            absent = [key for key in wishes if self._pool(block).slots.find(key) is None]
            self._wished.add(block)
            if self._promoter is not None:
                self._promoter.wish(block, wishes, absent)
        self._source.prefetch(block, absent)

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """As ``ExpertSource`` says; where nothing is promoted, of the host: to have it there is all a wish can do."""
        if self._promoter is None:
            return self._source.absent(keys)
        with self._monitor:
            return [key for key in keys if self._pool(key.block).slots.find(key) is None]

    def stats(self) -> TierStats:
        with self._monitor:
            pools = self._pools.values()
            return self._counters.snapshot(
                slots=sum(pool.slots.count for pool in pools),
                ready=sum(pool.slots.ready for pool in pools),
                slot_bytes=sum(pool.slots.count * pool.slot_bytes for pool in pools),
            )

    def close(self) -> None:
        """As ``ExpertSource`` says; the source stays open. A lease stays usable while its record is held.

        Does nothing in a forked child, where the device can't be used.
        """
        if not self._monitor.home.is_here:
            return
        with self._monitor:
            self._closed = True
            if self._promoter is not None:
                self._promoter.stop()
            self._monitor.wake()
            while self._copying:
                self._monitor.sleep()
            locked, self._locked = self._locked, []
        if self._promoter is not None:
            self._promoter.join()
        self._unlock(locked)
        for pool in self._pools.values():
            pool.clear()
        self._views.clear()

    def check_integrity(self) -> None:
        """Asserts that slots, groups and promotions agree."""
        with self._monitor:
            for pool in self._pools.values():
                pool.slots.check_integrity()
                pool.policy.check_integrity()
            states = [pool.slots.state(slot) for pool in self._pools.values() for slot in range(pool.slots.count)]
            assert states.count(State.LOADING) == self._copying
            if self._promoter is not None:
                self._promoter.check_integrity(lambda key: self._pool(key.block).slots.find(key))

    def _look(self, visit: _Visit, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Pins the residents; returns the others."""
        slots, missing, promoter = visit.pool.slots, [], self._promoter
        with self._monitor:
            self._check_open()
            if promoter is not None:
                promoter.wish(keys[0].block, (), ())
            for key in dict.fromkeys(keys):
                slot = slots.find(key)
                if slot is not None and promoter is not None:
                    promoter.used(key)
                if slot is not None and slots.is_ready(slot):
                    slots.pin(slot)
                    visit.ready.append(slot)
                else:
                    missing.append(key)
            for slot in reversed(visit.ready):  # what is given first is evicted last
                visit.pool.policy.touch(slot)
            if missing and promoter is not None:
                promoter.stand_back()
                visit.misses = True
            self._counters.hits += len(visit.ready)
            self._counters.misses += len(missing)
            hits = [slots.key(slot) for slot in visit.ready] if self._on_hits is not None else []
            wished = keys[0].block in self._wished
            self._wished.discard(keys[0].block)
        if self._on_hits is not None and hits:
            self._on_hits(hits)
        if wished and not missing:  # else the host learns of the demand by itself
            self._source.prefetch(keys[0].block, ())
        return missing

    def _promote(self, visit: _Visit, lease: Lease[memoryview], began: float) -> Event | None:
        """Puts a record that the host has leased into a slot, and returns the end of the copy.

        None if the lease did not hold so long. One that has to be proved costs a wait for its copy: nobody may compute
        on what is not proved.
        """
        pool = visit.pool
        with self._monitor:
            self._check_open()
            while True:
                slot = pool.slots.find(lease.key)
                if slot is not None and pool.slots.is_ready(slot):  # since this caller looked
                    copied = pool.copied[slot]
                    assert copied is not None
                    self._counters.joined += 1
                    pool.policy.touch(slot)
                    self._admit(visit, slot, began)
                    return copied  # the lease was not used, so there is nothing to prove
                if slot is None:
                    slot = self._choose(pool, lease.key.block)
                    if slot is not None:
                        break
                self._monitor.sleep()
                self._check_open()
            self._begin(pool, slot, lease.key)
        copied = self._transfer(pool, slot, lease)
        if copied is not None:
            with self._monitor:
                self._arrive(pool, slot, copied)
                self._admit(visit, slot, began)
        return copied

    def _fulfil(self, lease: Lease[memoryview]) -> None:
        """Promotes what the host has leased for a wish, if that still stands and has a slot. The lease may end then."""
        promoter, pool, key = self._promoter, self._pool(lease.key.block), lease.key
        assert promoter is not None
        with self._monitor:
            if not promoter.may_begin(key):
                return
            slot = None
            if pool.slots.find(key) is None:
                slot = pool.policy.choose(key.block, keep=promoter.__contains__)
            if slot is None:
                promoter.drop(key)
                return
            self._begin(pool, slot, key, wished=True)
            promotion = promoter.begin(key)
        copied = self._transfer(pool, slot, lease)
        if copied is not None:
            with self._monitor:
                self._arrive(pool, slot, copied)
            copied.synchronize()
            promotion.seconds = time.perf_counter() - promotion.began

    def _choose(self, pool: _Pool, block: int) -> int | None:
        """The slot for a demand: one of what is wished for only if there is no other."""
        slot = None
        if self._promoter is not None:
            slot = pool.policy.choose(block, keep=self._promoter.__contains__)
        return pool.policy.choose(block, borrow=True) if slot is None else slot

    def _begin(self, pool: _Pool, slot: int, key: ExpertKey, *, wished: bool = False) -> None:
        if pool.slots.is_ready(slot):
            if self._promoter is not None:
                self._promoter.evict(pool.slots.key(slot))
            pool.policy.forget(slot)
            pool.slots.evict(slot)
            self._counters.evictions += 1
        pool.slots.begin(slot, key)
        pool.policy.admit(key.block, slot, early=wished)
        self._copying += 1

    def _transfer(self, pool: _Pool, slot: int, lease: Lease[memoryview]) -> Event | None:
        """Queues the copy into a slot that was begun, and returns its end; None if the lease did not hold so long."""
        try:
            copied = self._copy(lease, pool.records[slot], pool.used[slot].values())
            if lease.proof is not None:
                copied.synchronize()
            holds = lease.holds()
        except BaseException:
            with self._monitor:
                self._counters.failures += 1
                self._give_up(pool, slot)
            raise
        if holds:
            return copied
        with self._monitor:
            self._counters.discarded += 1
            self._give_up(pool, slot)
        return None

    def _arrive(self, pool: _Pool, slot: int, copied: Event) -> None:
        self._counters.bytes_in += pool.slot_bytes
        pool.copied[slot] = copied
        pool.used[slot].clear()
        self._end_copying()
        pool.slots.fill(slot)
        self._monitor.wake()

    def _end_copying(self) -> None:
        self._copying -= 1
        if self._retired and not self._copying:  # nobody begins a copy while the lock is held
            retired, self._retired = self._retired, []
            self._unlock(retired)

    def _unlock(self, locked: list[torch.Tensor]) -> None:
        """When no copy out of it is under way any more."""
        for pool in self._pools.values():
            for event in pool.copied:
                if event is not None:
                    event.synchronize()
        for memory in locked:
            self._device.unlock_pages(memory)

    def _give_up(self, pool: _Pool, slot: int) -> None:
        """What was to be promoted into a slot is not there."""
        self._end_copying()
        if self._promoter is not None:
            self._promoter.fail(pool.slots.key(slot))
        pool.policy.forget(slot)
        pool.slots.fail(slot)
        self._monitor.wake()

    def _copy(self, lease: Lease[memoryview], record: torch.Tensor, uses: Iterable[Event]) -> Event:
        """Queues the copy behind all uses of the slot; nobody touches a slot that is LOADING."""
        copies = self._device.copy_stream()
        for use in uses:
            copies.wait_event(use)
        self._device.copy(record, self._views.of(lease))
        return copies.record_event()

    def _admit(self, visit: _Visit, slot: int, began: float) -> None:
        visit.pool.slots.pin(slot)
        visit.ready.append(slot)
        self._counters.waited(time.perf_counter() - began)

    def _lease(self, visit: _Visit) -> Lease[torch.Tensor]:
        pool, stream = visit.pool, self._device.current_stream()
        with self._monitor:
            self._check_open()
            slot = visit.ready.popleft()
            visit.leased = (slot, stream)
            copied, key, record = pool.copied[slot], pool.slots.key(slot), pool.records[slot]
        assert copied is not None
        stream.wait_event(copied)
        return Lease(key, record, pool.first + slot)

    def _release(self, visit: _Visit) -> None:
        with self._monitor:
            self._end_lease(visit)
            self._monitor.wake()

    def _end_lease(self, visit: _Visit) -> None:
        if visit.leased is not None:
            slot, stream = visit.leased
            visit.leased = None
            visit.pool.used[slot][stream] = stream.record_event()
            visit.pool.slots.unpin(slot)

    def _leave(self, visit: _Visit) -> None:
        """Gives back all that a caller holds."""
        self._end_lease(visit)
        if visit.misses and self._promoter is not None:
            visit.misses = False
            self._promoter.go_on()
        while visit.ready:
            visit.pool.slots.unpin(visit.ready.popleft())
        self._monitor.wake()

    def _lock_pages(self, view: torch.Tensor) -> None:
        if self._pageable:
            return
        if self._device.lock_pages(view):
            self._locked.append(view)
            return
        self._pageable = True
        warnings.warn(
            "The system does not page-lock the host tier: copies to the device will be slower.",
            RuntimeWarning,
            stacklevel=2,
        )

    def _retire(self, views: list[torch.Tensor]) -> None:
        """By who copies out of the memory that took their place."""
        gone = set(map(id, views))
        self._retired += [memory for memory in self._locked if id(memory) in gone]
        self._locked = [memory for memory in self._locked if id(memory) not in gone]

    def _pool(self, block: int) -> _Pool:
        return self._pools[self._manifest.blocks[block].array]

    def _check_open(self) -> None:
        if self._closed:
            raise _closed_error()


def _allocate(device: Device, manifest: Manifest, slots: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Memory for ``slots`` by array; for fewer, with one warning, where the device has no room for them."""
    fewest = {array: least for array, (least, _) in slot_ranges(manifest).items()}
    sizes = {array: layout.slot_bytes for array, layout in manifest.layouts.items()}
    counts = dict(slots)
    while True:
        try:
            memory = {array: device.allocate(count * sizes[array]) for array, count in counts.items()}
        except torch.OutOfMemoryError:
            fewer = {array: max(fewest[array], count * 3 // 4) for array, count in counts.items()}
            if fewer == counts:
                least = sum(count * sizes[array] for array, count in fewest.items())
                raise BudgetError(
                    f"The device has no room for the {least:,} bytes of the experts that one token needs in one block.",
                    "Free some of its memory, or run on the CPU.",
                ) from None
            counts = fewer
        else:
            break
    if counts != slots:
        warnings.warn(
            f"The device has room for {sum(counts.values())} experts, not for {sum(slots.values())}; it caches fewer.",
            RuntimeWarning,
            stacklevel=3,
        )
    return memory


def _closed_error() -> ClosedError:
    return ClosedError("The device tier was closed.", "Load the model again.")
