"""moetier.testing.StoreTests notices what is wrong with a store: each of these breaks one rule of the contract."""

from __future__ import annotations

import contextlib
import inspect
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import tar_store
from tar_store import TarStore, pack

from moetier.runtime.stores import registry
from moetier.testing import Records, StoreTests
from moetier.testing.stores import Written, make_records
from moetier.tiers.errors import ChecksumError, StoreFormatError, StoreReadError
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.base import Pause, Store
from moetier.tiers.store.checksum import checksum_bytes, crc32c

LEFT_OPEN: list[BinaryIO] = []


class DoesNotWait(TarStore):
    def close(self) -> None:
        self._file.close()


class ReadsUnderALock(TarStore):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._lock = threading.Lock()

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Pause | None = None) -> None:
        with self._lock:
            super().read_into(key, buffer, pause)

    def close(self) -> None:
        with self._lock:
            super().close()


class ClosesWhatItShares(TarStore):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._server, self._connection = socket.socketpair()

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Pause | None = None) -> None:
        super().read_into(key, buffer, pause)
        try:
            self._connection.send(b".")
            self._server.recv(1)
        except OSError as error:
            raise StoreReadError("The connection is closed.", "Open it again.") from error

    def close(self) -> None:
        super().close()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._server.close()


class PassesOnErrorsOfLibraries(TarStore):
    def __init__(self, directory: Path) -> None:
        try:
            super().__init__(directory)
        except StoreFormatError as error:
            raise error.__cause__ or error from None


class AcceptsAnyRecord(TarStore):
    def check_record(self, key: ExpertKey, buffer: memoryview, crc: int | None = None) -> None:
        crc = crc32c(buffer[:-CHECKSUM_BYTES])
        if not any(crc in self.manifest.checksums(block) for block in range(len(self.manifest.blocks))):
            raise ChecksumError(f"{key} is bad.", self.fix)
        buffer[-CHECKSUM_BYTES:] = checksum_bytes(crc)


class HasNoDirectory(TarStore):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        del self.directory


class WritesAfterAnError(TarStore):
    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Pause | None = None) -> None:
        try:
            super().read_into(key, buffer, pause)
        except ChecksumError:
            threading.Timer(0.1, buffer.__setitem__, (0, 0)).start()
            raise


class RecognisesAnything(TarStore):
    @classmethod
    def recognises(cls, location: Path) -> bool:
        return True


class TakesNoDamaged(TarStore):
    @classmethod
    def open(cls, location: Path) -> TarStore:  # type: ignore[override]
        return cls(location)


class LeavesFilesOpen(TarStore):
    def close(self) -> None:
        LEFT_OPEN.append(self._path.open("rb"))
        super().close()


class SuiteOfTar(StoreTests):
    """Not collected by pytest itself, as no name of it begins with Test."""

    def write(self, folder: Path, manifest: Manifest, records: Records) -> None:
        pack(folder, manifest, records)

    def damage(self, folder: Path, store: Store, key: ExpertKey) -> None:
        tar_store.flip_bit_of_record(folder, key)


@pytest.fixture
def cleaned_up() -> Iterator[None]:
    yield
    for file in LEFT_OPEN:
        file.close()
    LEFT_OPEN.clear()


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (DoesNotWait, "test_close_waits_for_a_read"),
        (ReadsUnderALock, "test_a_fork_during_a_read_does_not_wait_for_it"),
        (ClosesWhatItShares, "test_a_fork_is_refused_and_closes_its_own"),
        (PassesOnErrorsOfLibraries, "test_bad_files_are_errors_of_moetier"),
        (AcceptsAnyRecord, "test_records_in_wrong_places_are_errors"),
        (HasNoDirectory, "test_its_class_recognises_it_and_nothing_else"),
        (HasNoDirectory, "test_it_answers_what_commands_ask"),
        (WritesAfterAnError, "test_after_an_error_no_thread_writes"),
        (RecognisesAnything, "test_its_class_recognises_it_and_nothing_else"),
        (TakesNoDamaged, "test_its_class_recognises_it_and_nothing_else"),
        (LeavesFilesOpen, "test_close_releases_threads_and_descriptors"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_it_is_caught(
    broken: type[TarStore], test: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cleaned_up: None
) -> None:
    """The same test passes with the store that is not broken."""
    monkeypatch.setattr(registry, "STORES", ["tar_store:TarStore"])
    monkeypatch.setattr("moetier.testing.reads.GRACE", 0.5)
    monkeypatch.setattr("moetier.testing.reads.PATIENCE", 2.0)
    suite = SuiteOfTar()
    run = getattr(suite, test)
    arguments: dict[str, Any] = {}
    for name in inspect.signature(run).parameters:
        (folder := tmp_path / name).mkdir()
        arguments[name] = folder
        if name != "tmp_path":
            arguments[name] = Written(folder, *make_records(2, 4, 64, 32))
            suite.write(*arguments[name])
    monkeypatch.setattr(tar_store, "TarStore", broken)
    with pytest.raises((Exception, pytest.fail.Exception)) as caught:
        run(**arguments)
    assert not isinstance(caught.value, pytest.skip.Exception)
