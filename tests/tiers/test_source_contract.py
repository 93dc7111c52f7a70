"""The contract of ExpertSource (moetier.tiers.source), checked for each source over a real store on a real disk."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cuts import cut
from fake_device import FakeDevice
from integrity import check_integrity
from local_daemons import local_daemon
from outlets import PLAIN, served
from stores import keys, make_plan, make_records, write_store, written
from threads import Task, run_all, wait_until

from moetier.runtime.client.remote import RemoteStore
from moetier.runtime.client.tier import DaemonTier
from moetier.tiers.arena.arena import Residents
from moetier.tiers.cache.budget import slots_for, smallest_budget
from moetier.tiers.device.tier import DeviceTier
from moetier.tiers.device.views import HostViews
from moetier.tiers.errors import ChecksumError, ClosedError, MissingExpertError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import ExpertSource, Lease
from moetier.tiers.store.reader import ShardStore

PLAN = make_plan(blocks=3, experts=6, top_k=2)
RECORDS = make_records(PLAN)
TWO = slots_for(PLAN, smallest_budget(PLAN))
ALL = {"records": PLAN.record_count}
KINDS = [
    *("host", "views", "device", "device that promotes", "remote"),
    *("daemon", "views of a daemon", "device on a daemon", "device that promotes on a daemon"),
]


@dataclass
class Opened:
    """A source under test, and the host tier that it is or stands on."""

    source: ExpertSource[Any]
    host: HostTier
    store: ShardStore
    data: Callable[[Lease[Any]], bytes]  # what a computation on the lease sees

    def take(self, block: int, *experts: int) -> list[ExpertKey]:
        """Acquire records, check the bytes of each that holds, and return the keys in order of arrival."""
        arrived = []
        for lease in self.source.acquire(keys(block, *experts)):
            data = self.data(lease)
            if lease.validate():
                assert data == RECORDS[lease.key], f"wrong bytes for {lease.key}"
                arrived.append(lease.key)
        return arrived

    def check(self) -> None:
        check_integrity(self.host)
        if isinstance(self.source, DeviceTier):
            check_integrity(self.source)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("store"), PLAN, RECORDS)


@contextlib.contextmanager
def open_source(kind: str, folder: Path, slots: dict[str, int]) -> Iterator[Opened]:
    with contextlib.ExitStack() as closing:
        store = closing.enter_context(ShardStore.open(folder))
        host = closing.enter_context(HostTier(store, slots=slots, loaders=2))
        below: ExpertSource[memoryview] = host
        if "daemon" in kind:
            place = Path(closing.enter_context(tempfile.TemporaryDirectory())) / "daemon"
            closing.enter_context(local_daemon(host, store.manifest, folder, place))
            below = closing.enter_context(DaemonTier.open(place, folder / "no store", store.manifest))
        match kind.split()[0]:
            case "views":
                views = HostViews(below)
                yield Opened(views, host, store, lambda lease: lease.record.numpy().tobytes())
                views.close()
            case "device":
                device = FakeDevice(random.Random(0))
                promotes = "promotes" in kind
                tier = DeviceTier(below, store.manifest, slots=slots, device=device, promotes=promotes)

                def data(lease: Lease[torch.Tensor]) -> bytes:
                    seen: list[bytes] = []
                    device.compute(lambda: seen.append(lease.record.numpy().tobytes()))
                    device.current_stream().record_event().synchronize()
                    return seen[0]

                yield Opened(tier, host, store, data)
                tier.close()
            case "remote":  # a tier of another host, at the same budget, between it and the store
                with (
                    served(host) as address,
                    RemoteStore(address, PLAIN, store.manifest) as reader,
                    HostTier(reader, slots=slots, loaders=2) as above,
                ):
                    yield Opened(above, above, store, lambda lease: bytes(lease.record))
            case _:
                yield Opened(below, host, store, lambda lease: bytes(lease.record))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def smallest(kind: str, folder: Path) -> Iterator[Opened]:
    """Every tier has room for exactly one block's top-k records."""
    with open_source(kind, folder, dict(TWO)) as opened:
        yield opened
        opened.check()


@pytest.fixture
def roomy(kind: str, folder: Path) -> Iterator[Opened]:
    """Every tier has room for all records."""
    with open_source(kind, folder, dict(ALL)) as opened:
        yield opened
        opened.check()


@pytest.mark.parametrize("slots", [2, 5, 18, *(pytest.param(each, marks=pytest.mark.slow) for each in (3, 6, 7, 11))])
def test_each_key_comes_once_with_its_bytes(kind: str, folder: Path, slots: int) -> None:
    with open_source(kind, folder, {"records": slots}) as opened:
        for experts in ([0, 1, 2, 3, 4, 5], [5, 3], [2], [4, 0, 1]) * 3:
            for block in range(3):
                assert sorted(opened.take(block, *experts)) == sorted(keys(block, *experts))
                opened.check()
        stats = opened.source.stats()
        assert stats.hits + stats.misses == 3 * 3 * 12
        assert stats.ready <= stats.slots == slots
        if slots == 18:
            assert stats.misses == 18
        elif slots == 2:
            assert stats.hits == 0, "three blocks stream through two slots"


def test_nothing_wanted_is_nothing_given(smallest: Opened) -> None:
    assert smallest.take(0) == []


def test_a_key_wanted_twice_comes_once(smallest: Opened) -> None:
    assert sorted(smallest.take(1, 4, 4, 2, 4, 2)) == keys(1, 2, 4)


def test_residents_come_first(roomy: Opened) -> None:
    roomy.take(2, 1, 4)
    arrived = roomy.take(2, 0, 1, 2, 3, 4, 5)
    assert arrived[:2] == keys(2, 1, 4)
    assert sorted(arrived[2:]) == keys(2, 0, 2, 3, 5)
    assert sorted(roomy.take(2, 5, 3, 0)) == keys(2, 0, 3, 5)


def test_a_lease_is_valid_until_the_next_is_taken(smallest: Opened) -> None:
    """Other callers ask for all other records meanwhile, and there is one other slot."""
    leases = smallest.source.acquire(keys(0, 3))
    lease = next(leases)
    assert smallest.data(lease) == RECORDS[lease.key]

    def hammer() -> None:
        for _ in range(5):
            for block in (1, 2, 0):
                smallest.take(block, 0, 1, 2)

    tasks = [Task(hammer) for _ in range(2)]
    while any(task.thread.is_alive() for task in tasks):
        assert smallest.data(lease) == RECORDS[lease.key]
        tasks[0].thread.join(0.001)  # who looks all the time takes the interpreter from who hammers
    for task in tasks:
        task.result()
    assert next(leases, None) is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # cut in a finalizer
@pytest.mark.parametrize("stride", [331, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("keeps", [False, True], ids=["frames go", "frames stay"])
def test_an_exception_from_outside_at_any_moment_breaks_nothing(
    smallest: Opened, kind: str, stride: int, keeps: bool
) -> None:
    """A signal handler raises it. A traceback that is kept keeps the iterators of its frames."""

    def work() -> None:
        smallest.source.prefetch(1, keys(1, number % 6, (number + 1) % 6))
        smallest.take(0, 3, number % 3)
        smallest.take(1, number % 6)
        smallest.take(2, 0, 1, 2, 3)
        smallest.source.stats()

    kept, cuts = [], 0
    number = zlib.crc32(f"{kind} {keeps}".encode()) % stride  # not the same points in all cases
    while (error := cut(work, number)) is not None:
        if keeps:
            kept.append(error)
        else:
            error.__traceback__ = None
        smallest.source.release_leases()
        smallest.check()
        block = number % 3
        found = Task(lambda block=block: smallest.take(block, 1, 4, 5)).result()  # type: ignore[misc]
        assert sorted(found) == keys(block, 1, 4, 5), error
        number += stride
        cuts += 1
    assert cuts > 1
    kept.clear()
    gc.collect()
    smallest.check()
    wait_until(lambda: smallest.host.stats().leased == 0)
    assert sorted(smallest.take(0, 0, 1, 2)) == keys(0, 0, 1, 2)


def test_a_closed_iterator_holds_nothing(smallest: Opened) -> None:
    for _ in range(5):
        leases = smallest.source.acquire(keys(0, 0, 1, 2, 3))
        next(leases)
        next(leases)
        leases.close()
        smallest.check()
    assert len(Task(lambda: smallest.take(1, 0, 1, 2, 3)).result()) == 4


def test_an_exception_in_the_loop_holds_nothing(smallest: Opened) -> None:
    def consume() -> None:
        for lease in smallest.source.acquire(keys(0, 0, 1, 2, 3)):
            raise ZeroDivisionError(lease.key)

    for _ in range(5):
        with pytest.raises(ZeroDivisionError):
            consume()
    assert len(Task(lambda: smallest.take(1, 0, 1, 2, 3)).result()) == 4


class Collecting(ExpertKey):
    """A key that runs the garbage collector whenever it is looked up, which tiers do with their lock held."""

    def __hash__(self) -> int:
        gc.collect()
        return super().__hash__()


def test_a_lost_iterator_holds_nothing_wherever_the_collector_finds_it(smallest: Opened) -> None:
    def lose() -> None:
        leases = smallest.source.acquire(keys(0, 0, 1, 2, 3))
        next(leases)
        cycle: list[object] = [leases]
        cycle.append(cycle)

    def work() -> None:
        for step in range(5):
            lose()
            wanted = [Collecting(1, expert) for expert in (step, 5)]
            assert len(list(smallest.source.acquire(wanted))) == 2

    gc.disable()
    try:
        Task(work).result()
    finally:
        gc.enable()
    smallest.check()
    assert len(smallest.take(2, 0, 1, 2, 3)) == 4


def test_an_iterator_that_never_began_holds_nothing(smallest: Opened) -> None:
    unused = [smallest.source.acquire(keys(0, 0, 1)) for _ in range(5)]
    assert smallest.take(1, 0, 1) != []
    assert smallest.source.stats().misses == 2
    for leases in unused:
        leases.close()


def test_a_bad_record_is_an_error_and_the_others_are_served(kind: str, tmp_path: Path) -> None:
    write_store(tmp_path, PLAN, RECORDS)
    with open_source(kind, tmp_path, {"records": 6}) as opened:
        path = opened.store.path(1)
        good = path.read_bytes()
        at = good.index(RECORDS[ExpertKey(1, 2)]) + 1000
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        for _ in range(3):
            with pytest.raises(ChecksumError, match="expert 2"):
                opened.take(1, 0, 1, 2, 3)
            opened.check()
            assert sorted(opened.take(1, 0, 1, 3)) == keys(1, 0, 1, 3)
            assert sorted(opened.take(2, 1, 2)) == keys(2, 1, 2)
        assert opened.host.stats().failures == 3
        path.write_bytes(good)
        assert opened.take(1, 2) == keys(1, 2), "an error is not remembered"


def test_what_the_model_does_not_have_is_an_error(smallest: Opened) -> None:
    for block, expert in ((0, 6), (0, 10**9), (0, -1), (3, 0), (-1, 0)):
        with pytest.raises(MissingExpertError):
            smallest.take(block, expert)
        with pytest.raises(MissingExpertError):
            smallest.source.prefetch(block, keys(block, expert))
    assert smallest.take(0, 5) == keys(0, 5)


def test_a_prefetch_is_fulfilled_or_not_and_harms_nothing(smallest: Opened) -> None:
    for step in range(30):
        block = step % 3
        smallest.source.prefetch((block + 1) % 3, keys((block + 1) % 3, 0, 3, 5))
        assert len(smallest.take(block, step % 6, (step + 1) % 6)) == 2
        smallest.source.prefetch(block, [])
    smallest.check()


def test_a_prefetch_saves_the_wait(roomy: Opened, kind: str) -> None:
    roomy.source.prefetch(1, keys(1, 0, 3))
    wait_until(lambda: roomy.host.stats().ready == 2)
    if "promotes" in kind:
        wait_until(lambda: roomy.source.stats().prefetched == 2)
    assert sorted(roomy.take(1, 0, 3)) == keys(1, 0, 3)
    if "promotes" in kind:
        stats = roomy.source.stats()
        assert stats.useful + stats.late == 2
    else:
        wait_until(lambda: roomy.host.stats().hits == 2)  # a daemon learns of it later
    assert roomy.host.stats().prefetched == 2


LENDERS = ["host", "remote", "daemon"]


@pytest.mark.parametrize("kind", LENDERS)
def test_what_is_ready_is_lent_and_no_demand(roomy: Opened) -> None:
    roomy.take(0, 1, 2)
    before, below = roomy.source.stats(), roomy.host.stats()
    for _ in range(2):
        for key in keys(0, 1, 2):
            with roomy.source.pin(key) as lease:
                assert lease is not None
                assert lease.key == key
                assert roomy.data(lease) == RECORDS[key]
                assert lease.validate()
        with roomy.source.pin(ExpertKey(0, 3)) as lease:
            assert lease is None
    with pytest.raises(ZeroDivisionError), roomy.source.pin(ExpertKey(0, 1)):
        raise ZeroDivisionError
    assert (roomy.source.stats(), roomy.host.stats()) == (before, below)
    roomy.check()


@pytest.mark.parametrize("kind", LENDERS)
def test_a_prediction_that_was_copied_is_useful_when_it_is_used_above(roomy: Opened) -> None:
    roomy.source.prefetch(1, keys(1, 0, 3, 5))
    wait_until(lambda: roomy.host.stats().ready == 3)
    for key in keys(1, 0, 3):
        with roomy.source.pin(key) as lease:
            assert lease is not None
            assert lease.validate()
    assert roomy.host.stats().useful == 0
    roomy.source.uses.note_copies(keys(1, 0, 2))  # 2 was not predicted
    wait_until(lambda: roomy.host.stats().useful == 1)
    roomy.source.uses.note_copies(keys(1, 0))
    roomy.take(1, 0, 3, 5)
    wait_until(lambda: roomy.host.stats().useful == 3)
    stats = roomy.host.stats()
    assert (stats.prefetched, stats.late, stats.wasted) == (3, 0, 0)


@pytest.mark.parametrize("kind", LENDERS)
def test_a_loan_keeps_what_is_lent_or_tells_that_it_did_not(smallest: Opened) -> None:
    smallest.take(0, 1, 2)
    with smallest.source.pin(ExpertKey(0, 1)) as lease:
        assert lease is not None
        smallest.take(1, 0, 1, 2)
        data = smallest.data(lease)
        assert not lease.validate() or data == RECORDS[lease.key]
    assert sorted(smallest.take(2, 0, 1)) == keys(2, 0, 1), "it holds nothing any more"


@pytest.mark.parametrize("kind", LENDERS)
def test_what_cannot_be_lent_is_an_error(kind: str, folder: Path) -> None:
    with open_source(kind, folder, dict(ALL)) as opened:
        with pytest.raises(MissingExpertError), opened.source.pin(ExpertKey(0, 6)):
            pass
        opened.source.close()
        with pytest.raises(ClosedError), opened.source.pin(ExpertKey(0, 0)):
            pass


def test_absent_is_what_is_not_ready(roomy: Opened) -> None:
    assert roomy.source.absent(keys(0, 0, 1, 2)) == keys(0, 0, 1, 2)
    roomy.take(0, 1)
    assert roomy.source.absent(keys(0, 0, 1, 2)) == keys(0, 0, 2)


def test_after_close_everything_raises(kind: str, folder: Path) -> None:
    with open_source(kind, folder, dict(TWO)) as opened:
        leases = opened.source.acquire(keys(0, 0, 1))
        next(leases)
        opened.source.close()
        with pytest.raises(ClosedError):
            next(leases)
        with pytest.raises(ClosedError):
            opened.take(0, 0)
        with pytest.raises(ClosedError):
            opened.source.prefetch(0, keys(0, 0))
        opened.source.close()
        assert opened.source.stats().misses == 2


@pytest.mark.parametrize("blocks", [(0, 0), (0, 1)], ids=["one block", "two blocks"])
def test_two_callers_at_the_smallest_budget_come_to_an_end(smallest: Opened, blocks: tuple[int, int]) -> None:
    """Each caller asks for three times as many records as there are slots."""

    def caller(block: int) -> int:
        return sum(len(smallest.take(block, 0, 1, 2, 3, 4, 5)) for _ in range(5))

    assert run_all([lambda b=b: caller(b) for b in blocks]) == [30, 30]


@pytest.mark.parametrize("slots", [2, pytest.param(7, marks=pytest.mark.slow)])
def test_a_storm(kind: str, folder: Path, slots: int) -> None:
    """Callers demand and prefetch anything, and stop anywhere."""

    def caller(opened: Opened, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(12):
            block = chance.randrange(3)
            wanted = keys(block, *chance.sample(range(6), chance.randint(1, 6)))
            left = chance.choice([0, 1, 99, 99])
            with contextlib.closing(opened.source.acquire(wanted)) as leases:
                for lease in leases:
                    assert lease.key in wanted
                    data = opened.data(lease)
                    if not lease.validate():
                        continue
                    wanted.remove(lease.key)
                    assert data == RECORDS[lease.key], f"wrong bytes for {lease.key}"
                    if not left:
                        break
                    left -= 1
                else:
                    assert not wanted
            if chance.random() < 0.3:
                block = chance.randrange(3)
                opened.source.prefetch(block, keys(block, *chance.sample(range(6), 2)))

    with open_source(kind, folder, {"records": slots}) as opened:
        run_all([lambda seed=seed: caller(opened, seed) for seed in range(8)])
        opened.check()
        assert sorted(opened.take(0, 0, 1, 2)) == keys(0, 0, 1, 2)


# -- records without a lease -------------------------------------------------------------------------------------------


def look(found: Residents, expert: int) -> tuple[bytes, int] | None:
    """Find a record as compiled code does; return its bytes and its slot's generation."""
    slot = ctypes.c_int64.from_address(found.table + 8 * expert).value
    if slot < 0:
        return None
    generation = ctypes.c_int64.from_address(found.generations + 8 * slot).value
    return ctypes.string_at(found.records + slot * found.slot_bytes, PLAN.layout(0).record_bytes), generation


def residents_of(opened: Opened, block: int) -> Residents:
    found = opened.source.residents(block)
    if found is None:
        assert isinstance(opened.source, DeviceTier)
        pytest.skip("a device can't look records up")
    return found


def test_resident_records_are_found_without_a_lease(roomy: Opened) -> None:
    for block in range(3):
        found = residents_of(roomy, block)
        assert found.experts == 6
        assert [look(found, expert) for expert in range(6)] == [None] * 6
        roomy.take(block, 1, 4)
        for expert in range(6):
            record = look(found, expert)
            assert (record is not None) == (expert in (1, 4))
            assert record is None or record[0] == RECORDS[ExpertKey(block, expert)]


def test_a_slot_that_was_refilled_has_another_generation(smallest: Opened) -> None:
    found = residents_of(smallest, 0)
    smallest.take(0, 0, 1)
    before = [look(found, expert) for expert in (0, 1)]
    smallest.take(0, 2, 3)
    after = [look(found, expert) for expert in (2, 3)]
    assert {generation for _, generation in filter(None, before)}.isdisjoint(
        {generation for _, generation in filter(None, after)}
    )
    assert [look(found, expert) for expert in (0, 1)] == [None, None]


def test_a_noted_use_counts_as_a_hit_and_cancels_prefetches(roomy: Opened) -> None:
    residents_of(roomy, 0)
    roomy.take(0, 0, 1, 2)
    before = roomy.source.stats()
    roomy.source.uses.note_found(0, [2, 1])
    roomy.source.uses.note_found(0, [0])
    after = roomy.source.stats()
    assert after.hits - before.hits == 3
    assert after.misses == before.misses


def test_many_noted_uses_need_no_other_call(roomy: Opened) -> None:
    residents_of(roomy, 0)
    roomy.take(0, 0)
    before = roomy.source.stats().hits
    for _ in range(2000):
        roomy.source.uses.note_found(0, [0])
    assert roomy.source.stats().hits - before == 2000


@pytest.mark.parametrize("use", ["note_found", "touch"])
@pytest.mark.parametrize("kind", ["host", "views", "remote"])
def test_noted_uses_decide_what_is_evicted(kind: str, use: str, folder: Path) -> None:
    """Three records have slots. When a fourth comes, the one that was used least is evicted."""
    with open_source(kind, folder, {"records": 9}) as opened:
        opened.take(0, 0)
        opened.take(0, 1)
        opened.take(0, 2)
        for _ in range(20):
            getattr(opened.source.uses, use)(0, [0])
            getattr(opened.source.uses, use)(0, [2])
        opened.take(0, 3)
        found = residents_of(opened, 0)
        assert [expert for expert in range(6) if look(found, expert)] == [0, 2, 3]
        opened.check()


def test_a_closed_source_shows_no_records(roomy: Opened) -> None:
    residents_of(roomy, 0)
    roomy.source.close()
    with pytest.raises(ClosedError):
        roomy.source.residents(0)
