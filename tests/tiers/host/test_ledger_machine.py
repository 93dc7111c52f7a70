"""The host tier's decisions without its threads: every interleaving that hypothesis can think of."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from integrity import check_ledger
from ledgers import MANIFEST, Transitions

from moetier.tiers.arena.directory import Directory
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.cache.budget import slot_ranges
from moetier.tiers.cache.policies import POLICIES
from moetier.tiers.cache.pool import SlotState
from moetier.tiers.errors import ExhaustedError
from moetier.tiers.host.demands import (
    AsyncCaller,
    Demand,
    Failed,
    Granted,
    Load,
    Pool,
    Purpose,
    SessionEvent,
    ThreadCaller,
)
from moetier.tiers.host.ledger import Ledger
from moetier.tiers.host.loads import LoadLimits
from moetier.tiers.host.session import Session
from moetier.tiers.host.waiting import Notifier
from moetier.tiers.layout import ExpertKey

EXPERTS = 4
BLOCKS = st.integers(0, 4)
PATIENCE = 10.0


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
        self.session = Session(self.hear, machine.monitor, machine.ledger, max_leases=leases, timeout=PATIENCE)
        self.leases = leases
        self.wanted: dict[int, set[ExpertKey]] = {}
        self.held: dict[int, dict[ExpertKey, tuple[int, int]]] = {}  # by request: slot and generation of each
        self.failed: list[Failed] = []
        self.last = 0

    def hear(self, event: SessionEvent) -> None:
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
            self.session.end(request)


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
        self.monitor.run_after_mark(self.ledger.serve)
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
        pool = self.ledger.slots.pool_of[block]
        with self.monitor.transition():
            ready = {key for key in keys if pool.state_of(key) is SlotState.READY}
            hits, misses = self.ledger.stats().hits, self.ledger.stats().misses
            caller = Caller(Demand(pool, block, ThreadCaller(len(self.callers))), keys)
            self.callers.append(caller)
            self.ledger.begin(caller.demand, keys)
            assert self.ledger.stats().hits - hits == len(ready)
            assert self.ledger.stats().misses - misses == len(set(keys)) - len(ready)
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
        pool = self.ledger.slots.pool_of[key.block]
        caller = Caller(Demand(pool, key.block, ThreadCaller(len(self.callers))), [])
        before = self.ledger.stats()
        with self.monitor.transition():
            slot = self.ledger.lease_for_copy(caller.demand, key)
            assert (slot is not None) == ((pool.state_of(key) is SlotState.READY) and not pool.starved)
            if slot is not None:
                caller.held = [(key, slot)]
                self.callers.append(caller)
            assert replace(self.ledger.stats(), leased=before.leased) == before
            if used:
                self.ledger.uses.note_copies([key])

    @rule(block=BLOCKS, experts=st.lists(st.integers(0, EXPERTS - 1), max_size=5))
    def prefetch(self, block: int, experts: list[int]) -> None:
        with self.monitor.transition():
            self.ledger.prefetch(block, [ExpertKey(block, expert) for expert in experts])

    @rule(block=BLOCKS, experts=st.lists(st.integers(0, EXPERTS - 1), max_size=4, unique=True))
    def warm(self, block: int, experts: list[int]) -> None:
        with self.monitor.transition():
            self.ledger.loads.warm(self.ledger.slots.pool_of[block], [ExpertKey(block, expert) for expert in experts])

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
            evictions = self.ledger.stats().evictions
            load = self.ledger.loads.take()
        if load is not None:
            if load.purpose is Purpose.WARMUP:
                assert not any(other.waiters for other in self.ledger.loads), "it has what demands leave of the disk"
                assert self.ledger.stats().evictions == evictions, "and of the slots"
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
            found = self.ledger.loads.continue_or_cancel(load)
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
                assert load.pool.slot_of(load.key) is None, "nothing is cached"
                assert all(demand.error is not None for demand in waiters)
            else:
                self.memory[load.pool, load.slot] = load.key
                self.ledger.loads.complete(load)
        assert all(
            not isinstance(demand.caller, AsyncCaller) or demand.error is None or demand.is_over for demand in waiters
        )

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "ledger"):
            return
        check_ledger(self.ledger)
        counters = self.ledger.stats()
        assert counters.useful + counters.late + counters.wasted + counters.cancelled <= counters.prefetched
        for load in self.ledger.loads:  # from the moment on when its slot is taken, the old bytes are gone
            self.memory[load.pool, load.slot] = None
        is_for_demands = any(load.is_for_demands for load in self.ledger.loads)
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
        for pool in self.ledger.slots.pools.values():
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
        for pool in self.ledger.slots.pools.values():
            assert not pool.counts().leased
            assert not pool.starved
        assert not list(self.ledger.loads)
        assert self.ledger.expire() is None, "no demand waits"


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=50, stateful_step_count=60, deadline=None)
