"""Ledgers without a tier's threads, and what tests do with them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from two_layouts import two_layouts

from moetier.tiers.arena.directory import Directory
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.cache.policies import DEFAULT_POLICY
from moetier.tiers.host.demands import Demand, Pool, ThreadCaller
from moetier.tiers.host.ledger import Ledger
from moetier.tiers.host.loads import LoadLimits
from moetier.tiers.host.waiting import Notifier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor

MANIFEST = two_layouts()


class Transitions(Monitor):
    """A monitor of one thread, for which a block of code is a transition, too: what it posts is done behind it."""

    def __init__(self, woken: Callable[[], None]) -> None:
        super().__init__()
        self.woken = woken
        self.in_block = False
        self.posted: list[Callable[[], None]] = []

    def wake(self) -> None:
        self.woken()
        super().wake()

    def post(self, work: Callable[[], None]) -> None:
        if self.in_block:
            self.posted.append(work)
        else:
            super().post(work)

    @contextlib.contextmanager
    def transition(self) -> Iterator[None]:
        self.in_block = True
        try:
            yield
        finally:
            self.in_block = False
        posted, self.posted = self.posted, []
        for work in posted:
            self.post(work)


def ledger_of(
    count: int,
    ahead: int = 4,
    loads_rest: bool = False,
    woken: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Ledger, Pool]:
    layout = ArenaLayout.of(MANIFEST, {"big": 3, "small": count})
    directory = Directory.create(memoryview(bytearray(layout.directory_bytes)), layout)
    ledger = Ledger(
        MANIFEST,
        layout,
        directory,
        Notifier(Transitions(woken)),
        LoadLimits(ahead, prefetches=1),
        policy=DEFAULT_POLICY,
        loads_rest=loads_rest,
        clock=clock,
    )
    return ledger, ledger.slots.pools["small"]


def demand(ledger: Ledger, pool: Pool, block: int, *experts: int) -> Demand:
    made = Demand(pool, block, ThreadCaller(block))
    ledger.begin(made, [ExpertKey(block, expert) for expert in experts])
    return made


def arrive_all(ledger: Ledger) -> None:
    while (load := ledger.loads.take()) is not None:
        ledger.loads.complete(load)


def read_next(ledger: Ledger) -> ExpertKey | None:
    load = ledger.loads.take()
    if load is None:
        return None
    ledger.loads.complete(load)
    return load.key
