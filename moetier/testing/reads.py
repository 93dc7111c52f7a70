"""Reads of records for tests of stores: read one, pause one, do something in a fork meanwhile, wait for threads."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.base import Store

PATIENCE = 60.0  # seconds until a read that hangs fails
GRACE = 10.0  # seconds for what is ending already


def slot_of(manifest: Manifest, key: ExpertKey) -> memoryview:
    """Return a slot for a record, which begins on a page."""
    return memoryview(mmap.mmap(-1, manifest.layout(key.block).slot_bytes))


def read_record(store: Store, key: ExpertKey) -> bytes:
    """Read a record. Return it without its checksum."""
    slot = slot_of(store.manifest, key)
    store.read_into(key, slot)
    return bytes(slot[:-CHECKSUM_BYTES])


class PausedRead:
    """A read of a record in a thread of its own, which waits before it writes the first byte."""

    def __init__(self, store: Store, key: ExpertKey) -> None:
        read_record(store, key)  # the next reads run the same lines of Python
        self._slot = slot_of(store.manifest, key)
        self._store, self._key = store, key
        self._lines, self._at = 0, 0  # lines of Python that the read has run; and at which it waits, 0 if at none
        self._paused, self._goes_on = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._run()  # counts the lines up to the first byte
        self._at, self._lines = self._lines, 0
        self._slot[:] = bytes(len(self._slot))
        self._thread = threading.Thread(target=self._run)

    def begin(self) -> bool:
        """Begin the read. Return whether it waits; else it has ended."""
        self._thread.start()
        return settles(lambda: self._paused.is_set() or not self._thread.is_alive()) and self._paused.is_set()

    def finish(self) -> bytes | BaseException:
        """Let the read go on. Return the record or the error."""
        self._goes_on.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the read hangs"
        return self._error or bytes(self._slot[:-CHECKSUM_BYTES])

    def _run(self) -> None:
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            self._store.read_into(self._key, self._slot)
        except Exception as error:
            self._error = error
        finally:
            sys.settrace(before)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        if event == "line" and self._at:
            self._lines += 1
            if self._lines == self._at:
                self._paused.set()
                self._goes_on.wait(PATIENCE)
        elif event == "line" and not any(self._slot):
            self._lines += 1
        return self._trace


@contextlib.contextmanager
def paused_read(store: Store, key: ExpertKey) -> Iterator[PausedRead]:
    """Pause a read of ``store`` just before it writes to its buffer. Skips a store whose reads can't be paused."""
    read = PausedRead(store, key)
    paused = read.begin()
    try:
        if not paused:
            pytest.skip("its reads can't be paused, as no two run the same lines of Python")
        yield read
    finally:
        read.finish()


def settles(condition: Callable[[], bool]) -> bool:
    """Wait until ``condition`` holds. Return False if it does not for long."""
    deadline = time.monotonic() + GRACE
    while not condition():
        if time.monotonic() > deadline:
            return False
        gc.collect()
        time.sleep(0.01)
    return True


def until_it_waits(thread: threading.Thread) -> bool:
    """Wait until ``thread`` has ended or sleeps. Return whether it has ended."""
    asleep = 0
    while asleep < 10 and thread.is_alive():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ends just now
            state = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()[0]
            asleep = asleep + 1 if state == "S" else 0
        time.sleep(0.01)
    return not thread.is_alive()


def in_fork(work: Callable[[], object]) -> str:
    """Call ``work`` in a forked child. Return its result or its error, as text. A hang fails."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks of a process with threads
        child = os.fork()
    if not child:
        try:
            text = f"returned {work()}"
        except BaseException as error:
            text = f"{type(error).__name__}: {' '.join(str(error).splitlines())}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    try:
        assert select.select([reading], [], [], PATIENCE)[0], "the child hangs"
        return os.read(reading, 4096).decode()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
