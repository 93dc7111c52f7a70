"""What the host tier's ledger keeps books on: pools of slots, demands and their callers, loads, and leases granted."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from statistics import median

from moetier.tiers.cache.pool import SlotPool
from moetier.tiers.cache.quotas import Group
from moetier.tiers.layout import ExpertKey

READS_KEPT = 15  # latest reads of a pool; the median of their times is its read time


class Pool(SlotPool):
    """The host's slots of one record geometry."""

    def __init__(self, count: int, groups: Sequence[Group], first: int, slot_bytes: int, order: str) -> None:
        super().__init__(count, groups, first, slot_bytes, order)
        self.starved: deque[Demand] = deque()  # demands that hold nothing and wait for a slot, in order of arrival
        self.read_seconds: float | None = None  # median time of the latest reads; None before the first
        self._reads: deque[float] = deque(maxlen=READS_KEPT)  # seconds

    def note_read(self, seconds: float) -> None:
        """Record how long the read of one record took."""
        self._reads.append(seconds)
        self.read_seconds = median(self._reads)


class StagingBuffer:
    """The first ``filled`` bytes of a record."""

    def __init__(self, pool: Pool, key: ExpertKey, buffer: memoryview, step: int) -> None:
        self.pool = pool  # that the record belongs to
        self.key = key
        self.buffer = buffer
        self.step = step  # bytes of a piece
        self.filled = 0
        self.end = 0  # of the piece that is being read; else as ``filled``
        self.seconds = 0.0  # that reading has taken
        self.began = 0.0  # the latest piece, by the ledger's clock
        self.error: BaseException | None = None
        self.is_claimed = False  # by a load, which reads the rest
        self.piece_read = threading.Event()  # cleared while a piece is being read
        self.piece_read.set()

    @property
    def is_reading(self) -> bool:
        """Whether a piece is being read into it."""
        return self.end > self.filled

    @property
    def is_full(self) -> bool:
        """Whether all of the buffer is filled."""
        return self.filled == len(self.buffer)

    @property
    def is_idle(self) -> bool:
        """Whether it is neither claimed nor being read into."""
        return not (self.is_claimed or self.is_reading)

    def begin_piece(self, now: float) -> None:
        """Note that the next piece is about to be read."""
        self.piece_read.clear()
        self.end = min(self.filled + self.step, len(self.buffer))
        self.began = now


@dataclass(eq=False, slots=True)
class Load:
    """A record on its way into a slot, and the demands that wait for it."""

    pool: Pool
    key: ExpertKey
    slot: int
    is_prefetch: bool  # begun for a prefetch request or for the warm-up, and not for a demand
    is_warmup: bool
    began: float  # seconds, by the ledger's clock
    is_taken: bool  # by a loader; a prefetch is begun by the loader that reads it
    has_yielded: bool = False  # paused while records were read for demands
    staged: StagingBuffer | None = None  # holds the beginning of the record, which was read ahead
    waiters: list[Demand] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Granted:
    """A lease: the slot of the tier holds the record, of this generation, until the lease is released."""

    request: int
    key: ExpertKey
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The request is over, and its leases have ended."""

    request: int
    error: BaseException


Event = Granted | Failed


class AsyncCaller:
    """A caller that gets events instead of sleeping until its records are there.

    ``deliver`` is called in any thread, with the tier's lock held: it must neither wait nor call the tier. At most
    ``leases`` slots are held for the caller at a time, slots that are still being filled among them.
    """

    def __init__(self, deliver: Callable[[Event], None], leases: int) -> None:
        assert leases > 0
        self.deliver = deliver
        self.leases = leases
        self.outstanding = 0  # slots that its demands hold or claim; kept by the ledger
        self.demands: dict[int, Demand] = {}  # by number, those that are not over

    @property
    def is_full(self) -> bool:
        """Whether as many slots are held for the caller as it may have."""
        return self.outstanding >= self.leases


@dataclass(eq=False, slots=True)
class Demand:
    """One call of acquire. Each key is in one of pending, loads, ready or held, or its lease has ended.

    It shares little with a ``DeviceDemand`` of the device tier: that copies one record at a time in the caller's own
    thread, and never waits for a read.
    """

    pool: Pool
    block: int
    caller: Hashable  # whose turn at the loaders it takes
    async_caller: AsyncCaller | None = None  # the caller, where it is one
    number: int = 0  # by which an asynchronous caller names the demand
    patience: float = 0.0  # seconds that an asynchronous demand waits while it has nothing
    is_scan: bool = False  # wants more records than its block can keep
    pending: dict[ExpertKey, None] = field(default_factory=dict)  # no slot yet
    loads: list[Load] = field(default_factory=list)  # claims on slots that are being filled
    ready: deque[int] = field(default_factory=deque)  # slots: pinned, not leased yet
    residents: int = 0  # how many of ``ready`` were READY when the demand came
    held: dict[int, None] = field(default_factory=dict)  # slots: pinned and leased
    error: BaseException | None = None
    stands_since: float | None = None  # seconds: since when the caller has had nothing to compute with

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to compute with, and nothing in flight."""
        return not self.ready and not self.loads and not self.held

    @property
    def is_over(self) -> bool:
        """Whether it waits for no slot and holds none."""
        return not self.pending and self.is_idle

    @property
    def outstanding(self) -> int:
        """How many slots it holds or claims."""
        return len(self.loads) + len(self.ready) + len(self.held)
