"""A host tier with its threads, in any order of events that hypothesis can think of."""

from __future__ import annotations

from collections.abc import Generator

from host_tiers import PLAN, RECORDS
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from integrity import check_integrity
from readers import GatedReader
from stores import keys, make_records

from moetier.tiers.cache.policies import POLICIES
from moetier.tiers.errors import StoreReadError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.host.warmup import HotSet
from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import Lease


class HostMachine(RuleBasedStateMachine):
    """The real tier with its threads over a disk that answers when told. The oracle is a dict of bytes.

    Suspended iterators hold at most as many slots as there are, less what the next caller needs: one thread can't give
    itself a slot back while it waits. The interleavings of callers that do wait are test_ledger_machine's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.oracle = make_records(PLAN, seed=1)
        self.suspended: list[tuple[Generator[Lease[memoryview], None, None], set[ExpertKey]]] = []
        self.leases: dict[int, Lease[memoryview]] = {}  # by the iterator's id
        self.most: dict[int, int] = {}  # likewise: slots that it may hold, as those that come together end together

    @initialize(count=st.integers(4, 12), loaders=st.integers(1, 3), policy=st.sampled_from(sorted(POLICIES)))
    def open(self, count: int, loaders: int, policy: str) -> None:
        self.count = count
        self.reader = GatedReader(PLAN, self.oracle)
        self.tier = HostTier(self.reader, slots={"records": count}, loaders=loaders, policy=policy)

    def spare(self) -> int:
        return self.count - sum(self.most[id(leases)] for leases, _ in self.suspended)

    def draw(self, data: st.DataObject, most: int) -> list[ExpertKey]:
        block = data.draw(st.integers(0, 2))
        return keys(block, *data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=most)))

    def check(self, lease: Lease[memoryview], wanted: set[ExpertKey]) -> None:
        assert lease.key in wanted, "each key once"
        wanted.remove(lease.key)
        assert bytes(lease.record) == self.oracle[lease.key]

    @precondition(lambda self: self.spare() >= 2)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        """Takes a first lease and stops there, with more in flight."""
        wanted = set(asked := self.draw(data, min(4, self.spare() - 1)))
        leases = self.tier.acquire(asked)
        self.most[id(leases)] = len(wanted)
        self.reader.open()
        lease = next(leases)
        self.reader.shut()
        self.check(lease, wanted)
        self.leases[id(leases)] = lease
        self.suspended.append((leases, wanted))

    @precondition(lambda self: self.suspended)
    @rule(data=st.data())
    def next(self, data: st.DataObject) -> None:
        leases, wanted = entry = data.draw(st.sampled_from(self.suspended))
        del self.leases[id(leases)]
        self.reader.open()
        lease = next(leases, None)
        self.reader.shut()
        if lease is None:
            assert not wanted, "every key"
            self.suspended.remove(entry)
        else:
            self.check(lease, wanted)
            self.leases[id(leases)] = lease

    @precondition(lambda self: self.suspended)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        leases, _ = entry = data.draw(st.sampled_from(self.suspended))
        del self.leases[id(leases)]
        leases.close()
        self.suspended.remove(entry)

    @precondition(lambda self: self.spare() >= 1)
    @rule(data=st.data(), broken=st.booleans())
    def acquire_all(self, data: st.DataObject, broken: bool) -> None:
        wanted = set(asked := self.draw(data, min(4, self.spare())))
        if broken := broken and not any(asked[0] in others for _, others in self.suspended):
            self.reader.broken.add(asked[0])
        self.reader.open()
        try:
            for lease in self.tier.acquire(asked):
                self.check(lease, wanted)
            assert not wanted, "every key"
        except StoreReadError:
            assert broken
            assert asked[0] in wanted
        finally:
            self.reader.shut()
            self.reader.broken.clear()

    @rule(data=st.data())
    def prefetch(self, data: st.DataObject) -> None:
        requests = self.draw(data, 4)
        self.tier.prefetch(requests[0].block, requests)

    @rule(hot=st.dictionaries(st.sampled_from(sorted(RECORDS)), st.integers(1, 9)))
    def warm(self, hot: dict[ExpertKey, float]) -> None:
        self.tier.warm(HotSet(hot).hottest)

    @rule()
    def stats(self) -> None:
        stats = self.tier.stats()
        assert stats.ready <= stats.slots == self.count

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "tier"):
            check_integrity(self.tier)
            for lease in self.leases.values():
                assert bytes(lease.record) == self.oracle[lease.key], "a lease is valid until the next is taken"

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.reader.open()
            self.leases.clear()
            for leases, _ in self.suspended:
                leases.close()
            check_integrity(self.tier)
            self.tier.close()


TestHost = HostMachine.TestCase
TestHost.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
