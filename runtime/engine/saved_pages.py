"""Pages on disk: those of a sequence that is to begin are read, and those of turns that have ended are written.

Readers read files ahead and check them. The engine's thread takes them in order, writes them into pages, and adds those
to the tree. The writer copies a page of the tree while the engine goes on, and then looks whether the tree still has
it: a page that was evicted meanwhile is not written. It writes at a limited rate, and never waits for anything that
waits for it. Neither raises an error: a page that can't be read is computed, and one that can't be written is lost.

If a model has states besides keys and values, a file has a snapshot of one: the pages in which it lies. Those behind
full pages are written, and the last one of a turn. Pages are read only up to the last snapshot behind them.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from moetier.runtime.kernels.layer.pages import PAGE_TOKENS
from moetier.tiers.disk_order import DiskOrder
from moetier.tiers.threads import start_thread

from .page_file import Payload, head_bytes
from .page_folder import STATE, PageFolder
from .prefix_tree import Node, StateSnapshot

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
    """A page of which there is a file, or a state behind the first tokens of a page."""

    name: bytes
    depth: int  # number of the page in the sequence
    tokens: tuple[int, ...]
    is_state: bool = False

    @property
    def end(self) -> int:
        """Number of tokens up to the last one."""
        return PAGE_TOKENS * self.depth + len(self.tokens)


class _Turn(NamedTuple):
    """Pages of a turn that has ended, which are to be written."""

    user: str
    nodes: list[Node]  # from the first page on
    states: list[tuple[int, int, StateSnapshot]]  # for each the number of its page, and how many tokens are before it


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

    @property
    def next(self) -> Future[Page | None]:
        """The next page, once it is read; None if it can't be used. There must be one."""
        while self._left and len(self._begun) < AHEAD:
            self._begun.append(self._submit(self._left.popleft()))
        return self._begun[0]

    def take(self, seconds: float) -> Page | None:
        """Return the next page; None if it can't be used. Raises TimeoutError if it is not there after ``seconds``."""
        page = self.next.result(seconds)
        self._begun.popleft()
        return page

    def cancel(self, release: Callable[[mmap.mmap], object]) -> None:
        """End all reads. Memory of those that are under way is released at their end."""
        self._left.clear()
        while self._begun:
            if not (future := self._begun.popleft()).cancel():
                future.add_done_callback(partial(_release, release))


def _ends(end: int) -> Iterator[int]:
    """Yield where snapshots of a sequence may be whose first ``end`` tokens are kept, the last one first.

    That of a turn is less than a page before its end, others are behind full pages.
    """
    last = PAGE_TOKENS * max((end - 1) // PAGE_TOKENS - 1, 0)
    yield from range(end, last, -1)
    yield from range(last, 0, -PAGE_TOKENS)


def _pages_of(part: Node | StateSnapshot) -> list[int]:
    """Return the numbers of a node's or a snapshot's pages; none if it is no longer in the tree."""
    if isinstance(part, StateSnapshot):
        return part.pages
    return [part.page] if part.page >= 0 else []


def _release(release: Callable[[mmap.mmap], object], future: Future[Page | None]) -> None:
    if (page := future.result()) is not None:
        page[0].data.release()
        release(page[1])


class SavedPages:
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
        """Start the writer.

        Args:
            folder: has the files.
            memory: has the pages.
            order: says when to read and to write.
            keys: for each user of requests the digest of an API key. Others are known by their names.
            has_states: whether a sequence continues behind a snapshot of its state only.
        """
        self.options = folder.options
        self._folder = folder
        self._memory = memory
        self._order = order
        self._keys = keys or {}
        self._has_states = has_states
        self._writes_from = 0.0  # time from which the next piece may be written
        self._readers = ThreadPoolExecutor(READERS, "moetier-pages")
        self._changed = threading.Condition()  # guards: ``_turns``, ``_traffic``, ``_closes_at``, ``_is_busy``
        self._turns = deque[_Turn](maxlen=MOST_TURNS)
        self._traffic = Traffic()
        self._closes_at: float | None = None  # time at which the writer ends even if turns are left
        self._is_busy = False  # whether a turn is being written
        self._writer = threading.Thread(target=self._write_turns, name="moetier-page-writer", daemon=True)
        self._writer.start()

    # -- reading ------------------------------------------------------------------------------------------------------

    def find(self, user: str, ids: Sequence[int], known: int, state: int = 0) -> Future[list[SavedPage]]:
        """Look for files of pages with the next tokens of ``ids`` after the first ``known`` ones.

        The last page may have fewer than PAGE_TOKENS tokens; the first one begins at the beginning of a page. If the
        model has states, the last file is one that is behind more than ``state`` tokens. Never raises an error.
        """
        return self._readers.submit(self._find, user, [*ids], known, state)

    def _find(self, user: str, ids: Sequence[int], known: int, state: int) -> list[SavedPage]:
        try:
            names, pages = self._find_pages(user, ids, known)
            if not self._has_states:
                return pages
            for end in _ends(max(known, pages[-1].end if pages else 0)):
                if end <= state:
                    break
                depth = (end - 1) // PAGE_TOKENS
                tokens = tuple(ids[PAGE_TOKENS * depth : end])
                name = self._folder.follow(self._folder.follow(names[depth], tokens), STATE)
                if self._folder.has(name):
                    return [*(page for page in pages if page.depth <= depth), SavedPage(name, depth, tokens, True)]
        except Exception as error:
            _log.warning("Keys and values are computed again: %s: %s", type(error).__name__, error)
        return []

    def _find_pages(self, user: str, ids: Sequence[int], known: int) -> tuple[list[bytes], list[SavedPage]]:
        """Return pages as ``find`` says, and for each page up to the last one the name of the page before it."""
        pages, name, names = list[SavedPage](), self._root(user), list[bytes]()
        for depth in range(len(ids) // PAGE_TOKENS + 1):
            tokens = tuple(ids[PAGE_TOKENS * depth : PAGE_TOKENS * (depth + 1)])
            following = self._folder.follow(name, tokens)
            is_full = len(tokens) == PAGE_TOKENS
            names.append(name)
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
        return names, pages

    def read(self, pages: Sequence[SavedPage]) -> Reading:
        """Begin to read pages."""
        return Reading(pages, lambda page: self._readers.submit(self._read, page))

    def pages_of_state(self, read: Page) -> int:
        """Return how many pages a state takes that was read."""
        return -(-len(read[0].data) // max(PAGE_TOKENS * sum(part.token_bytes for part in self._memory.layout), 1))

    def restore(self, saved: SavedPage, read: Page, pages: Sequence[int]) -> bool:
        """Write what was read into ``pages`` of the memory: one, or all of a state. Return False if it does not fit."""
        layout, data = read[0].layout, read[0].data
        tokens, size = PAGE_TOKENS if saved.is_state else len(saved.tokens), -(-len(data) // len(pages))
        try:
            parts = [data[size * at : size * (at + 1)] for at in range(len(pages))]
            fits = all(
                self._memory.restore_page(page, tokens, layout, part) for page, part in zip(pages, parts, strict=True)
            )
            self._count(read_bytes=len(data), pages=len(pages) if fits else 0)
        finally:
            self.release(read)
        if not fits:
            self._folder.remove(saved.name)
        return fits

    def release(self, read: Page) -> None:
        """Give back the memory of what was read."""
        read[0].data.release()
        self._folder.release(read[1])

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
        states = [
            (depth, count, state)
            for depth, node in enumerate(nodes)
            for count, state in sorted(node.snapshots.items(), key=lambda item: item[0])
        ]
        states = [*(full for full in states[:-1] if full[1] == PAGE_TOKENS), *states[-1:]]
        with self._changed:
            self._turns.append(_Turn(user, nodes, states))
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
            elif turn is not None and not self._try(partial(self._write_turn, turn)):
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

    def _write_turn(self, turn: _Turn) -> None:
        names = [self._root(turn.user)]  # of the pages before each page, and of the last one
        for node in turn.nodes:
            names.append(self._folder.follow(names[-1], node.tokens))
        files = [
            (depth, names[depth + 1], len(node.tokens), partial(_pages_of, node))
            for depth, node in enumerate(turn.nodes)
        ]
        for depth, count, state in turn.states:
            name = self._folder.follow(names[depth], turn.nodes[depth].tokens[:count])
            files.append((depth, self._folder.follow(name, STATE), PAGE_TOKENS, partial(_pages_of, state)))
        lost = len(turn.nodes)  # number of the first page that is not on the disk
        for depth, name, tokens, pages in sorted(files, key=lambda file: file[0]):  # a state behind its page
            is_there = depth < lost and (self._folder.has(name) or self._write(depth, name, tokens, pages))
            if not is_there and name == names[depth + 1]:
                lost = min(lost, depth)
        for depth, name, _, _ in files:
            self._folder.touch(name, depth)

    def _write(self, depth: int, name: bytes, tokens: int, pages_of: Callable[[], list[int]]) -> bool:
        """Write the first ``tokens`` tokens of pages into a file.

        Return False if that can't be: they were evicted, or don't fit, another process has removed the file, or it is
        late.
        """
        layout, pages = self._memory.layout, pages_of()
        if self._is_late() or not pages:
            return False
        step = tokens * sum(part.token_bytes for part in layout)
        begin, size = head_bytes(layout), step * len(pages)
        if not self._folder.fits(layout, size):
            return False
        memory = self._folder.memory(begin + size)
        data = memoryview(memory)[begin : begin + size]
        try:
            for at, page in enumerate(pages):
                self._memory.save_page(page, tokens, data[step * at : step * (at + 1)])
            if pages_of() != pages:  # they were evicted, and may have been written meanwhile
                return False
            written = self._folder.write(name, depth, Payload(layout, data), memory, self._wait_to_write)
            self._count(written_bytes=written)
            return bool(written)
        finally:
            data.release()
            self._folder.release(memory)

    def _is_late(self) -> bool:
        """Return whether the time is over in which pages are still written when the engine closes."""
        return self._closes_at is not None and time.monotonic() >= self._closes_at

    def _wait_to_write(self, size: int) -> None:
        """Wait until ``size`` bytes may be written: so long that no more than RATE are, and nothing is read."""
        with self._changed:
            self._changed.wait_for(lambda: self._closes_at, max(self._writes_from - time.monotonic(), 0))
        self._order.wait_to_write(lambda: self._closes_at is not None)
        self._writes_from = time.monotonic() + size / RATE

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
        closer = start_thread("moetier-page-closer", end_readers)
        closer.join(CLOSING)
        if not (self._writer.is_alive() or closer.is_alive()):
            self._folder.close()
