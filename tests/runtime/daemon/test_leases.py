"""Leases for calls of other hosts: what a call gets together, when it is refused, and how its leases end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import cast

import grpc
import pytest
from readers import PATIENCE, GatedReader
from stores import keys, make_plan, make_records
from threads import wait_until

from moetier.runtime.daemon.leases import MAX_TIMEOUT, CallLeases, timeout_of
from moetier.tiers.errors import ClosedError, ExhaustedError, ProtocolError, StoreReadError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey

PLAN = make_plan(blocks=1, experts=4)


class Call:
    """A call's context, as far as leases use it. gRPC accepts no callback once the call has ended."""

    def __init__(self, remaining: float | None = None) -> None:
        self._remaining = remaining
        self._callbacks: list[Callable[[], None]] = []
        self._is_over = False

    @classmethod
    def context(cls, remaining: float | None = None) -> grpc.ServicerContext:
        return cast("grpc.ServicerContext", cls(remaining))

    def time_remaining(self) -> float | None:
        return self._remaining

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self._callbacks.append(callback)
        return not self._is_over

    def end(self) -> None:
        self._is_over = True
        for callback in self._callbacks:
            callback()


@pytest.fixture
def gate() -> GatedReader:
    return GatedReader(PLAN, make_records(PLAN))


@pytest.fixture
def host(gate: GatedReader) -> Iterator[HostTier]:
    with HostTier(gate, slots={"records": 3}) as host:
        yield host
        gate.open()


@pytest.fixture
def leases(host: HostTier) -> Iterator[CallLeases]:
    leases = CallLeases(host, timeout=PATIENCE)
    yield leases
    leases.close()


def soon() -> float:
    return time.monotonic() + PATIENCE


def test_records_that_are_available_come_together_and_end_with_the_next_list(
    leases: CallLeases, host: HostTier, gate: GatedReader
) -> None:
    batches = leases.batches(keys(0, 0, 1), Call.context(), soon())
    gate.release(ExpertKey(0, 0))
    assert [granted.key.expert for granted in next(batches)] == [0]
    assert host.stats().leased == 1
    gate.release(ExpertKey(0, 1))
    assert [granted.key.expert for granted in next(batches)] == [1]
    assert host.stats().leased == 1
    assert next(batches, None) is None
    assert host.stats().leased == 0
    (both,) = leases.batches(keys(0, 0, 1), Call.context(), soon())
    assert {granted.key.expert for granted in both} == {0, 1}


def test_a_list_that_is_left_releases_everything(leases: CallLeases, host: HostTier, gate: GatedReader) -> None:
    gate.open()
    batches = leases.batches(keys(0, 0, 1, 2), Call.context(), soon())
    next(batches)
    batches.close()
    wait_until(lambda: host.stats().leased == 0)


def test_a_call_that_does_not_wait_for_reads_is_told_when_its_time_is_over(leases: CallLeases) -> None:
    with pytest.raises(ExhaustedError, match="in time"):
        next(leases.batches(keys(0, 0), Call.context(), time.monotonic() + 0.01, waits_for_reads=False))


def test_a_read_that_fails_is_the_calls_error(leases: CallLeases, gate: GatedReader) -> None:
    gate.broken.add(ExpertKey(0, 2))
    gate.open()
    with pytest.raises(StoreReadError):
        next(leases.batches(keys(0, 2), Call.context(), soon()))


def test_the_end_of_a_call_or_of_the_daemon_ends_its_wait(leases: CallLeases, gate: GatedReader) -> None:
    call = Call()
    call.end()
    with pytest.raises(ClosedError):
        next(leases.batches(keys(0, 0), cast("grpc.ServicerContext", call), soon()))
    leases.close()
    leases.close()
    with pytest.raises(ClosedError):
        next(leases.batches(keys(0, 0), Call.context(), soon()))


def test_a_call_waits_for_half_of_its_time_and_must_have_an_end() -> None:
    assert timeout_of(Call.context(8.0), 30.0, "A fetch") == 4.0
    assert timeout_of(Call.context(800.0), 30.0, "A fetch") == 30.0
    for remaining in (None, MAX_TIMEOUT + 1):
        with pytest.raises(ProtocolError, match="A fetch needs a deadline"):
            timeout_of(Call.context(remaining), 30.0, "A fetch")
