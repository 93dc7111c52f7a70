from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from queue import SimpleQueue

import pytest
from integrity import check_integrity
from readers import PATIENCE, GatedReader, RamReader
from stores import keys, layout_of, make_plan, make_records
from threads import Task, run_all, wait_until

from moetier.tiers.arena.arena import Arena
from moetier.tiers.cache.budget import slots_for, smallest_budget
from moetier.tiers.errors import ClosedError, ExhaustedError, MissingExpertError, ProtocolError, StoreReadError
from moetier.tiers.host.demands import Failed, Granted, SessionEvent
from moetier.tiers.host.session import Session
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey

PLAN = make_plan(blocks=3, experts=4, top_k=2)
RECORDS = make_records(PLAN)  # no two alike
SMALLEST = slots_for(PLAN, smallest_budget(PLAN))
WIDE = make_plan(blocks=2, experts=200, top_k=2, layout=layout_of(32, 16))
WIDE_RECORDS = make_records(WIDE)


class Client:
    """A session and the events that it was told, in their order."""

    def __init__(self, tier: HostTier, *, leases: int = 8, timeout: float = PATIENCE) -> None:
        descriptor = tier.export()
        self.arena = Arena.map(descriptor, tier.layout)  # as another process does
        os.close(descriptor)
        self.events: SimpleQueue[SessionEvent] = SimpleQueue()
        self.session = tier.session(self.events.put, max_leases=leases, timeout=timeout)

    def event(self) -> SessionEvent:
        return self.events.get(timeout=PATIENCE)

    def granted(self, request: int) -> Granted:
        event = self.event()
        assert isinstance(event, Granted), event
        assert event.request == request
        assert self.arena.directory.find(event.key) == (event.slot, event.generation)
        return event

    def record(self, event: Granted) -> bytes:
        return bytes(self.arena.view(event.slot))

    def failed(self, request: int) -> BaseException:
        event = self.event()
        assert isinstance(event, Failed), event
        assert event.request == request
        return event.error

    def take(self, request: int, wanted: list[ExpertKey]) -> None:
        """Asks, and gives each back when it has looked at it."""
        self.session.acquire(request, wanted)
        left = set(wanted)
        while left:
            event = self.granted(request)
            left.remove(event.key)
            self.session.release(request, [event.key])


@pytest.fixture
def gate() -> Iterator[GatedReader]:
    reader = GatedReader(PLAN, RECORDS)
    yield reader
    reader.open()


# -- one session -------------------------------------------------------------------------------------------------------


def test_what_is_ready_is_granted_at_once_and_the_rest_as_it_arrives(gate: GatedReader) -> None:
    with HostTier(gate, slots={"records": 12}) as tier:
        client = Client(tier)
        gate.release(ExpertKey(0, 1))
        client.take(1, keys(0, 1))
        client.session.acquire(2, keys(0, 0, 1, 2))
        assert client.events.qsize() == 1, "before acquire returns"
        assert client.granted(2).key == ExpertKey(0, 1)
        for expert in (2, 0):
            gate.release(ExpertKey(0, expert))
            event = client.granted(2)
            assert event.key == ExpertKey(0, expert)
            assert client.record(event) == RECORDS[event.key]
        assert client.session.outstanding == 3
        check_integrity(tier)
        client.session.end(2)
        assert client.session.outstanding == 0
        stats = tier.stats()
        assert (stats.hits, stats.misses) == (1, 3)
        check_integrity(tier)


def test_a_request_waits_while_it_has_nothing(gate: GatedReader) -> None:
    with HostTier(gate, slots={"records": 12}) as tier:
        client = Client(tier)
        began = time.monotonic()
        client.session.acquire(1, keys(0, 0, 1))
        gate.wait_begun(*keys(0, 0, 1))
        gate.release(ExpertKey(0, 0))
        client.granted(1)
        once = tier.stats()
        assert (once.waits, once.leased) == (1, 1)
        assert 0 < once.wait_seconds < time.monotonic() - began
        gate.release(ExpertKey(0, 1))
        client.granted(1)
        assert (tier.stats().waits, tier.stats().leased) == (1, 2), "it had one all the time"
        client.session.end(1)
        client.take(2, keys(0, 0, 1))
        assert (tier.stats().waits, tier.stats().leased) == (1, 0), "a hit is no wait"
        client.session.acquire(3, keys(1, 0, 1))
        gate.release(ExpertKey(1, 0))
        client.session.release(3, [client.granted(3).key])
        assert tier.stats().waits == 2
        gate.release(ExpertKey(1, 1))
        client.session.release(3, [client.granted(3).key])
        assert tier.stats().waits == 3, "it had given back what it had"


def test_what_is_leased_stays_and_what_is_released_may_go() -> None:
    with HostTier(RamReader(PLAN, RECORDS), slots=SMALLEST) as tier:
        client, other = Client(tier), Client(tier)
        client.session.acquire(1, keys(0, 0))
        held = client.granted(1)
        for step in range(6):
            other.take(step, keys(1, 0, 1, 2, 3))
            assert client.arena.directory.generation(held.slot) == held.generation
            assert client.record(held) == RECORDS[held.key]
        client.session.release(1, keys(0, 0))
        other.take(9, keys(1, 0, 1, 2, 3))
        assert client.arena.directory.generation(held.slot) != held.generation
        check_integrity(tier)


def test_a_session_never_holds_more_than_its_leases() -> None:
    reader = RamReader(WIDE, WIDE_RECORDS)
    with HostTier(reader, slots={"records": 300}) as tier:
        client = Client(tier, leases=3)
        client.session.acquire(1, keys(0, *range(100)))
        client.session.acquire(2, keys(1, *range(100)))
        held: list[Granted] = []
        for _ in range(200):
            event = client.event()
            assert isinstance(event, Granted)
            held.append(event)
            assert len(held) <= client.session.outstanding <= 3
            if len(held) == 3 or client.session.outstanding == len(held):
                check_integrity(tier)
                for event in held:
                    client.session.release(event.request, [event.key])
                held.clear()
        assert client.session.outstanding == 0
        client.session.acquire(1, keys(0, 0))  # both are over: their numbers are free
        client.granted(1)
        assert sum(reader.reads.values()) == 200


def test_what_a_session_gives_back_goes_to_its_own_other_request() -> None:
    with HostTier(RamReader(PLAN, RECORDS), slots={"records": 12}) as tier:
        client = Client(tier, leases=1)
        client.session.acquire(1, keys(0, 0))
        client.granted(1)
        client.session.acquire(2, keys(1, 0))
        check_integrity(tier)
        assert client.events.empty()
        client.session.end(1)
        client.granted(2)
        check_integrity(tier)


@pytest.mark.parametrize("leases", [1, 2])
def test_a_request_for_many_holds_up_no_other_of_its_session(leases: int) -> None:
    with HostTier(RamReader(WIDE, WIDE_RECORDS), slots={"records": 300}, loaders=1) as tier:
        client = Client(tier, leases=leases)
        for request in range(4):  # as many threads of one process, say
            client.session.acquire(request, keys(request % 2, *range(10 * request, 10 * request + 10)))
        order = []
        for _ in range(40):
            event = client.event()
            assert isinstance(event, Granted)
            order.append(event.request)
            client.session.release(event.request, [event.key])
        for start in range(leases, 32, 4):
            assert len(set(order[start : start + 4])) == 4, order


def test_a_session_that_holds_all_its_leases_is_told_so() -> None:
    with HostTier(RamReader(PLAN, RECORDS), slots={"records": 12}) as tier:
        client = Client(tier, leases=1)
        client.session.acquire(1, keys(0, 0))
        client.granted(1)
        client.session.acquire(2, keys(0, 1), timeout=0.01)
        error = client.failed(2)
        assert isinstance(error, ExhaustedError)
        assert "holds all of its 1 leases" in error.cause
        client.session.end(1)
        client.take(3, keys(0, 1))


def test_a_wrong_word_is_an_error_and_changes_nothing() -> None:
    with HostTier(RamReader(PLAN, RECORDS), slots={"records": 12}) as tier:
        client = Client(tier)
        for block, expert in ((-1, 0), (3, 0), (0, -1), (0, 4), (0, 10**9)):
            with pytest.raises(MissingExpertError):
                client.session.acquire(1, keys(block, expert))
            with pytest.raises(MissingExpertError):
                client.session.prefetch(block, keys(block, expert))
            with pytest.raises(MissingExpertError):
                client.session.note_uses(keys(block, expert))
        client.session.acquire(1, keys(0, 0))
        client.granted(1)
        with pytest.raises(ProtocolError, match="not over"):
            client.session.acquire(1, keys(0, 1))
        for request, wanted in ((7, []), (7, keys(0, 1)), (1, keys(0, 3)), (1, keys(2, 10**9))):
            client.session.release(request, wanted)  # of nothing that is held
        client.session.acquire(3, [])
        assert client.session.outstanding == 1
        assert client.events.empty()
        assert tier.stats().misses == 1
        check_integrity(tier)


def test_used_are_hits_and_are_evicted_later() -> None:
    with HostTier(RamReader(PLAN, RECORDS), slots={"records": 6}) as tier:  # two for each block
        client = Client(tier)
        client.take(1, keys(0, 0, 1))
        client.session.note_uses(keys(0, 0))  # else it would be the next to go, as it was asked for first
        client.session.note_uses(keys(0, 1))
        client.session.note_uses([ExpertKey(0, 0), ExpertKey(2, 3)])
        assert tier.stats().hits == 4
        client.take(2, keys(0, 2))
        assert tier.absent(keys(0, 0, 1)) == keys(0, 1)


# -- errors and ends ---------------------------------------------------------------------------------------------------


def test_a_load_that_fails_fails_each_request_that_waits_and_no_other(gate: GatedReader) -> None:
    with HostTier(gate, slots={"records": 12}) as tier:
        gate.broken.add(ExpertKey(0, 1))
        clients = [Client(tier) for _ in range(3)]
        for client in clients:
            client.session.acquire(1, keys(0, 0, 1))
            client.session.acquire(2, keys(0, 2))
        gate.release(ExpertKey(0, 0))
        for client in clients:
            assert client.granted(1).key == ExpertKey(0, 0)
        gate.open()
        for client in clients:
            events = [client.event(), client.event()]
            (failure,) = (event for event in events if isinstance(event, Failed))
            assert failure.request == 1
            assert isinstance(failure.error, StoreReadError)
            assert client.session.outstanding == 1, "the lease of the request that failed has ended"
        assert gate.reads[ExpertKey(0, 1)] == 1
        check_integrity(tier)
        gate.broken.clear()
        clients[0].take(1, keys(0, 1))


def test_a_request_without_a_slot_fails_in_time_and_hits_go_on() -> None:
    with HostTier(RamReader(PLAN, RECORDS), slots=SMALLEST) as tier:
        holder, client = Client(tier), Client(tier, timeout=0.2)
        holder.session.acquire(1, keys(0, 0, 1))
        held = [holder.granted(1) for _ in range(2)]
        began = time.monotonic()
        client.session.acquire(1, keys(1, 0, 1))
        client.session.acquire(2, keys(1, 2), timeout=0.4)
        client.session.acquire(3, keys(0, 1))  # which is there
        assert client.granted(3).key == ExpertKey(0, 1)
        for request, timeout in ((1, 0.2), (2, 0.4)):
            error = client.failed(request)
            assert time.monotonic() - began >= timeout
            assert isinstance(error, ExhaustedError)
            assert f"{timeout:g} seconds" in error.cause
        check_integrity(tier)
        client.session.acquire(4, keys(1, 0), timeout=PATIENCE)
        holder.session.release(1, [held[0].key])
        assert client.granted(4).slot == held[0].slot
        check_integrity(tier)


def test_time_does_not_run_while_something_is_on_its_way_or_held(gate: GatedReader) -> None:
    with HostTier(gate, slots=SMALLEST) as tier:
        client, other = Client(tier, timeout=0.05), Client(tier, timeout=0.1)
        client.session.acquire(1, keys(0, 0, 1, 2))
        other.session.acquire(1, keys(1, 0))
        assert isinstance(other.failed(1), ExhaustedError), "twice the timeout of the first has passed"
        gate.open()
        first = client.granted(1)
        client.granted(1)
        other.session.acquire(2, keys(1, 0))
        assert isinstance(other.failed(2), ExhaustedError)
        assert client.events.empty(), "it waits for itself alone"
        client.session.release(1, [first.key])
        client.granted(1)


def test_close_gives_back_and_lets_loads_go_on(gate: GatedReader) -> None:
    with HostTier(gate, slots=SMALLEST) as tier:
        client, other = Client(tier), Client(tier)
        gate.release(ExpertKey(0, 0))
        client.session.acquire(1, keys(0, 0, 1, 2))
        client.granted(1)
        gate.wait_begun(ExpertKey(0, 1))
        other.session.acquire(1, keys(1, 0))  # starved
        client.session.close()
        client.session.close()
        assert client.session.outstanding == 0
        with pytest.raises(ClosedError):
            client.session.acquire(2, keys(0, 0))
        with pytest.raises(ClosedError):
            client.session.prefetch(0, keys(0, 0))
        client.session.end(1)
        check_integrity(tier)
        gate.open()
        other.granted(1)
        wait_until(lambda: tier.stats().ready == 2)
        assert set(gate.reads) == {ExpertKey(0, 0), ExpertKey(0, 1), ExpertKey(1, 0)}
        assert client.events.empty(), "nothing is delivered any more"


def test_the_end_of_the_tier_is_told(gate: GatedReader) -> None:
    tier = HostTier(gate, slots=SMALLEST, loaders=1)
    clients = [Client(tier) for _ in range(3)]
    for number, client in enumerate(clients):  # one is read, one is queued, one finds no slot
        client.session.acquire(1, keys(number, 0))
        gate.wait_begun(ExpertKey(0, 0))
    closer = Task(tier.close)
    for client in clients:
        assert isinstance(client.failed(1), ClosedError)
    gate.open()
    closer.result()
    for client in clients:
        with pytest.raises(ClosedError):
            client.session.acquire(2, keys(0, 0))
        client.session.close()
    check_integrity(tier)
    with pytest.raises(ClosedError):
        tier.session(lambda event: None)


# -- several -----------------------------------------------------------------------------------------------------------


def test_eight_sessions_and_a_thread_that_want_one_expert_are_one_read(gate: GatedReader) -> None:
    with HostTier(gate, slots={"records": 2}) as tier:
        clients = [Client(tier) for _ in range(8)]
        thread = Task(lambda: [lease.key for lease in tier.acquire(keys(0, 1))])
        for client in clients:
            client.session.acquire(1, keys(0, 1))
        wait_until(lambda: tier.stats().misses == 9)
        gate.open()
        assert {client.granted(1).key for client in clients} == {ExpertKey(0, 1)}
        assert thread.result() == keys(0, 1)
        assert gate.reads == {ExpertKey(0, 1): 1}
        stats = tier.stats()
        assert (stats.hits, stats.misses, stats.joined) == (0, 9, 8)
        assert stats.bytes_in == PLAN.layouts["records"].slot_bytes


def test_a_session_that_ends_early_evicts_no_more_than_it_may_load() -> None:
    gate = GatedReader(WIDE, WIDE_RECORDS)
    with HostTier(gate, slots={"records": 40}, loaders=2) as tier:
        gate.open()
        other, client = Client(tier), Client(tier, leases=1)
        for start in range(0, 40, 8):
            other.take(start, keys(start // 20, *range(start, start + 8)))
        ready = tier.stats().ready
        gate.shut()
        for request in range(100):
            client.session.acquire(request, keys(1, 60 + request))
            client.session.end(request)
        check_integrity(tier)
        assert client.session.outstanding == 0
        assert ready - tier.stats().ready <= 4
        gate.open()


@pytest.mark.parametrize("slots", [400, 250, 2])
def test_a_prefill_does_not_delay_anothers_miss_beyond_the_loads_in_progress(slots: int) -> None:
    gate = GatedReader(WIDE, WIDE_RECORDS)
    with HostTier(gate, slots={"records": slots}, loaders=2) as tier:
        prefill, decode = Client(tier, leases=8), Client(tier)
        prefill.session.acquire(1, keys(0, *range(200)))
        wait_until(lambda: len(gate.begun) == 2)
        decode.session.acquire(1, keys(1, 7))
        first, second = gate.begun
        gate.release(first)
        if slots == 2:  # all of them are the prefill's: the first that it gives back is the other's
            prefill.session.release(1, [prefill.granted(1).key])
        gate.wait_begun(ExpertKey(1, 7))
        gate.release(ExpertKey(1, 7))
        assert decode.granted(1).key == ExpertKey(1, 7)
        assert gate.begun[0] == second, "which was being read all the while"
        check_integrity(tier)
        gate.open()


@pytest.mark.parametrize("slots", [400, 2])
def test_nor_does_a_threads_prefill(slots: int) -> None:
    gate = GatedReader(WIDE, WIDE_RECORDS)
    with HostTier(gate, slots={"records": slots}, loaders=2) as tier:
        decode = Client(tier)
        leases = tier.acquire(keys(0, *range(200)))
        prefill = Task(lambda: next(leases))
        wait_until(lambda: len(gate.begun) == 2)
        decode.session.acquire(1, keys(1, 7))
        first, _ = gate.begun
        gate.release(first)
        assert prefill.result().key == first
        if slots == 2:
            prefill = Task(lambda: next(leases))  # gives the first back
        gate.wait_begun(ExpertKey(1, 7))
        gate.open()
        assert decode.granted(1).key == ExpertKey(1, 7)
        decode.session.end(1)
        prefill.result()
        leases.close()
        check_integrity(tier)


def test_whoever_joins_a_load_that_is_queued_has_it_in_his_turn_too() -> None:
    gate = GatedReader(WIDE, WIDE_RECORDS)
    with HostTier(gate, slots={"records": 400}, loaders=1) as tier:
        prefill, decode = Client(tier, leases=8), Client(tier)
        prefill.session.acquire(1, keys(0, *range(200)))  # two are in flight at most for each loader
        gate.wait_begun(ExpertKey(0, 0))
        decode.session.acquire(1, keys(0, 1))
        decode.session.acquire(2, keys(1, 0))
        third = Client(tier)
        third.session.acquire(1, keys(0, 1))
        gate.release(ExpertKey(0, 0))
        gate.wait_begun(ExpertKey(0, 1))
        gate.release(ExpertKey(0, 1))
        assert {client.granted(1).key for client in (decode, third)} == {ExpertKey(0, 1)}
        gate.wait_begun(ExpertKey(1, 0))
        gate.open()
        assert gate.reads[ExpertKey(0, 1)] == 1


def test_sessions_take_turns() -> None:
    gate = GatedReader(WIDE, WIDE_RECORDS)
    with HostTier(gate, slots={"records": 400}, loaders=1) as tier:
        clients = [Client(tier) for _ in range(3)]
        for number, client in enumerate(clients):
            client.session.acquire(1, keys(0, *range(10 * number, 10 * number + 10)))
        order = []
        for _ in range(9):
            wait_until(lambda: len(gate.begun) == 1)
            order.append(gate.begun[0])
            gate.release(gate.begun[0])
            wait_until(lambda: order[-1] not in gate.begun)
        for start in (0, 3, 6):
            assert {key.expert // 10 for key in order[start : start + 3]} == {0, 1, 2}, order
        gate.open()


def test_prefetch_requests_are_each_sessions_own_and_take_turns() -> None:
    gate = GatedReader(WIDE, WIDE_RECORDS)
    with HostTier(gate, slots={"records": 400}, loaders=1) as tier:
        first, second = Client(tier), Client(tier)
        first.session.prefetch(0, keys(0, *range(10)))
        gate.wait_begun(ExpertKey(0, 0))
        second.session.prefetch(0, keys(0, *range(100, 110)))
        second.session.acquire(1, keys(1, 0))
        order = []

        def end_one() -> None:
            wait_until(lambda: len(gate.begun) == 1)
            order.append(gate.begun[0])
            gate.release(order[-1])
            wait_until(lambda: order[-1] not in gate.begun)

        for _ in range(6):
            end_one()
        assert order == keys(0, 0) + keys(1, 0) + keys(0, 100, 1, 101, 2) or order == keys(0, 0) + keys(1, 0) + keys(
            0, 1, 100, 2, 101
        ), "demands first, then each in turn"
        second.session.acquire(2, keys(0, 150))  # clears its own requests for the block
        first.session.close()  # and the end those of the first
        wait_until(lambda: len(gate.begun) == 1)
        begun = sum(gate.reads.values()) + 1
        gate.open()
        wait_until(lambda: tier.stats().ready >= begun)
        second.session.acquire(3, keys(1, 1))
        events = [second.event() for _ in range(3)]
        assert {event.key for event in events if isinstance(event, Granted)} == set(keys(1, 0, 1) + keys(0, 150))
        assert sum(gate.reads.values()) <= begun + 2, "the rest was not requested any more"
        check_integrity(tier)


@pytest.mark.parametrize("slots", [2, 3, 7])
def test_a_storm_of_sessions_and_threads(slots: int) -> None:
    """Clients that ask for anything, tell anything and go at any time, beside threads that acquire."""
    reader = RamReader(PLAN, RECORDS)
    with HostTier(reader, slots={"records": slots}, loaders=2) as tier:
        refused = 0

        def client(seed: int) -> None:
            nonlocal refused
            chance = random.Random(seed)
            for _ in range(6):
                one = Client(tier, leases=chance.randint(1, 4))
                for request in range(12):
                    block = chance.randrange(3)
                    wanted = set(keys(block, *chance.sample(range(4), chance.randint(1, 4))))
                    one.session.acquire(request, sorted(wanted))
                    while wanted:
                        event = one.granted(request)
                        assert one.record(event) == RECORDS[event.key], "a lease whose bytes are another's"
                        wanted.remove(event.key)
                        if chance.random() < 0.1:
                            one.session.end(request)
                            break
                        one.session.release(request, [event.key])
                    if chance.random() < 0.3:
                        block = chance.randrange(3)
                        one.session.prefetch(block, keys(block, *chance.sample(range(4), 2)))
                        one.session.note_uses(keys(block, 1))
                    while not one.events.empty():  # what came while it gave all back
                        one.event()
                if chance.random() < 0.5:
                    one.session.acquire(99, keys(0, 0, 1, 2, 3))
                one.session.close()
                refused += not one.events.empty()

        def thread(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(60):
                block = chance.randrange(3)
                wanted = keys(block, *chance.sample(range(4), chance.randint(1, 4)))
                with closing(tier.acquire(wanted)) as leases:
                    for lease in leases:
                        assert bytes(lease.record) == RECORDS[lease.key]

        done = threading.Event()

        def check() -> None:
            while not done.wait(0.001):  # checking all the time would take lock and GIL from the others
                check_integrity(tier)

        checker = Task(check)
        run_all([*(lambda seed=s: client(seed) for s in range(6)), *(lambda seed=s: thread(seed) for s in range(3))])
        done.set()
        checker.result()
        check_integrity(tier)
        assert tier.stats().leased == 0
        stats = tier.stats()
        assert sum(reader.reads.values()) - stats.prefetched <= stats.misses - stats.joined


def test_deliver_is_called_in_the_order_of_what_happens() -> None:
    """Many threads change the tier; a request is answered for each key, then its number may be used again."""
    with HostTier(RamReader(PLAN, RECORDS), slots={"records": 4}, loaders=4) as tier:
        client = Client(tier)

        def hammer() -> None:
            for step in range(100):
                list(tier.acquire(keys(step % 3, 0, 1, 2)))

        tasks = [Task(hammer) for _ in range(2)]
        for _ in range(100):
            client.take(1, keys(2, 3, 1))
        for task in tasks:
            task.result()
        assert client.events.empty()


def test_a_session_needs_no_thread_of_its_own() -> None:
    with HostTier(RamReader(PLAN, RECORDS), slots=SMALLEST) as tier:
        threads = threading.active_count()
        sessions: list[Session] = [Client(tier).session for _ in range(50)]
        assert threading.active_count() == threads + 1, "one for all that wait"
        client, holder = Client(tier, timeout=0.01), Client(tier)
        holder.session.acquire(1, keys(0, 0, 1))
        for number in range(3):
            client.session.acquire(number, keys(1, number))
            assert isinstance(client.failed(number), ExhaustedError)
        assert threading.active_count() == threads + 1
        for session in sessions:
            session.close()
    assert threading.active_count() == threads - 4
