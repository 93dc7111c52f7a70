"""Doubles of the disk, and only of the disk: records from memory, at once or when the test says so."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import google_crc32c

from moetier.tiers.errors import StoreReadError
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.base import Store

PATIENCE = 120.0  # seconds until a test that hangs fails


class RamReader(Store):
    """Records from a dict. ``broken`` ones can't be read. Counts its reads."""

    def __init__(self, manifest: Manifest, records: dict[ExpertKey, bytes]) -> None:
        self.manifest = manifest
        self.records = records
        self.broken: set[ExpertKey] = set()
        self.reads: Counter[ExpertKey] = Counter()
        self._lock = threading.Lock()

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
        with self._lock:
            self.reads[key] += 1
        buffer[:] = b"\xff" * len(buffer)  # a slot that is being filled holds nothing of use
        buffer[:] = self._whole(key)

    def close(self) -> None:
        pass

    def _whole(self, key: ExpertKey) -> bytes:
        if key in self.broken:
            raise StoreReadError(f"{key} can't be read.", "Repair it.")
        record = self.records[key]
        return record + google_crc32c.value(record).to_bytes(CHECKSUM_BYTES, "little")


class GatedReader(RamReader):
    """Reads of a key begin at once and end when the test lets them; those that may pause do so once before."""

    def __init__(self, manifest: Manifest, records: dict[ExpertKey, bytes]) -> None:
        super().__init__(manifest, records)
        self.begun: list[ExpertKey] = []  # in order; those that have not ended
        self._changed = threading.Condition()
        self._open = False
        self._passes: Counter[ExpertKey] = Counter()

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
        with self._gate(key):
            if pause is not None:
                pause()
            super().read_into(key, buffer)

    @contextlib.contextmanager
    def _gate(self, key: ExpertKey) -> Iterator[None]:
        with self._changed:
            self.begun.append(key)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._open or self._passes[key], PATIENCE), f"{key} was not released"
            if not self._open:
                self._passes[key] -= 1
        try:
            yield
        finally:
            with self._changed:
                self.begun.remove(key)
                self._changed.notify_all()

    def release(self, key: ExpertKey) -> None:
        """One read of ``key`` may end, now or when it comes."""
        with self._changed:
            self._passes[key] += 1
            self._changed.notify_all()

    def open(self) -> None:
        """All reads may end."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def shut(self) -> None:
        with self._changed:
            self._open = False

    def wait_begun(self, *keys: ExpertKey) -> None:
        """Until all of ``keys`` are being read."""
        with self._changed:
            assert self._changed.wait_for(lambda: set(keys) <= set(self.begun), PATIENCE), f"{keys} of {self.begun}"
