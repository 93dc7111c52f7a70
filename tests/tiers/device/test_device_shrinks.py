"""A device that has no memory left: its tier goes on with less, and gives the same records."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from consumers import PLAN, RECORDS, SMALLEST, Consumer, device_of
from integrity import check_integrity
from readers import PATIENCE, RamReader
from stores import keys
from threads import Task, run_all, sleeps, wait_until

from moetier.tiers.device.tier import DeviceTier
from moetier.tiers.errors import BudgetError, ClosedError
from moetier.tiers.host.tier import HostTier

SIZE = PLAN.layouts["records"].slot_bytes
ALL = {"records": 12}


@pytest.fixture
def host() -> Iterator[HostTier]:
    with HostTier(RamReader(PLAN, RECORDS), slots=ALL) as tier:
        yield tier


def has_arrived(tier: DeviceTier) -> bool:
    """Return whether each load that has begun is complete: the counts agree then."""
    stats = tier.stats()
    return stats.ready == stats.misses + stats.prefetched - stats.joined - stats.evictions


@pytest.mark.parametrize("promotes", [False, True])
def test_it_gives_back_a_quarter_and_goes_on(host: HostTier, promotes: bool) -> None:
    device = device_of(capacity=12 * SIZE)
    with closing(DeviceTier(host, PLAN, slots=ALL, device=device, promotes=promotes)) as tier:
        consumer = Consumer(tier, device)
        sizes = []
        while freed := tier.shrink():
            for block in (0, 1, 2, 0):
                consumer.run(block, [0, 1, 2, 3])
            tier.prefetch(0, keys(0, 1, 2))
            wait_until(lambda: has_arrived(tier))
            stats = tier.stats()
            sizes.append(stats.slots)
            assert device.left == 12 * SIZE - stats.memory_bytes
            assert freed > 0
            check_integrity(tier)
        assert sizes == [9, 6, 4, 3, 2]
        assert tier.stats().slots == SMALLEST["records"]
        assert consumer.wrong() == 0
        assert len(consumer.seen) == 5 * 4 * 4
        check_integrity(tier)


def test_it_waits_for_who_computes_and_the_next_waits_for_it(host: HostTier) -> None:
    device = device_of()
    with closing(DeviceTier(host, PLAN, slots=ALL, device=device)) as tier:
        computing, go_on = threading.Event(), threading.Event()

        def compute() -> int:
            consumer = Consumer(tier, device)
            for number, lease in enumerate(tier.acquire(keys(0, 0, 1))):
                consumer.look(lease) if number else computing.set()
                assert go_on.wait(PATIENCE)
            return tier.stats().slots

        first = Task(compute, "computes")
        assert computing.wait(PATIENCE)
        shrinking = Task(tier.shrink, "shrinks")
        wait_until(lambda: sleeps(shrinking.thread))
        after = Task(lambda: [tier.stats().slots for _ in tier.acquire(keys(1, 2))], "comes later")
        assert tier.stats().slots == 12
        go_on.set()
        assert first.result() == 12
        assert shrinking.result() == 3 * SIZE
        assert after.result() == [9]
        check_integrity(tier)


@pytest.mark.parametrize("seed", range(4))
def test_callers_and_a_promoter_beside_it(host: HostTier, seed: int) -> None:
    """Whatever is under way: every computation sees its record, and all slots are as they should be."""
    device = device_of(seed)
    with closing(DeviceTier(host, PLAN, slots=ALL, device=device, promotes=True)) as tier:

        def caller(number: int) -> int:
            chance, consumer = random.Random(seed * 8 + number), Consumer(tier, device)
            for _ in range(30):
                block = chance.randrange(3)
                tier.prefetch((block + 1) % 3, keys((block + 1) % 3, *chance.sample(range(4), 2)))
                with device.stream():
                    consumer.run(block, chance.sample(range(4), chance.randint(1, 4)))
            return consumer.wrong()

        def shrink() -> int:
            while tier.shrink():
                pass
            return 0

        assert sum(run_all([*[lambda n=n: caller(n) for n in range(3)], shrink])) == 0
        check_integrity(tier)
        assert tier.stats().slots == SMALLEST["records"]


def test_a_promotion_without_memory_shrinks_it(host: HostTier, caplog: pytest.LogCaptureFixture) -> None:
    device = device_of()
    with closing(DeviceTier(host, PLAN, slots=ALL, device=device, promotes=True)) as tier:
        list(host.acquire(keys(0, 0, 1, 2, 3)))
        device.copy_error = torch.OutOfMemoryError("CUDA out of memory.")
        tier.prefetch(0, keys(0, 1, 2))
        wait_until(lambda: tier.stats().slots == 9)
        wait_until(lambda: tier.stats().ready == 1)  # the other wish comes true
        check_integrity(tier)
        consumer = Consumer(tier, device)
        consumer.run(0, [1, 2])
        assert consumer.wrong() == 0
        assert "the device tier now has 9 slots instead of 12" in caplog.text


def test_one_that_is_closed_does_not_wait(host: HostTier) -> None:
    device = device_of()
    tier = DeviceTier(host, PLAN, slots=ALL, device=device)
    leases = tier.acquire(keys(0, 0, 1))
    next(leases)
    shrinking = Task(tier.shrink, "shrinks")
    wait_until(lambda: sleeps(shrinking.thread))
    tier.close()
    with pytest.raises(ClosedError):
        shrinking.result()
    leases.close()
    with pytest.raises(ClosedError):
        tier.shrink()


def test_without_room_for_one_token_it_is_closed(host: HostTier, monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_of()
    with closing(DeviceTier(host, PLAN, slots=ALL, device=device, promotes=True)) as tier:
        Consumer(tier, device).run(0, [1, 2])

        def refuse(nbytes: int) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(device, "allocate", refuse)  # others have taken all of it
        with pytest.raises(BudgetError, match="no room"):
            tier.shrink()
        with pytest.raises(ClosedError):
            next(tier.acquire(keys(0, 1)))
        device.finish()


def test_who_shrinks_waits_for_another_who_does(host: HostTier) -> None:
    device = device_of()
    with closing(DeviceTier(host, PLAN, slots=ALL, device=device)) as tier:
        leases = tier.acquire(keys(0, 0, 1))
        next(leases)
        shrinking = [Task(tier.shrink, f"shrinks {number}") for number in range(2)]
        wait_until(lambda: all(sleeps(task.thread) for task in shrinking))
        assert tier.stats().slots == 12
        leases.close()
        assert [task.result() for task in shrinking] == [3 * SIZE] * 2
        assert tier.stats().slots == 6
        check_integrity(tier)


@pytest.mark.parametrize("has_room", [True, False])
def test_one_that_is_interrupted_goes_on_if_there_is_room(
    host: HostTier, has_room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = device_of()
    with closing(DeviceTier(host, PLAN, slots=ALL, device=device)) as tier:
        consumer = Consumer(tier, device)
        consumer.run(0, [1, 2])

        def interrupt(nbytes: int) -> torch.Tensor:
            if has_room:
                monkeypatch.undo()
            else:
                monkeypatch.setattr(device, "allocate", refuse)
            raise KeyboardInterrupt

        def refuse(nbytes: int) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(device, "allocate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tier.shrink()
        if not has_room:
            with pytest.raises(ClosedError):
                next(tier.acquire(keys(0, 1)))
            device.finish()
            return
        consumer.run(0, [1, 2])
        assert consumer.wrong() == 0
        assert tier.stats().slots == 12
        check_integrity(tier)
