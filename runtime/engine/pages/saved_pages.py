"""Pages on disk of one engine: a reader, a writer, and the folder that they share."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import astuple, dataclass

from moetier.tiers.closeable import Closeable
from moetier.tiers.disk_order import DiskOrder

from .page_file import PageBytes
from .page_folder import PageFolder
from .page_reader import PageReader
from .page_writer import PageWriter

CLOSING = 5.0  # seconds in which pages are still written when the engine closes


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes read and written, pages read and used, and damaged files."""

    read_bytes: int = 0
    written_bytes: int = 0
    pages: int = 0
    damaged: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*map(sum, zip(astuple(self), astuple(other), strict=True)))


class SavedPages(Closeable):
    """Reads and writes pages of one engine."""

    def __init__(
        self,
        folder: PageFolder,
        memory: PageBytes,
        order: DiskOrder,
        keys: Mapping[str, bytes] | None = None,
        *,
        has_states: bool = False,
    ) -> None:
        """Start the threads of reader and writer.

        Args:
            folder: has the files.
            memory: has the pages.
            order: says when to read and to write.
            keys: for each user of requests the digest of an API key. Others are known by their names.
            has_states: whether a sequence continues behind a snapshot of its state only.
        """
        self.options = folder.options
        self._folder = folder
        self._keys = keys or {}
        self.reader = PageReader(folder, memory, order, self._root_of, has_states=has_states)
        with ExitStack() as undo:
            undo.callback(self.reader.close, CLOSING)
            self.writer = PageWriter(folder, memory, order, self._root_of)
            undo.pop_all()

    def _root_of(self, user: str) -> bytes:
        return self._folder.root(self._keys.get(user, user.encode()))

    def traffic(self) -> Traffic:
        """Return what was read and written so far."""
        return Traffic(self.reader.read_bytes, self.writer.written_bytes, self.reader.pages, self._folder.damaged)

    def close(self) -> None:
        """Write what is left, for some seconds, and end all threads, unless the disk hangs."""
        if all([self.writer.close(CLOSING), self.reader.close(CLOSING)]):
            self._folder.close()
