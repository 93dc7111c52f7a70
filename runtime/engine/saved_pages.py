"""Pages on disk: those of a sequence that is to begin are read, and those of turns that have ended are written.

Readers read files ahead and check them. The engine's thread takes them in order, writes them into pages, and adds those
to the tree. The writer copies a page of the tree while the engine goes on, and then looks whether the tree still has
it: a page that was evicted meanwhile is not written. It writes at a limited rate, and never waits for anything that
waits for it. Neither raises an error: a page that can't be read is computed, and one that can't be written is lost.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from moetier.runtime.kernels.layer.paged_cache import PAGE_TOKENS
from moetier.tiers.disk_order import DiskOrder
from moetier.tiers.threads import start_thread

from .page_file import Payload, head_bytes
from .page_folder import PageFolder
from .prefix_tree import Node

READERS = 2
AHEAD = 4  # files that are read ahead
RATE = 16 << 20  # bytes a second that are written, unless the engine closes: each MiB takes about 1 ms of a processor
MOST_TURNS = 256  # turns that wait to be written; further ones replace the oldest
PAUSE = 60.0  # seconds after a failed write in which nothing is written
CLOSING = 5.0  # seconds in which pages are still written when the engine closes
SWEEP_SECONDS = 3600.0  # pages that are too old are looked for so often

_log = logging.getLogger(__name__)


class PageBytes(Protocol):
    """Memory of pages whose bytes can be saved and restored."""

    @property
    def layout(self) -> Sequence[Any]:
        """The parts of a page, in the order in which they are saved, for JSON. Each has ``token_bytes``."""

    def save_page(self, page: int, tokens: int, data: memoryview) -> None:
        """Write the first ``tokens`` tokens of a page into ``data``. Called on another thread than the engine's."""

    def restore_page(self, page: int, tokens: int, layout: Any, data: memoryview) -> bool:
        """Write into a page what ``save_page`` has written. Return False if that does not fit this memory."""


class SavedPage(NamedTuple):
    """A page of which there is a file."""

    name: bytes
    depth: int  # its number in the sequence
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that were read and written, pages that were read and used, and files that were damaged."""

    read_bytes: int = 0
    written_bytes: int = 0
    pages: int = 0
    damaged: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*map(sum, zip(astuple(self), astuple(other), strict=True)))


Page = tuple[Payload, mmap.mmap]


class Reading:
    """Files that are read ahead, in order."""

    def __init__(self, pages: Sequence[SavedPage], submit: Callable[[SavedPage], Future[Page | None]]) -> None:
        self._left = deque(pages)
        self._submit = submit
        self._begun = deque[Future[Page | None]]()

    def take(self, seconds: float) -> tuple[Page | None] | None:
        """Return the next page, or (None,) if it can't be used. Return None if it is not there after ``seconds``."""
        while self._left and len(self._begun) < AHEAD:
            self._begun.append(self._submit(self._left.popleft()))
        try:
            page = self._begun[0].result(seconds)
        except TimeoutError:
            return None
        self._begun.popleft()
        return (page,)

    def cancel(self, release: Callable[[mmap.mmap], object]) -> None:
        """End all reads. Memory of those that are under way is released at their end."""
        self._left.clear()
        while self._begun:
            if not (future := self._begun.popleft()).cancel():
                future.add_done_callback(partial(_release, release))


def _release(release: Callable[[mmap.mmap], object], future: Future[Page | None]) -> None:
    if (page := future.result()) is not None:
        page[0].data.release()
        release(page[1])


class SavedPages:
    """Reads and writes pages of one engine."""

    def __init__(
        self, folder: PageFolder, memory: PageBytes, order: DiskOrder, keys: Mapping[str, bytes] | None = None
    ) -> None:
        """Start the writer.

        Args:
            folder: has the files.
            memory: has the pages.
            order: says when to read and to write.
            keys: for each user of requests the digest of an API key. Others are known by their names.
        """
        self.options = folder.options
        self._folder = folder
        self._memory = memory
        self._order = order
        self._keys = keys or {}
        self._readers = ThreadPoolExecutor(READERS, "moetier-pages")
        self._changed = threading.Condition()  # guards: ``_turns``, ``_traffic``, ``_closes_at``, ``_is_busy``
        self._turns = deque[tuple[str, list[Node]]](maxlen=MOST_TURNS)
        self._traffic = Traffic()
        self._closes_at: float | None = None  # time at which the writer ends even if turns are left
        self._is_busy = False  # whether a turn is being written
        self._writer = threading.Thread(target=self._write_turns, name="moetier-page-writer", daemon=True)
        self._writer.start()

    # -- reading ------------------------------------------------------------------------------------------------------

    def find(self, user: str, ids: Sequence[int], known: int) -> list[SavedPage]:
        """Return pages with the next tokens of ``ids`` after the first ``known`` ones, of which there are files.

        The last one may have fewer than PAGE_TOKENS tokens; the first one begins at the beginning of a page.
        """
        pages, name = list[SavedPage](), self._root(user)
        for depth in range(len(ids) // PAGE_TOKENS + 1):
            tokens = tuple(ids[PAGE_TOKENS * depth : PAGE_TOKENS * (depth + 1)])
            following = self._folder.follow(name, tokens)
            is_full = len(tokens) == PAGE_TOKENS
            if PAGE_TOKENS * (depth + 1) > known and not (is_full and self._folder.has(following)):
                least = max(known - PAGE_TOKENS * depth, 0)
                for count in range(min(len(tokens), PAGE_TOKENS - 1), least, -1):
                    if self._folder.has(part := self._folder.follow(name, tokens[:count])):
                        pages.append(SavedPage(part, depth, tokens[:count]))
                        break
                break
            name = following
            if PAGE_TOKENS * (depth + 1) > known:
                pages.append(SavedPage(name, depth, tokens))
        return pages

    def read(self, pages: Sequence[SavedPage]) -> Reading:
        """Begin to read pages."""
        return Reading(pages, lambda page: self._readers.submit(self._read, page))

    def restore(self, saved: SavedPage, read: Page, page: int) -> bool:
        """Write a page that was read into page ``page`` of the memory. Return False if it does not fit."""
        payload, memory = read
        try:
            fits = self._memory.restore_page(page, len(saved.tokens), payload.layout, payload.data)
            self._count(read_bytes=len(payload.data), pages=int(fits))
        finally:
            payload.data.release()
            self._folder.release(memory)
        if not fits:
            self._folder.remove(saved.name)
        return fits

    def cancel(self, reading: Reading) -> None:
        """End a reading."""
        reading.cancel(self._folder.release)

    def _read(self, page: SavedPage) -> Page | None:
        try:
            with self._order.reading_page():
                return self._folder.read(page.name, page.depth)
        except Exception as error:
            _log.warning("Keys and values are computed again: %s: %s", type(error).__name__, error)
            return None

    # -- writing ------------------------------------------------------------------------------------------------------

    def save(self, user: str, nodes: list[Node]) -> None:
        """Let the pages of a turn that has ended be written: ``nodes`` of the tree, from the first page on."""
        with self._changed:
            self._turns.append((user, nodes))
            self._changed.notify()

    def _write_turns(self) -> None:
        self._try(self._folder.sweep)
        while True:
            with self._changed:
                self._is_busy = False
                if self._is_late():
                    self._turns.clear()
                is_there = self._changed.wait_for(lambda: bool(self._turns or self._closes_at), SWEEP_SECONDS)
                turn = self._turns.popleft() if self._turns else None
                self._is_busy = turn is not None
                if turn is None and self._closes_at:
                    return
            if not is_there:
                self._try(self._folder.sweep)
            elif turn is not None and not self._try(partial(self._write_turn, *turn)):
                with self._changed:
                    self._changed.wait_for(lambda: self._closes_at, PAUSE)
                    self._turns.clear()

    def _try(self, work: Callable[[], object]) -> bool:
        """Call ``work``. Return False, and log why, if it fails."""
        try:
            work()
        except Exception as error:  # keys and values are then computed again
            reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            _log.warning("Keys and values are not kept in %s for a minute: %s.", self._folder.options.folder, reason)
            return False
        return True

    def _write_turn(self, user: str, nodes: Sequence[Node]) -> None:
        names, name = list[bytes](), self._root(user)
        for node in nodes:
            names.append(name := self._folder.follow(name, node.tokens))
        for depth, (node, name) in enumerate(zip(nodes, names, strict=True)):
            if not self._folder.has(name) and (self._is_late() or not self._write_page(node, name, depth)):
                break
        for depth, name in enumerate(names):
            self._folder.touch(name, depth)

    def _write_page(self, node: Node, name: bytes, depth: int) -> bool:
        """Write a page. Return False if it can't be: it was evicted, or another process has removed the file."""
        layout, tokens = self._memory.layout, len(node.tokens)
        begin, size = head_bytes(layout), tokens * sum(part.token_bytes for part in layout)
        memory = self._folder.memory(begin + size)
        data = memoryview(memory)[begin : begin + size]
        try:
            if (page := node.page) < 0:
                return False
            self._memory.save_page(page, tokens, data)
            if node.page != page:  # it was evicted, and may have been written meanwhile
                return False
            began = time.monotonic()
            written = self._folder.write(name, depth, Payload(layout, data), memory, self._wait_to_write)
            self._count(written_bytes=written)
            with self._changed:
                self._changed.wait_for(lambda: self._closes_at, max(began + written / RATE - time.monotonic(), 0))
            return bool(written)
        finally:
            data.release()
            self._folder.release(memory)

    def _is_late(self) -> bool:
        """Return whether the time is over in which pages are still written when the engine closes."""
        return self._closes_at is not None and time.monotonic() >= self._closes_at

    def _wait_to_write(self) -> None:
        self._order.wait_to_write(lambda: self._closes_at is not None)

    # -- both ---------------------------------------------------------------------------------------------------------

    def _root(self, user: str) -> bytes:
        return self._folder.root(self._keys.get(user, user.encode()))

    def _count(self, read_bytes: int = 0, written_bytes: int = 0, pages: int = 0) -> None:
        with self._changed:
            so_far = self._traffic
            self._traffic = Traffic(
                so_far.read_bytes + read_bytes, so_far.written_bytes + written_bytes, so_far.pages + pages
            )

    def traffic(self) -> Traffic:
        """Return what was read and written so far."""
        with self._changed:
            traffic = self._traffic
        return Traffic(traffic.read_bytes, traffic.written_bytes, traffic.pages, self._folder.damaged)

    @property
    def is_writing(self) -> bool:
        """Whether turns are being written, or wait to be."""
        with self._changed:
            return bool(self._turns) or self._is_busy

    def close(self) -> None:
        """Write what is left, for some seconds, and end all threads, unless the disk hangs."""
        with self._changed:
            self._closes_at = time.monotonic() + CLOSING
            self._changed.notify_all()
        self._writer.join(2 * CLOSING)
        end_readers = partial(self._readers.shutdown, cancel_futures=True)
        start_thread("moetier-page-closer", end_readers).join(CLOSING)
