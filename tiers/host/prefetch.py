"""What is read before a demand comes, for wishes and for the warm-up, and what became of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from moetier.tiers.layout import ExpertKey
from moetier.tiers.stats import TierCounters

from .requests import Load, Party, Pool
from .staging import QUICK_SECONDS, Head, Heads
from .wishes import Wishes


class Place(NamedTuple):
    """Where a record is to be read to."""

    pool: Pool
    key: ExpertKey
    slot: int | None  # None: beside the slots
    warmed: bool  # by the warm-up; else for a wish


class Early:
    """The tier's own wishes are nobody's: of no party."""

    def __init__(self, counters: TierCounters, heads: Heads[Pool] | None = None) -> None:
        """Without ``heads`` what is wished for evicts as soon as its read begins."""
        self.heads = heads
        self._counters = counters
        self._wishes: Wishes[Pool] = Wishes()
        self._warming: deque[tuple[Pool, ExpertKey]] = deque()  # not begun
        self._warmed: set[ExpertKey] = set()  # brought by the warm-up, READY, not wanted yet
        self._unused: dict[ExpertKey, float] = {}  # brought by wishes, READY: seconds that each read took
        self._above: dict[ExpertKey, float] = {}  # likewise, but evicted here: the tier above may have them
        self._lent: set[ExpertKey] = set()  # of these two, what the tier above has borrowed: it may be evicted here

    @property
    def unbegun(self) -> int:
        """How many have not begun."""
        return len(self._wishes) + len(self._warming)

    @property
    def waiting(self) -> int:
        """How many a loader could read something of: not begun, or gone no further than a piece."""
        idle = sum([head.is_idle and self.is_wished(head.key) for head in self.heads or ()])
        return self.unbegun + idle

    # -- what is to come ----------------------------------------------------------------------------------------------

    def is_wished(self, key: ExpertKey) -> bool:
        """Whether anybody's latest wishes name it, begun or not, here or not."""
        return key in self._wishes

    def wish(self, pool: Pool, block: int, wishes: Sequence[ExpertKey], wisher: Party | None) -> bool:
        """Replaces a wisher's wishes for a block. Whether any of these is to be read."""
        lacking = [key for key in wishes if pool.slots.find(key) is None]
        absent = lacking if self.heads is None else [key for key in lacking if key not in self.heads]
        self._counters.cancelled += self._wishes.replace(wisher, block, pool, wishes, absent)
        return bool(lacking)

    def withdraw(self, wisher: Party) -> None:
        """All of a wisher's."""
        self._counters.cancelled += self._wishes.withdraw(wisher)

    def warm(self, pool: Pool, keys: Sequence[ExpertKey]) -> None:
        self._warming.extend((pool, key) for key in keys)

    def drop(self) -> None:
        """Nothing is to come any more."""
        self._wishes.clear()
        self._warming.clear()

    def mend(self) -> None:
        """After a step that was cut: no prefetch request is known."""
        self._wishes.clear()

    def take(self) -> Place | None:
        """What is begun next, wishes first; None if there is nothing that has a place. A wish takes an EMPTY slot, else
        one that an earlier wish filled in vain, of any group, else one of the heads; without these, or where reads are
        quick, that of what is neither held nor wished, of its own. The warm-up evicts nothing. Both stand back where
        somebody is hungry."""
        for wisher, pool, key in self._wishes.take(lambda pool: not pool.hungry):
            heads = self.heads_for(pool)
            if pool.slots.find(key) is None and (self.heads is None or key not in self.heads):
                slot = self._cheap(pool, key) if heads is not None else self.place(pool, key)
                if slot is not None or heads is not None:
                    self._wishes.served(wisher)
                    self._counters.prefetched += 1
                    return Place(pool, key, slot, warmed=False)
                self._counters.cancelled += 1
        while self._warming:
            pool, key = self._warming.popleft()
            if pool.slots.find(key) is None and not pool.hungry:
                slot = pool.policy.vacancy(key.block)
                if slot is not None:
                    return Place(pool, key, slot, warmed=True)
        return None

    def place(self, pool: Pool, key: ExpertKey) -> int | None:
        """The slot for what is wished: one that costs nothing, or of what is neither held nor wished, of its own
        group."""
        slot = self._cheap(pool, key)
        return pool.policy.choose(key.block, keep=self.is_wished) if slot is None else slot

    def _cheap(self, pool: Pool, key: ExpertKey) -> int | None:
        slot = pool.policy.vacancy(key.block)
        return self._leftover(pool) if slot is None else slot

    def _leftover(self, pool: Pool) -> int | None:
        """Of a wish that was wrong: so the next one costs its block no record."""
        for key in self._unused:
            slot = pool.slots.find(key)
            if slot is not None and not self.is_wished(key) and pool.slots.is_evictable(slot):
                return slot
        return None

    # -- what became of it --------------------------------------------------------------------------------------------

    def join(self, load: Load, seconds: float) -> None:
        """The first demand for what is being read for so many seconds."""
        load.was_late = True
        if not load.warmed:
            self._counters.late += 1
            self._counters.saved_seconds += seconds

    def claim(self, seconds: float) -> None:
        """A demand wants what was read beside the slots for so many seconds."""
        self._counters.joined += 1
        self._counters.late += 1
        self._counters.saved_seconds += seconds

    def heads_for(self, pool: Pool) -> Heads[Pool] | None:
        """None where reads are over before pieces would pay."""
        seconds = pool.read_seconds
        return None if seconds is not None and seconds < QUICK_SECONDS else self.heads

    def make_room(self) -> bool:
        """Whether there is room for one more head, perhaps in place of one that nobody wishes for any more."""
        if self.heads is None or self.heads.has_room:
            return True
        if self.heads.clear(self.is_wished):
            self._counters.cancelled += 1
        return self.heads.has_room

    def give_up(self, head: Head[Pool]) -> None:
        """There is no slot for it, and others wait for its room."""
        assert self.heads is not None
        self.heads.end(head)
        self._counters.cancelled += 1

    def arrive(self, load: Load, seconds: float) -> None:
        """It is READY, and its read took so many seconds."""
        if load.warmed:
            self._counters.warmed += 1
            if load.was_late:
                self._counters.recalled += 1
            else:
                self._warmed.add(load.key)
        elif load.wished and not load.was_late:
            self._unused[load.key] = seconds

    def lend(self, key: ExpertKey) -> None:
        """To the tier above."""
        if key in self._unused or key in self._warmed:
            self._lent.add(key)

    def use(self, key: ExpertKey) -> None:
        """By a demand: if a wish brought it, or the warm-up, that was right."""
        self._lent.discard(key)
        if key in self._warmed:
            self._warmed.remove(key)
            self._counters.recalled += 1
        if (seconds := self._forget(key)) is not None:
            self._counters.useful += 1
            self._counters.saved_seconds += seconds

    def evict(self, key: ExpertKey) -> None:
        if key not in self._lent:
            self._waste(key)
        elif (seconds := self._unused.pop(key, None)) is not None:
            self._above[key] = seconds

    def begin(self, key: ExpertKey) -> None:
        """It is read, for whomever. If it was lent, it was not used, and is lost above as well."""
        if key in self._lent:
            self._lent.remove(key)
            self._waste(key)

    def _waste(self, key: ExpertKey) -> None:
        """It is lost: if a wish brought it, that was wrong."""
        self._warmed.discard(key)
        if self._forget(key) is not None:
            self._counters.wasted += 1

    def _forget(self, key: ExpertKey) -> float | None:
        return self._unused.pop(key, None) if key in self._unused else self._above.pop(key, None)
