"""Session: a caller of the host tier that is told instead of woken: what another process asks for.

It has no thread. Whoever changes the ledger's state goes on with the demands that can, and delivers what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moetier.tiers.arena.directory import Directory
from moetier.tiers.errors import ClosedError, ProtocolError, StoreError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor
from moetier.tiers.manifest import Manifest

from .ledger import Ledger
from .parties import Parties
from .requests import Demand, Party, Pool


@dataclass(frozen=True, slots=True)
class Granted:
    """A lease: the record is in this slot of the tier, of this generation, and stays there until it is released."""

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


@dataclass(frozen=True)
class Desk:
    """What the callers of one tier share."""

    manifest: Manifest
    monitor: Monitor
    ledger: Ledger
    parties: Parties
    directory: Directory
    pools: Mapping[str, Pool]  # by array

    def pool(self, block: int) -> Pool:
        return self.pools[self.manifest.blocks[block].array]


class Request(Demand):
    """What a session calls by a number."""

    __slots__ = ("number",)

    def __init__(self, number: int, pool: Pool, block: int, session: Session, patience: float) -> None:
        super().__init__(pool, block, caller=session, party=session, patience=patience)
        self.number = number


class Session(Party):
    """``HostTier.session`` makes it. Thread-safe; every method returns at once.

    ``deliver`` gets the events in their order, from any thread and with the tier's lock held: it must neither wait nor
    call the tier.
    """

    def __init__(self, deliver: Callable[[Event], None], desk: Desk, *, leases: int, patience: float) -> None:
        super().__init__(leases)
        self._deliver = deliver
        self._desk = desk
        self._patience = patience
        self._requests: dict[int, Request] = {}
        self._closed = False

    @property
    def held(self) -> int:
        """How many slots are leased to it, or on their way to it; ``leases`` at most."""
        return self.outstanding

    def acquire(self, request: int, keys: Sequence[ExpertKey], patience: float | None = None) -> None:
        """Asks for distinct keys of one block: each is answered by a Granted, or all together by a Failed, with
        ExhaustedError when nothing of it was granted or on its way for ``patience`` seconds.

        Raises MissingExpertError for a key that the model does not have, ProtocolError for a request that is not over.
        """
        if not keys:
            return
        block = keys[0].block
        self._desk.manifest.check_keys(block, keys)
        patience = self._patience if patience is None else patience
        demand = Request(request, self._desk.pool(block), block, self, patience)
        self._desk.monitor.run(self._ask, demand, keys)

    def _ask(self, demand: Request, keys: Sequence[ExpertKey]) -> None:
        self._check_open()
        if demand.number in self._requests:
            raise ProtocolError(f"Request {demand.number} is not over yet.", "Number requests one by one.")
        self._requests[demand.number] = demand
        self._desk.ledger.look(demand, keys)
        self._desk.parties.serve()

    def release(self, request: int, keys: Sequence[ExpertKey] = ()) -> None:
        """Ends leases. Without ``keys`` the request is over: what it waits for is given back too. What is not held
        (its request may have failed meanwhile) is ignored."""
        self._desk.monitor.run(self._release, request, keys)

    def _release(self, request: int, keys: Sequence[ExpertKey]) -> None:
        demand = self._requests.get(request)
        if demand is None:
            return
        if keys:
            slots = [demand.pool.slots.find(key) for key in keys]
            self._desk.ledger.release(demand, [slot for slot in slots if slot is not None])
            self._desk.ledger.waiting.stir(demand)
        else:
            self._desk.ledger.leave(demand)
        self._desk.parties.serve()
        if demand not in self.demands:
            self._requests.pop(request, None)

    def used(self, keys: Sequence[ExpertKey]) -> None:
        """Keys that were found in the directory and computed with, least recently used first: hits.

        Raises MissingExpertError for one that the model does not have.
        """
        for key in keys:
            self._desk.manifest.check_keys(key.block, (key,))
        self._desk.monitor.run(self._use, keys)

    def _use(self, keys: Sequence[ExpertKey]) -> None:
        if self._is_condemned:
            return  # what the session asks for next is told why
        self._check_open()
        for key in keys:
            self._desk.ledger.use(self._desk.pool(key.block), key)

    def prefetch(self, block: int, wishes: Sequence[ExpertKey]) -> None:
        """As ``ExpertSource`` says; replaces this session's wishes alone."""
        self._desk.manifest.check_keys(block, wishes)
        self._desk.monitor.run(self._wish, block, wishes)

    def _wish(self, block: int, wishes: Sequence[ExpertKey]) -> None:
        if self._is_condemned:
            return
        self._check_open()
        self._desk.ledger.loads.wish(self._desk.pool(block), block, wishes, wisher=self)

    def close(self) -> None:
        """All leases, claims and wishes are given back; loads that have begun go on. Nothing is delivered any more.
        Idempotent."""
        self._desk.monitor.run(self._close)

    def _close(self) -> None:
        self._closed = True
        for demand in list(self.demands):
            self._desk.ledger.leave(demand)
        self._requests.clear()
        self._desk.ledger.loads.withdraw_wishes(self)
        self._desk.parties.serve()

    # -- what the ledger calls, with the lock held --------------------------------------------------------------------

    def grant(self, demand: Demand, slot: int) -> None:
        assert isinstance(demand, Request)
        number = demand.pool.first + slot
        generation = self._desk.directory.generation(number)
        self._deliver(Granted(demand.number, demand.pool.slots.key(slot), number, generation))

    def refuse(self, demand: Demand, error: BaseException) -> None:
        assert isinstance(demand, Request)
        del self._requests[demand.number]
        self._deliver(Failed(demand.number, error))

    @property
    def _is_condemned(self) -> bool:
        return isinstance(self._desk.ledger.loads.drop_error, StoreError)

    def _check_open(self) -> None:
        error = self._desk.ledger.loads.drop_error
        if isinstance(error, StoreError) and not self._closed:
            raise error.with_traceback(None)
        if self._closed or self._desk.ledger.loads.is_dropped:
            raise ClosedError("The session was closed.", "Open a new one.")
