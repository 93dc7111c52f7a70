"""Store: the interface of everything that a host tier reads records from.

There are three classes to derive from:

- ``Store`` reads records, wherever they are.
- ``DirectoryStore`` is found in the directory of a model. ``open_store`` (``runtime.stores.registry``) opens it, and
  commands such as ``moetier verify`` check it.
- ``WrapperStore`` stands before another store, to which it passes everything that it does not do itself.

``moetier.testing.StoreTests`` checks that a store keeps this contract.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import ChecksumError, StoreError
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey, RecordLayout
from moetier.tiers.manifest import Manifest
from moetier.tiers.stats import Share

from .checksum import checksum_bytes, crc32c
from .pieces import Pause as Pause
from .scrubbable import Problem, Scrubbable

READERS = 4  # number of threads of a store that read pieces of large records, by default: enough to keep a disk busy


class Store(Closeable):
    """The records of a model's experts.

    A store sets ``manifest`` and has the methods ``read_into`` and ``close``. The other methods have defaults. Any
    number of threads may call all methods at the same time, ``close`` too.

    A fork must not use its parent's store: ``read_into`` raises ClosedError there, without waiting for a lock that
    another thread of the parent may have held. ``close`` works there: it closes the fork's copies of file descriptors,
    and leaves everything alone that it shares with the parent (see ``ForkGuard``). Some libraries forbid a fork even to
    close what the parent has opened, as SQLite does: a store then opens it anew for each read, or leaves it open there.

    All methods translate errors of the system and of libraries into a StoreError, as callers catch no others:
    ``read_errors`` (``tiers.store.atomic``) does so for an OSError other than FileNotFoundError.
    """

    manifest: Manifest
    """The blocks of the model, and the layout of their records. It does not change while the store is open.

    Its ``record_checksums`` are the CRC-32C of each record (``Manifest.checksums``). Only manifests of older stores and
    of checkpoints lack them. A store that has no other way to notice records of another model may refuse such a
    manifest with StoreFormatError.
    """

    @abstractmethod
    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Pause | None = None) -> None:
        """Read the record of ``key`` and its checksum into ``buffer``.

        An error is not remembered: the next read of the same record tries afresh. When the method returns or raises,
        no thread writes to ``buffer`` any more. After an error, the content of ``buffer`` is undefined.

        Args:
            key: the expert.
            buffer: a writable slot of ``layout(key.block).slot_bytes``, which begins on a page. The record comes first:
                its sections, and zeros up to ``record_bytes``. The last 4 bytes are the record's CRC-32C (LE u32).
            pause: if given, and if the store supports it, the record is read in pieces and ``pause`` is called between
                two pieces. ``pause`` blocks until the read may go on. It returns whether it is to be called again
                between the remaining pieces. An exception from ``pause`` ends the read.

        Raises:
            MissingExpertError: the model does not have the expert (``Manifest.check_keys``). Nothing was written.
            ChecksumError: the bytes are not those that were written.
            StoreError: the record can't be read. The model has the expert, but the store lacks its record or has one of
                another size: StoreFormatError. The system reported an error: StoreReadError.
            UnavailableError, ExhaustedError: the record can't be had from a daemon. Only stores that ask a daemon
                raise these.
            ClosedError: the store was closed, or this process is a fork of the one that opened it.
        """

    @abstractmethod
    def close(self) -> None:
        """Wait for the reads in progress, and release threads, descriptors and memory. A second call does nothing.

        A store whose reads may wait for another machine ends them with an error instead of waiting.
        """

    def layout(self, block: int) -> RecordLayout:
        """Return the layout of a block's records."""
        return self.manifest.layout(block)

    @property
    def where(self) -> str:
        """Name of the place that records are requested from, for users; "" if all are in files of this machine."""
        return ""

    @property
    def is_local(self) -> bool:
        """Whether no read needs a request. A host tier with room for all records then reads them all."""
        return not self.where

    def shares(self) -> list[Share]:
        """Return how many records came from each place, since the store was opened; [] if there is only one place."""
        return []

    @property
    def faults(self) -> Mapping[int, StoreError]:
        """The errors that were found when the store was opened, by block. A read of such a block raises the error."""
        return {}

    def on_fault(self, watcher: Callable[[ChecksumError], None]) -> None:
        """Register ``watcher``. It is called, in any thread, if records that were read before turn out to be wrong.

        The host tier above then drops what it holds, and all further reads raise the error. The default is for a
        store whose reads are all checked: it does nothing.
        """

    def on_failover(self, watcher: Callable[[], None]) -> None:
        """Register ``watcher``. It is called, in any thread, each time a read fails but succeeds from another copy.

        The default is for a store that has one copy of each record: it does nothing.
        """


class DirectoryStore(Store, Scrubbable):
    """A store in the directory of a model, where ``open_store`` finds it.

    Beside what ``Store`` asks for, such a store sets ``directory``, and has the class methods ``recognises`` and
    ``open``. Its class has a line in ``STORES`` (``runtime.stores.registry``). ``Scrubbable`` has the defaults of what
    only ``moetier verify`` and the check of older stores ask for.
    """

    directory: Path
    """The directory with the other files of the model, such as config.json; or the only file of the model."""

    @classmethod
    def recognises(cls, location: Path) -> bool:
        """Return whether there is a store of this class at ``location``. Reads no more than a few small files.

        The default is for a class that is not in the registry, as its objects are made in another way.
        """
        return False

    @classmethod
    def open(cls, location: Path, *, damaged: bool = False) -> DirectoryStore:
        """Open the store at ``location``, which ``recognises`` has recognised. Other processes may have it open, too.

        ``damaged``: open this copy alone, without mirrors, even if parts of it are bad. ``faults`` then has the errors.
        A store of one file ignores it: it opens or fails as a whole, and reads find damage.
        Raises StoreError, or for a checkpoint CheckpointError.
        """
        raise NotImplementedError

    @classmethod
    def read_manifest(cls, location: Path) -> Manifest:
        """Return the manifest of the store at ``location``. The default opens the store. Raises as ``open``."""
        with cls.open(location, damaged=True) as store:
            return store.manifest

    def check_record(self, key: ExpertKey, buffer: memoryview, crc: int | None = None) -> None:
        """Compare a record with its checksum in the manifest, and write the checksum behind it. For ``read_into``.

        Args:
            key: the expert.
            buffer: the slot of ``read_into``, which has the record.
            crc: the CRC-32C of the record; None to compute it.

        Raises ChecksumError if they differ. If the manifest has no checksums, nothing is compared.
        """
        if crc is None:
            crc = crc32c(buffer[:-CHECKSUM_BYTES])
        if not self.manifest.has_record(key, crc):
            cause = f"{self.manifest.model}, {key}: checksum mismatch in {self._source(key)}."
            raise ChecksumError(cause, self.fix)
        buffer[-CHECKSUM_BYTES:] = checksum_bytes(crc)

    def _source(self, key: ExpertKey) -> str:
        """Return the name of the file that has a record, for an error. The default is ``path`` of its block."""
        return str(self.path(key.block))

    # what commands and the daemon ask

    def path(self, block: int) -> Path:
        """Return the file that has a block's records, or the first one of several. The default is ``directory``."""
        return self.directory

    @property
    def is_direct(self) -> bool:
        """Whether files are read with O_DIRECT, which bypasses the page cache."""
        return False

    @property
    def has_checksums(self) -> bool:
        """Whether each read is compared with a checksum that was made when the record was written."""
        return True

    @property
    def fix(self) -> str:
        """The fix for damaged files, as a sentence for users."""
        return "Restore the files named."


class WrapperStore(DirectoryStore):
    """A store before another one, ``store``, to which it passes everything. Derived classes replace what they do."""

    def __init__(self, store: DirectoryStore) -> None:
        """Wrap ``store``. ``close`` closes it."""
        self.store = store
        self.manifest = store.manifest
        self.directory = store.directory

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Pause | None = None) -> None:
        """Read a record from the store."""
        self.store.read_into(key, buffer, pause)

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    @property
    def where(self) -> str:
        """The place that records of ``store`` are requested from."""
        return self.store.where

    def shares(self) -> list[Share]:
        """Return the store's shares."""
        return self.store.shares()

    @property
    def faults(self) -> Mapping[int, StoreError]:
        """The faults of the store."""
        return self.store.faults

    def on_fault(self, watcher: Callable[[ChecksumError], None]) -> None:
        """Register ``watcher`` with the store."""
        self.store.on_fault(watcher)

    def on_failover(self, watcher: Callable[[], None]) -> None:
        """Register ``watcher`` with the store."""
        self.store.on_failover(watcher)

    def path(self, block: int) -> Path:
        """Return the store's file of a block."""
        return self.store.path(block)

    @property
    def is_direct(self) -> bool:
        """Whether the files of ``store`` are read with O_DIRECT."""
        return self.store.is_direct

    @property
    def has_checksums(self) -> bool:
        """Whether each read of ``store`` is compared with a checksum."""
        return self.store.has_checksums

    @property
    def fix(self) -> str:
        """The fix for damaged files of ``store``."""
        return self.store.fix

    def check_digest(self) -> None:
        """Check the store's digest."""
        self.store.check_digest()

    def compare_digest(self, checksums: Sequence[int]) -> None:
        """Compare the checksums with the store's digest."""
        self.store.compare_digest(checksums)

    @property
    def other_files(self) -> Mapping[Path, int]:
        """The files beside the store's records."""
        return self.store.other_files

    def other_file_faults(self) -> dict[str, StoreError]:
        """Return the faults of the files beside the store's records."""
        return self.store.other_file_faults()

    def scrub_other_files(self) -> Iterator[int | Problem]:
        """Check the files beside the store's records."""
        return self.store.scrub_other_files()
