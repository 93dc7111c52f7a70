"""The host tier's decisions without its threads: every interleaving that hypothesis can think of."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace

import pytest
from cuts import cut
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from integrity import check_ledger
from stores import layout_of, make_plan
from two_layouts import two_layouts

from moetier.tiers.arena.directory import Directory
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.cache.budget import slot_ranges
from moetier.tiers.cache.policies import POLICIES
from moetier.tiers.errors import ExhaustedError
from moetier.tiers.host.demands import AsyncCaller, Demand, Event, Failed, Granted, Load, Notifier, Pool
from moetier.tiers.host.ledger import Ledger
from moetier.tiers.host.loads import LoadLimits
from moetier.tiers.host.session import Session
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor

MANIFEST = two_layouts()
EXPERTS = 4
BLOCKS = st.integers(0, 4)
PATIENCE = 10.0


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


class Caller:
    def __init__(self, demand: Demand, keys: list[ExpertKey]) -> None:
        self.demand = demand
        self.wanted = set(keys)
        self.held: list[tuple[ExpertKey, int]] = []  # the present leases
        self.asleep = False


class Client:
    """Another process: asks by a session, and remembers what it was answered."""

    def __init__(self, machine: LedgerMachine, leases: int) -> None:
        self.machine = machine
        self.session = Session(self.hear, machine.monitor, machine.ledger, leases=leases, timeout=PATIENCE)
        self.leases = leases
        self.wanted: dict[int, set[ExpertKey]] = {}
        self.held: dict[int, dict[ExpertKey, tuple[int, int]]] = {}  # by request: slot and generation of each
        self.failed: list[Failed] = []
        self.last = 0

    def hear(self, event: Event) -> None:
        assert event.request in self.wanted, "of a request that is over"
        if isinstance(event, Granted):
            self.wanted[event.request].remove(event.key)  # each key once
            self.held[event.request][event.key] = (event.slot, event.generation)
            assert self.machine.directory.find(event.key) == (event.slot, event.generation)
            assert sum(map(len, self.held.values())) <= self.leases
        else:
            self.failed.append(event)
            self.over(event.request)

    def over(self, request: int) -> None:
        del self.wanted[request]
        del self.held[request]

    def acquire(self, keys: list[ExpertKey]) -> None:
        self.last += 1
        self.wanted[self.last] = set(keys)
        self.held[self.last] = {}
        self.session.acquire(self.last, keys)

    def release(self, request: int, keys: list[ExpertKey]) -> None:
        if keys:
            for key in keys:
                self.held[request].pop(key, None)
            self.session.release(request, keys)
            if request in self.wanted and not self.wanted[request] and not self.held[request]:
                self.over(request)
        else:
            self.over(request)
            self.session.release(request)


class LedgerMachine(RuleBasedStateMachine):
    """Callers, clients and loaders whose transitions come in any order. The oracle is a dict: slot -> the key whose
    bytes are in it, None while it is being filled."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[tuple[Pool, int], ExpertKey | None] = {}
        self.callers: list[Caller] = []
        self.clients: list[Client] = []
        self.reading: list[Load] = []
        self.yielding: list[Load] = []  # of these: a loader sleeps until demands have been read
        self.seen: list[tuple[ExpertKey, int, int]] = []  # what a client found in the directory, and computes on
        self.now = 0.0

    @initialize(data=st.data())
    def open(self, data: st.DataObject) -> None:
        counts = {
            name: data.draw(st.integers(least, most) | st.just(least), name)
            for name, (least, most) in sorted(slot_ranges(MANIFEST).items())
        }
        layout = ArenaLayout.of(MANIFEST, counts)
        self.monitor = Transitions(self.woken)
        self.directory = Directory.create(memoryview(bytearray(layout.directory_bytes)), layout)
        self.ledger = Ledger(
            MANIFEST,
            layout,
            self.directory,
            Notifier(self.monitor),
            LoadLimits(data.draw(st.integers(1, 4), "ahead"), data.draw(st.integers(1, 2), "prefetches")),
            policy=data.draw(st.sampled_from(sorted(POLICIES)), "policy"),
            loads_rest=data.draw(st.booleans(), "loads_rest"),
            clock=lambda: self.now,
        )
        self.monitor.after_wake = self.ledger.serve
        self.loaders = data.draw(st.integers(1, 3), "loaders")

    def woken(self) -> None:
        self.yielding.clear()
        for caller in self.callers:
            caller.asleep = False

    # -- threads of this process --------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.callers) < 4)
    @rule(block=BLOCKS, experts=st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=6))
    def acquire(self, block: int, experts: list[int]) -> None:
        keys = [ExpertKey(block, expert) for expert in experts]
        pool = self.ledger.pool_of[block]
        with self.monitor.transition():
            ready = {key for key in keys if pool.holds(key)}
            hits, misses = self.ledger.counters.hits, self.ledger.counters.misses
            caller = Caller(Demand(pool, block, len(self.callers)), keys)
            self.callers.append(caller)
            self.ledger.begin(caller.demand, keys)
            assert self.ledger.counters.hits - hits == len(ready)
            assert self.ledger.counters.misses - misses == len(set(keys)) - len(ready)
            assert {pool.key(slot) for slot in caller.demand.ready} == ready

    def steps(self) -> list[Caller]:
        return [caller for caller in self.callers if not caller.asleep]

    @precondition(lambda self: self.steps())
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """A caller is done with its leases and asks for the next, or wakes."""
        self.next(data.draw(st.sampled_from(self.steps())))

    def next(self, caller: Caller) -> None:
        demand = caller.demand
        with self.monitor.transition():
            caller.held = []
            found = self.ledger.next_leases(demand)
            if found is None:
                caller.asleep = True
                return
            slots, is_last = found
            caller.held = [(demand.pool.key(slot), slot) for slot in slots]
            for key, _ in caller.held:
                caller.wanted.remove(key)  # each key once
            if is_last:
                assert demand.error is not None or not caller.wanted, "every key"
            if not slots:
                assert is_last
                self.gone(caller)

    def gone(self, caller: Caller) -> None:
        self.callers.remove(caller)
        self.ledger.end(caller.demand)

    @precondition(lambda self: self.callers)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        with self.monitor.transition():
            self.gone(data.draw(st.sampled_from(self.callers)))

    @rule(key=st.builds(ExpertKey, BLOCKS, st.integers(0, EXPERTS - 1)), used=st.booleans())
    def lease_for_copy(self, key: ExpertKey, used: bool) -> None:
        """For as long as any other lease."""
        pool = self.ledger.pool_of[key.block]
        caller = Caller(Demand(pool, key.block, len(self.callers)), [])
        before = replace(self.ledger.counters)
        with self.monitor.transition():
            slot = self.ledger.lease_for_copy(caller.demand, key)
            assert (slot is not None) == (pool.holds(key) and not pool.starved)
            if slot is not None:
                caller.held = [(key, slot)]
                self.callers.append(caller)
            assert self.ledger.counters == before
            if used:
                self.ledger.direct_hits.note_copy_uses([key])

    @rule(block=BLOCKS, experts=st.lists(st.integers(0, EXPERTS - 1), max_size=5))
    def prefetch(self, block: int, experts: list[int]) -> None:
        with self.monitor.transition():
            self.ledger.prefetch(block, [ExpertKey(block, expert) for expert in experts])

    @rule(block=BLOCKS, experts=st.lists(st.integers(0, EXPERTS - 1), max_size=4, unique=True))
    def warm(self, block: int, experts: list[int]) -> None:
        with self.monitor.transition():
            self.ledger.loads.warm(self.ledger.pool_of[block], [ExpertKey(block, expert) for expert in experts])

    # -- clients in other processes -----------------------------------------------------------------------------------

    @precondition(lambda self: len(self.clients) < 3)
    @rule(leases=st.integers(1, 5))
    def come(self, leases: int) -> None:
        self.clients.append(Client(self, leases))

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), block=BLOCKS, experts=st.sets(st.integers(0, EXPERTS - 1), min_size=1))
    def ask(self, data: st.DataObject, block: int, experts: set[int]) -> None:
        client = data.draw(st.sampled_from(self.clients))
        if len(client.wanted) < 4:
            client.acquire([ExpertKey(block, expert) for expert in experts])

    @precondition(lambda self: any(client.wanted for client in self.clients))
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        """Some of a request's leases (or what is none of them), or all of it."""
        client = data.draw(st.sampled_from([client for client in self.clients if client.wanted]))
        request = data.draw(st.sampled_from(sorted(client.wanted)))
        held = sorted(client.held[request])
        keys = data.draw(st.lists(st.sampled_from([*held, ExpertKey(1, 0)]), max_size=3))
        client.release(request, keys)

    @precondition(lambda self: self.clients)
    @rule(
        data=st.data(),
        block=BLOCKS,
        experts=st.lists(st.integers(0, EXPERTS - 1), max_size=5),
        prefetch=st.booleans(),
    )
    def tell(self, data: st.DataObject, block: int, experts: list[int], prefetch: bool) -> None:
        session = data.draw(st.sampled_from(self.clients)).session
        keys = [ExpertKey(block, expert) for expert in experts]
        if prefetch:
            session.prefetch(block, keys)
        else:
            session.note_uses(keys)

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(self.clients))
        self.clients.remove(client)
        client.wanted.clear()
        client.session.close()

    @rule(seconds=st.sampled_from([1.0, PATIENCE]))
    def time_passes(self, seconds: float) -> None:
        waiting = [
            (client, request)
            for client in self.clients
            for request, demand in client.session.demands.items()
            if demand.pending and demand.is_idle
        ]
        failed = {id(client): len(client.failed) for client in self.clients}
        self.now += seconds
        with self.monitor.transition():
            until = self.ledger.expire()
        assert until is None or self.now < until <= self.now + PATIENCE
        if seconds == PATIENCE:
            for client, request in waiting:
                assert any(event.request == request for event in client.failed[failed[id(client)] :])
        for client in self.clients:
            for event in client.failed[failed[id(client)] :]:
                assert isinstance(event.error, ExhaustedError)
                assert (client, event.request) in waiting

    # -- readers of the directory -------------------------------------------------------------------------------------

    @rule(key=st.builds(ExpertKey, BLOCKS, st.integers(0, EXPERTS - 1)))
    def find(self, key: ExpertKey) -> None:
        found = self.directory.find(key)
        assert (found is not None) == (key in self.memory.values())
        if found is not None:
            self.seen.append((key, *found))

    # -- loaders ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.reading) < self.loaders)
    @rule()
    def begin_read(self) -> None:
        with self.monitor.transition():
            evictions = self.ledger.counters.evictions
            load = self.ledger.loads.take()
        if load is not None:
            if load.is_warmup:
                assert not any(other.waiters for other in self.ledger.loads), "it has what demands leave of the disk"
                assert self.ledger.counters.evictions == evictions, "and of the slots"
            self.reading.append(load)

    def awake(self) -> list[Load]:
        return [load for load in self.reading if load not in self.yielding]

    @precondition(lambda self: self.awake())
    @rule(data=st.data(), fails=st.booleans())
    def end_read(self, data: st.DataObject, fails: bool) -> None:
        load = data.draw(st.sampled_from(self.awake()))
        self.end(load, OSError("broken") if fails else None)

    @precondition(lambda self: any(load.is_prefetch for load in self.awake()))
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        """A loader yields between two pieces, or finds that what it reads is unwanted."""
        load = data.draw(st.sampled_from([load for load in self.awake() if load.is_prefetch]))
        with self.monitor.transition():
            found = self.ledger.loads.may_continue(load)
            if found is None and len(self.yielding) < self.loaders - 1:  # one is always there for the demands
                self.yielding.append(load)
            elif found is False:
                self.reading.remove(load)

    def end(self, load: Load, error: OSError | None) -> None:
        self.reading.remove(load)
        with self.monitor.transition():
            waiters = list(load.waiters)
            if error is not None:
                self.ledger.loads.fail(load, error)
                assert load.pool.find(load.key) is None, "nothing is cached"
                assert all(demand.error is not None for demand in waiters)
            else:
                self.memory[load.pool, load.slot] = load.key
                self.ledger.loads.complete(load)
        assert all(demand.async_caller is None or demand.error is None or demand.is_over for demand in waiters)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "ledger"):
            return
        check_ledger(self.ledger)
        counters = self.ledger.counters
        assert counters.useful + counters.late + counters.wasted <= counters.prefetched
        for load in self.ledger.loads:  # from the moment on when its slot is taken, the old bytes are gone
            self.memory[load.pool, load.slot] = None
        is_for_demands = any(load.waiters or not load.is_prefetch for load in self.ledger.loads)
        for load in self.yielding:
            assert is_for_demands, "no loader sleeps that could go on"
            assert not load.waiters
        content = {pool.first + slot: key for (pool, slot), key in self.memory.items()}
        for caller in self.callers:
            for key, slot in caller.held:
                assert self.memory[caller.demand.pool, slot] == key, "a lease whose bytes are another's"
            if caller.asleep:
                assert not caller.held
                assert not caller.demand.ready, "no caller sleeps on a slot that is ready"
        for client in self.clients:
            for held in client.held.values():
                for key, (slot, generation) in held.items():
                    assert content[slot] == key, "a lease whose bytes are another's"
                    assert self.directory.generation(slot) == generation
        for key, slot, generation in self.seen:
            if self.directory.generation(slot) == generation:
                assert content[slot] == key, "a proof that proves nothing"
        for pool in self.ledger.pools.values():
            slots = [load.slot for load in self.reading if load.pool is pool]
            assert len(set(slots)) == len(slots), "two loads into one slot"

    def teardown(self) -> None:
        """From here on everybody does his work, and nothing else happens: all must come to an end."""
        if not hasattr(self, "ledger"):
            return
        rounds = 0
        while self.callers or self.reading or any(client.wanted for client in self.clients):
            rounds += 1
            assert rounds < 300, "a deadlock"
            for caller in self.steps():
                if caller in self.callers:
                    self.next(caller)
            for client in self.clients:
                for request, held in list(client.held.items()):
                    if held and request in client.held:
                        client.release(request, [next(iter(held))])
            with self.monitor.transition():
                while len(self.reading) < self.loaders and (load := self.ledger.loads.take()) is not None:
                    self.reading.append(load)
            if self.awake():
                self.end(self.awake()[0], None)
            self.agrees()
        for client in self.clients:
            assert client.session.outstanding == 0
            client.session.close()
        for pool in self.ledger.pools.values():
            assert not any(pool.pins(slot) for slot in range(pool.count))
            assert not pool.starved
        assert not list(self.ledger.loads)
        assert self.ledger.expire() is None, "nobody waits"


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


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
        loads_rest=loads_rest,
        clock=clock,
    )
    return ledger, ledger.pools["small"]


def demand(ledger: Ledger, pool: Pool, block: int, *experts: int) -> Demand:
    made = Demand(pool, block, block)
    ledger.begin(made, [ExpertKey(block, expert) for expert in experts])
    return made


def arrive_all(ledger: Ledger) -> None:
    while (load := ledger.loads.take()) is not None:
        ledger.loads.complete(load)


def test_starved_demands_are_served_in_order_before_all_other_reads() -> None:
    ledger, pool = ledger_of(2)
    greedy = demand(ledger, pool, 1, 0, 1, 2, 3)
    first = demand(ledger, pool, 3, 0, 1)
    second = demand(ledger, pool, 4, 0)
    assert list(pool.starved) == [first, second]
    arrive_all(ledger)
    ledger.lease(greedy)
    ledger.release(greedy)
    ledger.advance(greedy)  # a slot is free, and it may not have it
    ledger.advance(second)
    assert not second.loads
    assert not greedy.loads
    ledger.advance(first)
    assert [load.key for load in first.loads] == [ExpertKey(3, 0)], "one, for another demand is starved"
    assert list(pool.starved) == [second]
    ledger.lease(greedy)
    ledger.release(greedy)
    ledger.advance(first)
    ledger.advance(second)
    assert len(first.loads) == 1
    assert [load.key for load in second.loads] == [ExpertKey(4, 0)]
    assert not pool.starved


def test_no_more_than_ahead_is_in_flight() -> None:
    ledger, pool = ledger_of(12, ahead=3)
    caller = demand(ledger, pool, 1, 0, 1, 2, 3)
    assert len(caller.loads) == 3
    arrive_all(ledger)
    ledger.advance(caller)
    assert len(caller.loads) == 1


def test_what_is_given_first_is_evicted_last() -> None:
    ledger, pool = ledger_of(6)
    for experts in ((0, 1), (2, 3)):
        caller = demand(ledger, pool, 1, *experts)
        arrive_all(ledger)
        ledger.end(caller)
    caller = demand(ledger, pool, 1, 2, 3)
    ledger.end(caller)
    demand(ledger, pool, 1, 0)
    assert pool.find(ExpertKey(1, 2)) is not None
    assert pool.find(ExpertKey(1, 3)) is None


def test_what_a_loader_has_begun_goes_on_when_its_caller_is_gone_and_no_more() -> None:
    ledger, pool = ledger_of(3)
    caller, other = demand(ledger, pool, 1, 0, 1, 2), demand(ledger, pool, 1, 2)
    begun = ledger.loads.take()
    assert begun is not None
    assert begun.key == ExpertKey(1, 0)
    ledger.end(caller)
    check_ledger(ledger)
    assert pool.find(ExpertKey(1, 1)) is None
    wanted = ledger.loads.take()
    assert wanted is not None
    assert wanted.key == ExpertKey(1, 2), "somebody else wants it"
    assert ledger.loads.take() is None
    ledger.loads.complete(begun)
    ledger.loads.complete(wanted)
    slot = pool.find(ExpertKey(1, 0))
    assert slot is not None
    assert pool.is_evictable(slot)
    assert list(other.ready) == [pool.find(ExpertKey(1, 2))]


def test_a_record_whose_arrival_was_cut_is_looked_for_again() -> None:
    number = 0
    while True:
        ledger, pool = ledger_of(6)
        caller = demand(ledger, pool, 1, 0)
        load = ledger.loads.take()
        assert load is not None
        is_cut = cut(lambda: ledger.loads.complete(load), number) is not None  # noqa: B023
        if not is_cut:
            break
        ledger.repair()
        check_ledger(ledger)
        number += 1
        if load in list(ledger.loads):  # it counts as being read still
            continue
        ledger.advance(caller)
        arrive_all(ledger)
        assert [pool.key(slot) for slot in caller.ready] == [ExpertKey(1, 0)], number
    assert number > 5


def test_when_the_first_of_the_starved_goes_the_next_is_woken() -> None:
    wakes = 0

    def woken() -> None:
        nonlocal wakes
        wakes += 1

    ledger, pool = ledger_of(2, woken=woken)
    holder = demand(ledger, pool, 1, 0, 1)
    arrive_all(ledger)
    first, second = demand(ledger, pool, 3, 0), demand(ledger, pool, 4, 0)
    ledger.end(holder)
    ledger.advance(second)
    assert not second.loads, "it was woken too, but is not the first"
    before = wakes
    ledger.end(first)
    assert wakes > before
    ledger.advance(second)
    assert second.loads


def test_a_prefetch_that_yields_is_woken_when_the_load_goes_that_it_yields_to() -> None:
    wakes = 0

    def woken() -> None:
        nonlocal wakes
        wakes += 1

    ledger, pool = ledger_of(6, woken=woken)
    ledger.prefetch(1, [ExpertKey(1, 0)])
    prefetch = ledger.loads.take()
    assert prefetch is not None
    other = demand(ledger, pool, 3, 0)
    assert ledger.loads.may_continue(prefetch) is None
    before = wakes
    ledger.end(other)  # no loader had begun its load
    assert ledger.loads.may_continue(prefetch)
    assert wakes > before


def test_a_caller_whose_blocks_slots_are_all_held_borrows_and_gives_back() -> None:
    ledger, pool = ledger_of(6)  # two for each of three blocks
    holder = demand(ledger, pool, 1, 0, 1)
    caller = demand(ledger, pool, 1, 2, 3)
    assert len(caller.loads) == 1, "one to get on with; more would be at the cost of other blocks"
    assert caller.pending
    arrive_all(ledger)
    for made in (holder, caller):
        ledger.end(made)
    for block in (3, 4):
        made = demand(ledger, pool, block, 0, 1)
        arrive_all(ledger)
        ledger.end(made)
    held = [ExpertKey(b, e) for b in (1, 3, 4) for e in range(4) if pool.find(ExpertKey(b, e)) is not None]
    assert held == [(1, 0), (1, 2), (3, 0), (3, 1), (4, 0), (4, 1)], "each block is back to its two"


def test_evictions_are_counted() -> None:
    ledger, pool = ledger_of(2)
    for expert in (0, 1, 2, 3, 3):
        caller = demand(ledger, pool, 1, expert)
        arrive_all(ledger)
        ledger.end(caller)
    assert ledger.counters.evictions == 2
    assert (ledger.counters.hits, ledger.counters.misses) == (1, 4)


def test_prefetches_yield_for_the_starved_and_are_bounded() -> None:
    ledger, pool = ledger_of(3)
    holder = demand(ledger, pool, 1, 0, 1, 2)
    arrive_all(ledger)
    assert len(holder.ready) == 3
    starved = demand(ledger, pool, 3, 0)
    ledger.prefetch(4, [ExpertKey(4, 0), ExpertKey(4, 1)])
    ledger.end(holder)
    assert ledger.loads.take() is None, "three slots could be had, but a demand is starved"
    ledger.advance(starved)
    load = ledger.loads.take()
    assert load is not None
    assert load.key == ExpertKey(3, 0), "demands first"
    assert ledger.loads.take() is None, "and alone: they don't share the disk with prefetches"
    ledger.loads.complete(load)
    requested = ledger.loads.take()
    assert requested is not None
    assert requested.key == ExpertKey(4, 0)
    assert ledger.loads.take() is None, "one prefetch at a time, so that a demand finds a loader"
    ledger.loads.complete(requested)
    other = ledger.loads.take()
    assert other is not None
    assert other.key == ExpertKey(4, 1)
    assert pool.find(ExpertKey(4, 0)) is not None, "a prefetch does not evict what is requested"
    ledger.loads.complete(other)
    assert ledger.counters.prefetched == 2


def test_what_becomes_of_prefetches_is_counted() -> None:
    now = [0.0]
    ledger, pool = ledger_of(3, clock=lambda: now[0])

    def read(seconds: float) -> None:
        load = ledger.loads.take()
        assert load is not None
        now[0] += seconds
        ledger.loads.complete(load)

    def counts() -> tuple[int, ...]:
        found = ledger.counters
        assert found.useful + found.late + found.wasted <= found.prefetched
        return found.prefetched, found.useful, found.late, found.wasted, found.cancelled

    ledger.prefetch(1, [ExpertKey(1, 0), ExpertKey(1, 1), ExpertKey(1, 2)])
    read(0.5)
    late = ledger.loads.take()
    assert late is not None
    now[0] += 0.25
    first = demand(ledger, pool, 1, 0, 1)
    assert counts() == (2, 1, 1, 0, 1), "one is there, one under way, and the third is no longer requested"
    now[0] += 0.25
    ledger.loads.complete(late)
    ledger.end(first)
    assert ledger.counters.saved_seconds == 0.75
    ledger.end(demand(ledger, pool, 1, 0, 1))
    assert counts() == (2, 1, 1, 0, 1), "each once"

    ledger.prefetch(4, [ExpertKey(4, 0)])
    read(1.0)
    ledger.prefetch(4, [ExpertKey(4, 1)])
    ledger.prefetch(4, [ExpertKey(4, 1)])
    assert counts() == (3, 1, 1, 0, 1), "what is requested again is not given up"
    others = demand(ledger, pool, 3, 0, 1, 2)
    arrive_all(ledger)
    ledger.end(others)
    assert counts() == (3, 1, 1, 1, 2), "evicted, and nobody had wanted it; and the next request found no slot"
    assert ledger.counters.saved_seconds == 0.75


def test_a_prefetch_takes_the_place_of_one_that_was_wrong() -> None:
    ledger, pool = ledger_of(6)

    def there(*keys: tuple[int, int]) -> list[bool]:
        return [pool.find(ExpertKey(*key)) is not None for key in keys]

    ledger.prefetch(4, [ExpertKey(4, 0)])
    arrive_all(ledger)
    for block, experts in ((1, (0, 1)), (3, (0, 1)), (4, (1,))):
        asked = demand(ledger, pool, block, *experts)
        arrive_all(ledger)
        ledger.end(asked)
    ledger.prefetch(1, [ExpertKey(1, 2)])
    arrive_all(ledger)
    assert there((4, 0), (1, 2), (1, 0), (1, 1)) == [False, True, True, True], "and of no record of its own block"
    ledger.end(demand(ledger, pool, 1, 0))  # and not what was requested
    asked = demand(ledger, pool, 4, 2)
    arrive_all(ledger)
    ledger.end(asked)
    assert there((1, 2), (1, 0), (1, 1), (4, 1), (4, 2)) == [False, True, True, True, True], "block 4 has its slot back"
    assert ledger.counters.wasted == 2


def test_a_prefetch_takes_what_is_empty_before_what_was_wrong() -> None:
    ledger, pool = ledger_of(6)
    for key in (ExpertKey(4, 0), ExpertKey(1, 0)):
        ledger.prefetch(4, [])
        ledger.prefetch(key.block, [key])
        arrive_all(ledger)
    assert None not in (pool.find(ExpertKey(4, 0)), pool.find(ExpertKey(1, 0)))
    assert ledger.counters.wasted == 0


def test_a_prefetch_that_finds_no_slot_or_whose_caller_goes_is_given_up() -> None:
    ledger, _ = ledger_of(2)
    ledger.prefetch(1, [ExpertKey(1, 0), ExpertKey(1, 1), ExpertKey(1, 2)])
    assert [read_next(ledger) for _ in range(3)] == [ExpertKey(1, 0), ExpertKey(1, 1), None]
    assert (ledger.counters.prefetched, ledger.counters.cancelled) == (2, 1), "two are requested still"
    caller = AsyncCaller(lambda event: None, 1)
    ledger.prefetch(3, [ExpertKey(3, 0), ExpertKey(3, 1)], caller)
    ledger.prefetches.cancel(caller)
    assert (read_next(ledger), ledger.counters.cancelled) == (None, 3)


def test_a_record_that_a_client_finds_in_the_directory_was_requested_rightly() -> None:
    ledger, _ = ledger_of(3)
    ledger.prefetch(1, [ExpertKey(1, 0)])
    load = ledger.loads.take()
    assert load is not None
    ledger.loads.complete(load)
    ledger.direct_hits.note_client_uses([ExpertKey(1, 0)])
    assert (ledger.counters.useful, ledger.counters.late) == (1, 0)


def read_next(ledger: Ledger) -> ExpertKey | None:
    load = ledger.loads.take()
    if load is None:
        return None
    ledger.loads.complete(load)
    return load.key


def test_a_warm_up_fills_what_is_empty_behind_demands_and_requests() -> None:
    ledger, pool = ledger_of(6)  # two for each of three blocks
    ledger.end(demand(ledger, pool, 4, 0))  # begun, and nobody's any more
    ledger.loads.warm(pool, [ExpertKey(1, 3), ExpertKey(1, 2), ExpertKey(1, 1)])
    ledger.loads.warm(pool, [ExpertKey(3, 0), ExpertKey(3, 1)])
    ledger.loads.warm(pool, [ExpertKey(4, 0), ExpertKey(4, 1)])
    assert read_next(ledger) == ExpertKey(1, 3), "the hottest first"
    wanted = demand(ledger, pool, 4, 0)
    begun = ledger.loads.take()
    assert begun is not None
    assert begun.key == ExpertKey(4, 0)
    assert ledger.loads.take() is None, "not while anything is read for a demand"
    ledger.loads.complete(begun)
    ledger.end(wanted)
    ledger.prefetch(3, [ExpertKey(3, 3)])
    assert [read_next(ledger) for _ in range(5)] == [(3, 3), (1, 2), (3, 0), (4, 1), None], "never beyond the quota"
    assert (ledger.counters.evictions, ledger.counters.warmed, ledger.counters.prefetched) == (0, 4, 1)


def test_what_was_warmed_is_evicted_before_what_was_used_and_the_hottest_last() -> None:
    ledger, pool = ledger_of(9)
    ledger.loads.warm(pool, [ExpertKey(1, 0), ExpertKey(1, 1)])
    assert [read_next(ledger), read_next(ledger)] == [(1, 0), (1, 1)]
    for expert, held in ((2, [0, 1, 2]), (3, [0, 2, 3]), (1, [1, 2, 3])):
        made = demand(ledger, pool, 1, expert)
        arrive_all(ledger)
        ledger.end(made)
        assert [e for e in range(EXPERTS) if pool.find(ExpertKey(1, e)) is not None] == held
    assert (ledger.counters.warmed, ledger.counters.recalled) == (2, 0)


def test_what_was_warmed_and_then_wanted_is_counted_once() -> None:
    ledger, pool = ledger_of(6)
    ledger.loads.warm(pool, [ExpertKey(1, 0), ExpertKey(1, 1)])
    assert read_next(ledger) == ExpertKey(1, 0)
    load = ledger.loads.take()
    assert load is not None
    for _ in range(2):
        made = demand(ledger, pool, 1, 0, 1)
        if load in ledger.loads:
            ledger.loads.complete(load)
        ledger.end(made)
    found = ledger.counters
    assert (found.warmed, found.recalled) == (2, 2)
    assert (found.prefetched, found.useful, found.late) == (0, 0, 0), "it was no prediction"


def test_a_warm_up_that_yields_is_cancelled_when_a_demand_is_starved() -> None:
    ledger, pool = ledger_of(2)  # shared by three blocks
    ledger.loads.warm(pool, [ExpertKey(1, 0)])
    load = ledger.loads.take()
    assert load is not None
    assert ledger.loads.may_continue(load)
    demand(ledger, pool, 3, 0)
    assert ledger.loads.may_continue(load) is None
    starved = demand(ledger, pool, 4, 0)
    assert list(pool.starved) == [starved]
    arrive_all(ledger)
    assert ledger.loads.may_continue(load) is False
    ledger.loads.warm(pool, [ExpertKey(1, 1)])
    assert ledger.loads.take() is None, "the slot is for the demand that is starved"
    ledger.advance(starved)
    assert starved.loads


def test_a_pool_with_room_for_all_is_filled_once_half_of_it_is_taken() -> None:
    ledger, pool = ledger_of(12, ahead=9, loads_rest=True)
    first = demand(ledger, pool, 1, 0, 1, 2)
    arrive_all(ledger)
    second = demand(ledger, pool, 3, 0, 1)
    arrive_all(ledger)
    assert pool.ready == 5, "and nothing more, as long as so little is used"
    third = demand(ledger, pool, 4, 3, 0)
    assert [read_next(ledger) for _ in range(8)] == [(4, 3), (4, 0), (1, 3), (3, 2), (3, 3), (4, 1), (4, 2), None]
    found = ledger.counters
    assert (pool.ready, found.misses, found.warmed, found.evictions) == (12, 7, 5, 0)
    for made in (first, second, third):
        ledger.end(made)
    check_ledger(ledger)


@pytest.mark.parametrize(("count", "loads_rest"), [(11, True), (12, False)])
def test_a_pool_is_not_filled_without_room_for_all_or_if_records_are_far_away(count: int, loads_rest: bool) -> None:
    ledger, pool = ledger_of(count, ahead=9, loads_rest=loads_rest)
    for block in (1, 3, 4):
        made = demand(ledger, pool, block, 0, 1, 2)
        arrive_all(ledger)
        ledger.end(made)
    assert (pool.ready, ledger.counters.warmed) == (9, 0)


def test_uses_are_counted_of_demands_and_of_what_clients_found() -> None:
    ledger, pool = ledger_of(6)
    ledger.end(demand(ledger, pool, 1, 3))
    demand(ledger, pool, 1, 0, 1, 0)
    ledger.direct_hits.note_client_uses([ExpertKey(1, 0)])
    ledger.direct_hits.note_copy_uses([ExpertKey(0, 2)])
    assert ledger.direct_hits.uses == {(1, 3): 1, (1, 0): 2, (1, 1): 1, (0, 2): 1}


def test_callers_that_come_again_and_again_overtake_no_caller_for_ever() -> None:
    """However many wait: a caller that was served is behind them, also when it wanted nothing in between."""
    manifest = make_plan(blocks=1, experts=1000, layout=layout_of(32, 16))
    layout = ArenaLayout.of(manifest, {"records": 1000})
    directory = Directory.create(memoryview(bytearray(layout.directory_bytes)), layout)
    ledger = Ledger(manifest, layout, directory, Notifier(Monitor()), LoadLimits(ahead=4, prefetches=1))
    pool = ledger.pools["records"]
    experts = iter(range(1000))

    class Someone:
        pass

    def ask(caller: Hashable) -> None:
        ledger.begin(Demand(pool, 0, caller), [ExpertKey(0, next(experts))])

    def serve() -> Hashable:
        load = ledger.loads.take()
        assert load is not None
        (demand,) = load.waiters
        ledger.loads.complete(load)
        ledger.end(demand)
        return demand.caller

    waiting = set(range(2, 202))
    for caller in waiting:
        ask(caller)
    for step in range(len(waiting) + 2):
        ask(step % 2)
        waiting.discard(serve())
    assert not waiting
    while list(ledger.loads):
        serve()
    once = weakref.WeakSet[Someone]()
    for _ in range(100):
        someone = Someone()
        once.add(someone)
        ask(someone)
        assert serve() is someone
    del someone
    assert len(once) <= 2, "callers that come once are not kept"
