"""Records on their way into slots: what is read next, for whom, and what came of it.

Part of the ledger: no I/O, and its owner's lock is held. What demands begin goes first; wishes and the warm-up have
what demands leave of the disk. Every load ends by ``arrive``, ``fail`` or ``cancel``, or before a loader takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from moetier.tiers.arena.directory import Directory
from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import Pace, interruptible_bytes
from moetier.tiers.stats import TierCounters

from .prefetch import Early
from .requests import Demand, Load, Party, Pool
from .staging import Head, head_bytes, piece_bytes
from .turns import Turns
from .waiting import Waiting


class Loads:
    """``ring`` wakes a loader; ``prefetches`` reads that wishes began are in flight at most, pieces among them."""

    def __init__(
        self,
        directory: Directory,
        counters: TierCounters,
        early: Early,
        waiting: Waiting,
        *,
        ring: Callable[[], None],
        prefetches: int,
        clock: Callable[[], float],
    ) -> None:
        self.drop_error: BaseException | None = None
        self.lacks_slots = False  # what is full beside the slots, and wished for, found none
        self._heads = early.heads
        self._directory = directory
        self._counters = counters
        self._early = early
        self._waiting = waiting
        self._ring = ring
        self._prefetches = prefetches
        self._clock = clock
        self._turns = Turns()
        self._loads: dict[ExpertKey, Load] = {}

    def __len__(self) -> int:
        return len(self._loads)

    def __iter__(self) -> Iterator[Load]:
        return iter(self._loads.values())

    # -- for demands --------------------------------------------------------------------------------------------------

    def begin(
        self, pool: Pool, key: ExpertKey, slot: int, *, wished: bool, passing: bool = False, warmed: bool = False
    ) -> Load:
        """Into a slot that is EMPTY, or evictable."""
        evicted = pool.begin(slot, key, passing=passing, early=wished)
        if evicted is not None:
            self._counters.evictions += 1
            self._early.evict(evicted)
        self._early.begin(key)
        self._directory.withdraw(evicted, pool.first + slot)
        load = self._loads[key] = Load(pool, key, slot, wished=wished, began=self._clock(), warmed=warmed)
        if self._heads is not None and (head := self._heads.claim(key)) is not None:
            load.head = head
            seconds = head.seconds + (self._clock() - head.began if head.is_reading else 0.0)
            if wished:
                load.began -= seconds
            else:
                self._early.claim(seconds)
        return load

    def join(self, demand: Demand, key: ExpertKey) -> None:
        """A demand, which claims the slot, waits for what has begun."""
        load = self._loads[key]
        if load.wished:
            if not load.was_late:
                self._early.join(load, self._clock() - load.began)
            # Its loader may sleep, and must look at every first waiter: an earlier one may have left before it looked.
            self._waiting.wake()
        load.waiters.append(demand)
        demand.loads.append(load)
        if not load.is_taken:
            self._turns.add(demand.caller, load)

    def leave(self, demand: Demand, load: Load) -> None:
        """A demand, which claims the slot no longer, does not wait. What no loader has begun and nobody else wants is
        not begun any more."""
        load.waiters.remove(demand)
        if load.waiters:
            return
        if not load.is_taken:
            self._void(load)
            load.is_taken = True
        if not self._is_for_demands:  # prefetches that yielded to it may go on
            self._waiting.wake()
            self._ring_for_wishes()

    # -- for wishes ---------------------------------------------------------------------------------------------------

    def wish(self, pool: Pool, block: int, wishes: Sequence[ExpertKey], *, wisher: Party | None = None) -> None:
        """Replaces a wisher's wishes for a block; the tier's own are nobody's. What is there already stays the longer
        for being wished, and wakes nobody."""
        if self._early.wish(pool, block, wishes, wisher):
            self._ring_for_wishes()

    def withdraw_wishes(self, wisher: Party) -> None:
        """All of a wisher's."""
        self._early.withdraw(wisher)

    def warm(self, pool: Pool, keys: Sequence[ExpertKey]) -> None:
        """Reads these beforehand, behind all wishes, each into an EMPTY slot of its group or not at all."""
        self._early.warm(pool, keys)
        self._ring_for_wishes()

    def pace(self, pool: Pool) -> Pace | None:
        """Of the pool's records; None where too little is known."""
        read, whole, counted = pool.read_seconds, pool.slot_bytes, self._counters
        if read is None or not (right := counted.useful + counted.late):
            return None
        saved = counted.saved_seconds / right
        if self._early.heads_for(pool) is None:
            return Pace(read, read * interruptible_bytes(whole) / whole, saved)
        return Pace(read, read * piece_bytes(whole, read) / whole, saved, read * head_bytes(whole) / whole)

    def _begin_wish(self) -> Load | Head[Pool] | None:
        """None while anything is read for a demand: wishes have what demands leave of the disk. What has begun beside
        the slots goes on first, and what is full there goes on in a slot when nothing else is to begin."""
        if self._is_for_demands or self._prefetching >= self._prefetches:
            return None
        for head in self._heads or ():
            if head.may_grow and self._early.is_wished(head.key):
                return self._grow(head)
        while True:
            if self._early.unbegun and self._early.make_room():
                place = self._early.take()
                if place is not None and place.slot is not None:
                    return self.begin(place.pool, place.key, place.slot, wished=True, warmed=place.warmed)
                if place is not None and self._heads is not None:
                    pool = place.pool
                    return self._grow(self._heads.begin(pool, place.key, pool.slot_bytes, pool.read_seconds))
            full = [head for head in self._heads or () if head.is_full and head.is_idle]
            full = [head for head in full if self._early.is_wished(head.key) and not head.place.hungry]
            for head in full:
                if (slot := self._early.place(head.place, head.key)) is not None:
                    return self.begin(head.place, head.key, slot, wished=True)
            self.lacks_slots = bool(full)
            if not full or not self._early.unbegun:
                return None
            self._early.give_up(full[0])

    def _grow(self, head: Head[Pool]) -> Head[Pool]:
        head.grow(self._clock())
        return head

    def grown(self, head: Head[Pool], error: BaseException | None = None) -> None:
        """The piece that was being read is there, or won't come: the demand will meet the error again, if any comes."""
        assert self._heads is not None
        filled = head.filled
        self._heads.read(head, self._clock() - head.began, error)
        self._counters.bytes_in += head.filled - filled
        if error is not None and not head.is_claimed:
            self._counters.failures += 1
            self._heads.end(head)

    def _ring_for_wishes(self) -> None:
        waiting = self._early.waiting
        if waiting and not self._is_for_demands:
            for _ in range(min(waiting, self._prefetches - self._prefetching)):
                self._ring()

    @property
    def _is_for_demands(self) -> bool:
        """Whether anything is read for a demand."""
        return any(load.waiters or not load.wished for load in self._loads.values())

    @property
    def _prefetching(self) -> int:
        reading = 0 if self._heads is None else self._heads.reading
        return reading + sum([load.wished for load in self._loads.values()])

    # -- loaders ------------------------------------------------------------------------------------------------------

    def take(self) -> Load | Head[Pool] | None:
        """What a loader reads next: a record, or a piece of a head; None if there is nothing to do. Demands first, and
        of those one of the caller who was served the longest ago: somebody's hundred are not before another's one."""
        return self._turns.take() or self._begin_wish()

    def arrive(self, load: Load) -> None:
        """Its record is in the slot."""
        self._counters.bytes_in += load.pool.slot_bytes - (load.head.filled if load.head is not None else 0)
        self._forget(load)
        load.pool.slots.fill(load.slot)
        self._directory.publish(load.key, load.pool.first + load.slot)
        self._early.arrive(load, self._clock() - load.began)
        for demand in load.waiters:
            demand.ready.append(load.slot)  # first: a record in both is found by mend, one in neither would be lost
            demand.loads.remove(load)
            if demand.party is not None:
                self._waiting.stir(demand)
        self._waiting.wake()
        if load.waiters or not load.wished:
            self._ring_for_wishes()  # perhaps it was the last for a demand

    def stands_back(self, load: Load) -> bool:
        """Whether a load that nobody but wishes wants is to wait, as others are read for demands."""
        return not load.waiters and self._is_for_demands

    def is_unwanted(self, load: Load) -> bool:
        """Whether a load that a wish began is for nobody any more; of the warm-up, whether it is in anybody's way."""
        if load.warmed and not load.waiters:
            return self.is_dropped or bool(load.pool.hungry)
        return not load.waiters and not self._early.is_wished(load.key)

    def cancel(self, load: Load) -> None:
        """End a load that its loader has just found unwanted: in the same step, or a demand could join it between."""
        self._counters.cancelled += not load.warmed
        self._void(load)
        self._waiting.wake()

    def fail(self, load: Load, error: BaseException) -> None:
        """Its record won't come. The slot is EMPTY again, and everyone who waits for it gets the error."""
        if self._loads.get(load.key) is not load:
            return  # its arrival was cut, and mend has let its demands look again
        self._void(load)
        for demand in load.waiters:
            demand.loads.remove(load)
            demand.error = demand.error or error
            self._waiting.count(demand, -1)
            if demand.party is not None:
                self._waiting.stir(demand)
        self._waiting.wake()

    @property
    def is_dropped(self) -> bool:
        return self.drop_error is not None

    def drop(self, error: BaseException) -> None:
        """No loader will begin anything any more."""
        self.drop_error = error
        self._early.drop()
        for load in self._turns.take_all():
            self.fail(load, error)

    def _forget(self, load: Load) -> None:
        del self._loads[load.key]
        if (head := load.head) is not None:
            assert self._heads is not None
            load.head = None
            self._heads.end(head)

    def _void(self, load: Load) -> None:
        self._forget(load)
        load.pool.fail(load.slot)
        self._directory.void(load.pool.first + load.slot)

    def mend(self, demands: Collection[Demand]) -> None:
        """After a step that was cut: a load is what a loader reads, or a demand waits for."""
        self._early.mend()
        for demand in demands:
            for load in [load for load in demand.loads if self._loads.get(load.key) is not load]:
                if load.slot not in demand.ready:  # its arrival was cut: the demand looks for the record again
                    demand.pending[load.key] = None
                demand.loads.remove(load)
        self._turns.clear()
        for load in list(self._loads.values()):
            load.waiters = [demand for demand in demands if load in demand.loads]
            if not load.is_taken and not load.waiters:
                del self._loads[load.key]
            elif not load.is_taken:
                for demand in load.waiters:
                    self._turns.add(demand.caller, load)
                self._ring()
        if self._heads is not None:
            self._heads.mend([load.head for load in self._loads.values() if load.head is not None])

    def check_integrity(self) -> None:
        """Asserts that loads, those who wait for them and turns agree."""
        for key, load in self._loads.items():
            assert load.key == key
            assert load.waiters == [demand for demand in load.waiters if load in demand.loads]
        queued = list(self._turns)
        assert all(self._loads[load.key] is load for load in queued)
        for head in self._heads or ():
            assert head.is_claimed == (head.key in self._loads and self._loads[head.key].head is head)
        assert {load.key for load in queued} == {key for key, load in self._loads.items() if not load.is_taken}
