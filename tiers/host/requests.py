"""What the host tier's ledger writes down of its callers: who wants what, what is under way for them, and where to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Hashable, Sequence
from statistics import median

from moetier.tiers.cache.orders import DEFAULT_ORDER
from moetier.tiers.cache.pool import SlotPool
from moetier.tiers.cache.quotas import Group
from moetier.tiers.layout import ExpertKey

from .staging import Head

READS_KEPT = 15  # of a pool: how long a read takes is their median


class Pool(SlotPool):
    """The host's slots of one record geometry."""

    def __init__(
        self, count: int, groups: Sequence[Group], first: int, slot_bytes: int, order: str = DEFAULT_ORDER
    ) -> None:
        super().__init__(count, groups, first, slot_bytes, order)
        self.hungry: deque[Demand] = deque()
        self._reads: deque[float] = deque(maxlen=READS_KEPT)  # seconds that the latest took
        self._read_seconds: float | None = None  # their median; None: to be found

    @property
    def read_seconds(self) -> float | None:
        """That the read of a record takes: the median of the latest. None until there are some."""
        if self._read_seconds is None and self._reads:
            self._read_seconds = median(self._reads)
        return self._read_seconds

    def note_read(self, seconds: float) -> None:
        self._reads.append(seconds)
        self._read_seconds = None


class Load:
    """A record on its way into a slot, and who waits for it."""

    __slots__ = (
        "began",
        "has_stood_back",
        "head",
        "is_taken",
        "key",
        "pool",
        "slot",
        "waiters",
        "warmed",
        "was_late",
        "wished",
    )

    def __init__(
        self, pool: Pool, key: ExpertKey, slot: int, *, wished: bool, began: float, warmed: bool = False
    ) -> None:
        self.pool = pool
        self.key = key
        self.slot = slot
        self.wished = wished  # a wish began it, or
        self.warmed = warmed  # the warm-up, which stands back as wishes do
        self.began = began  # seconds, of the ledger's clock
        self.was_late = False  # a demand came while a wish's was under way
        self.is_taken = wished  # by a loader: a wish is begun by the loader that reads it
        self.has_stood_back = False  # while others were read for demands
        self.head: Head[Pool] | None = None  # what has been read of it already
        self.waiters: list[Demand] = []


class Party(ABC):
    """A caller that is told instead of woken. ``leases`` slots are held for it at most, claims counted."""

    def __init__(self, leases: int) -> None:
        assert leases > 0
        self.leases = leases
        self.outstanding = 0  # slots that its demands hold or claim; the ledger counts
        self.demands: dict[Demand, None] = {}

    @abstractmethod
    def grant(self, demand: Demand, slot: int) -> None:
        """A slot is the demand's, until it is released."""

    @abstractmethod
    def refuse(self, demand: Demand, error: BaseException) -> None:
        """The demand has failed; it holds nothing any more."""

    @property
    def is_full(self) -> bool:
        return self.outstanding >= self.leases


class Demand:
    """One call of acquire. Each of its keys is in one of pending, loads, ready, held, or is done with."""

    __slots__ = (
        *("block", "caller", "error", "held", "loads", "party", "passing", "patience", "pending", "pool", "ready"),
        *("residents", "stands_since"),
    )

    def __init__(
        self, pool: Pool, block: int, *, caller: Hashable, party: Party | None = None, patience: float = 0.0
    ) -> None:
        self.pool = pool
        self.block = block
        self.caller = caller  # whose turn it is in
        self.party = party
        self.patience = patience  # seconds that a party's demand waits while it has nothing
        self.passing = False  # a passage: wants more than its block can keep
        self.pending: dict[ExpertKey, None] = {}  # no slot yet
        self.loads: list[Load] = []  # claims
        self.ready: deque[int] = deque()  # pinned, not leased yet
        self.residents = 0  # of those that are ready: how many were when it came
        self.held: dict[int, None] = {}  # pinned, leased
        self.error: BaseException | None = None
        self.stands_since: float | None = None  # of a party's: when it had nothing, and was given nothing at once

    @property
    def is_idle(self) -> bool:
        """Nothing to compute with, and nothing in flight that will be."""
        return not self.ready and not self.loads and not self.held

    @property
    def is_over(self) -> bool:
        return not self.pending and self.is_idle

    @property
    def outstanding(self) -> int:
        """Slots that it holds or claims."""
        return len(self.loads) + len(self.ready) + len(self.held)
