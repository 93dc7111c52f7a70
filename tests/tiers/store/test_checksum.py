from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetier.tiers.store.checksum import checksum_bytes, crc32c

MANY = 500  # attempts: a busy machine may give the other thread no processor during one checksum


@pytest.fixture
def no_forced_switches() -> Iterator[None]:
    """Let a thread keep the GIL until it releases it by itself."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    yield
    sys.setswitchinterval(interval)


def lets_others_run(checksum: Callable[[], object], attempts: int) -> bool:
    """Return whether another thread ran during one of the checksums."""
    ticks, ended = [0], threading.Event()

    def tick() -> None:
        while not ended.is_set():
            ticks[0] += 1
            time.sleep(0)  # releases the GIL

    other = threading.Thread(target=tick)
    other.start()
    try:
        for _ in range(attempts):
            before = ticks[0]
            checksum()
            if ticks[0] > before:
                return True
        return False
    finally:
        ended.set()
        other.join()


@pytest.mark.usefixtures("no_forced_switches")
def test_another_thread_runs_during_a_checksum() -> None:
    slot = memoryview(bytearray(64 << 20))
    array = np.frombuffer(slot, np.uint8)
    assert lets_others_run(lambda: crc32c(slot), MANY)
    assert not lets_others_run(lambda: google_crc32c.value(array), 5), "the test notices a held GIL"


def test_the_published_check_value() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert checksum_bytes(0xE3069283) == b"\x83\x92\x06\xe3"
    assert crc32c(b"") == 0


@given(st.integers(0, 5000), st.integers(0, 100), st.integers(0, 5000))
def test_it_is_that_of_another_implementation_at_any_address_and_in_any_pieces(
    length: int, start: int, cut: int
) -> None:
    data = os.urandom(start + length)
    view = memoryview(data)[start:]
    expected = google_crc32c.value(data[start:])
    assert crc32c(view) == expected
    assert crc32c(view[cut:], crc32c(view[:cut])) == expected
