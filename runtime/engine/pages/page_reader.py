"""Reads pages and states on disk, for a sequence that is to begin.

Threads read files ahead and check them. The engine's thread takes them in order, and writes them into pages. No error
is raised: a page that can't be read is computed.

If a model has states besides keys and values, a file has a snapshot of one: the pages in which it lies. Pages are read
only up to the last snapshot behind them.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, TypeVar

from moetier.runtime.kernels.layer.pages import PAGE_TOKENS
from moetier.runtime.model.context import SNAPSHOT_TOKENS
from moetier.tiers.disk_order import DiskOrder
from moetier.tiers.threads import start_thread

from .page_file import FileContents, PageBytes
from .page_folder import STATE, PageFolder

Result = TypeVar("Result")
READERS = 2
AHEAD = 4  # files that are read ahead

_log = logging.getLogger(__name__)


class SavedFile(NamedTuple):
    """A file that was found: of a page, or of the state behind the first tokens of a page."""

    name: bytes
    depth: int  # number of the page in the sequence
    tokens: tuple[int, ...]
    is_state: bool = False

    @property
    def end(self) -> int:
        """Number of tokens up to the last one."""
        return PAGE_TOKENS * self.depth + len(self.tokens)


class Reading:
    """Files that are read ahead, in order."""

    def __init__(self, files: Sequence[SavedFile], submit: Callable[[SavedFile], Future[FileContents | None]]) -> None:
        self._left = deque(files)
        self._submit = submit
        self._begun = deque[Future[FileContents | None]]()

    @property
    def next(self) -> Future[FileContents | None]:
        """The next file, once it is read; None if it can't be used. There must be one."""
        while self._left and len(self._begun) < AHEAD:
            self._begun.append(self._submit(self._left.popleft()))
        return self._begun[0]

    def take(self, seconds: float) -> FileContents | None:
        """Return the next file; None if it can't be used. Raises TimeoutError if it is not there after ``seconds``."""
        contents = self.next.result(seconds)
        self._begun.popleft()
        return contents

    def cancel(self, release: Callable[[mmap.mmap], object]) -> None:
        """End all reads. Memory of those that are under way is released at their end."""
        self._left.clear()
        while self._begun:
            if not (future := self._begun.popleft()).cancel():
                future.add_done_callback(partial(_release, release))


class Readers:
    """Threads that make calls, in order. They keep no process from ending though a disk hangs."""

    def __init__(self) -> None:
        self._calls = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]()  # None ends a thread
        self._is_closed = False
        self._threads = list[Thread]()
        with contextlib.ExitStack() as undo:
            undo.callback(self.close, 0.0)
            for _ in range(READERS):
                self._threads.append(start_thread("moetier-pages", self._run))
            undo.pop_all()

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        """Return the future of a call that raises no errors. Once the threads end, it is cancelled."""
        future = Future[Result]()
        self._calls.put((future, call))
        if self._is_closed:  # it may never be made
            future.cancel()
        return future

    def close(self, seconds: float) -> bool:
        """Cancel the calls that have not begun. Return whether the threads have ended after ``seconds``."""
        self._is_closed = True  # before the queue is emptied, so that each call is cancelled here or in ``submit``
        with contextlib.suppress(Empty):
            while (waiting := self._calls.get_nowait()) is not None:
                waiting[0].cancel()
        for _ in self._threads:
            self._calls.put(None)
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while self._make_next_call():  # a method of its own, so that no local variable keeps the last result alive
            pass

    def _make_next_call(self) -> bool:
        """Make the next call. Return whether the thread goes on."""
        if (waiting := self._calls.get()) is None:
            return False
        future, call = waiting
        if future.set_running_or_notify_cancel():
            future.set_result(call())
        return True


class PageReader:
    """Finds and reads files of one engine."""

    def __init__(
        self,
        folder: PageFolder,
        memory: PageBytes,
        order: DiskOrder,
        root_of: Callable[[str], bytes],
        *,
        has_states: bool,
    ) -> None:
        """Make a reader.

        Args:
            folder: has the files.
            memory: has the pages.
            order: says when to read.
            root_of: returns the name that the first pages of a user follow.
            has_states: whether a sequence continues behind a snapshot of its state only.
        """
        self.read_bytes = self.pages = 0  # counts of what was used, changed by the engine's thread alone
        self._folder = folder
        self._memory = memory
        self._order = order
        self._root_of = root_of
        self._has_states = has_states
        self._readers = Readers()

    def find(self, user: str, ids: Sequence[int], known: int, state: int = 0) -> Future[list[SavedFile]]:
        """Look for files of pages with the next tokens of ``ids`` after the first ``known`` ones.

        The last page may have fewer than PAGE_TOKENS tokens; the first one begins at the beginning of a page. If the
        model has states, the last file is one that is behind more than ``state`` tokens. Never raises an error.
        """
        return self._readers.submit(partial(self._find, user, [*ids], known, state))

    def _find(self, user: str, ids: Sequence[int], known: int, state: int) -> list[SavedFile]:
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
                    return [*(page for page in pages if page.depth <= depth), SavedFile(name, depth, tokens, True)]
        except Exception as error:
            _log.warning("Keys and values are computed again: %s: %s", type(error).__name__, error)
        return []

    def _find_pages(self, user: str, ids: Sequence[int], known: int) -> tuple[list[bytes], list[SavedFile]]:
        """Return the pages that ``find`` looks for, and the names from which the folder follows.

        The name at index i is that of page i - 1 of the prompt, or the root's for i = 0.
        """
        pages, name, names = list[SavedFile](), self._root_of(user), list[bytes]()
        for depth in range(len(ids) // PAGE_TOKENS + 1):
            tokens = tuple(ids[PAGE_TOKENS * depth : PAGE_TOKENS * (depth + 1)])
            following = self._folder.follow(name, tokens)
            is_full = len(tokens) == PAGE_TOKENS
            names.append(name)
            if PAGE_TOKENS * (depth + 1) > known and not (is_full and self._folder.has(following)):
                least = max(known - PAGE_TOKENS * depth, 0)
                for count in range(min(len(tokens), PAGE_TOKENS - 1), least, -1):
                    if self._folder.has(part := self._folder.follow(name, tokens[:count])):
                        pages.append(SavedFile(part, depth, tokens[:count]))
                        break
                break
            name = following
            if PAGE_TOKENS * (depth + 1) > known:
                pages.append(SavedFile(name, depth, tokens))
        return names, pages

    def read(self, files: Sequence[SavedFile]) -> Reading:
        """Begin to read files."""
        return Reading(files, lambda file: self._readers.submit(partial(self._read, file)))

    def pages_of_state(self, contents: FileContents) -> int:
        """Return how many pages the state in ``contents`` takes."""
        return -(
            -len(contents.payload.data) // max(PAGE_TOKENS * sum(part.token_bytes for part in self._memory.layout), 1)
        )

    def restore(self, saved: SavedFile, contents: FileContents, pages: Sequence[int]) -> bool:
        """Write what was read into ``pages`` of the memory: one, or all of a state. Return False if it does not fit."""
        layout, data = contents.payload.layout, contents.payload.data
        tokens, size = PAGE_TOKENS if saved.is_state else len(saved.tokens), -(-len(data) // len(pages))
        try:
            parts = [data[size * at : size * (at + 1)] for at in range(len(pages))]
            fits = all(
                self._memory.restore_page(page, tokens, layout, part) for page, part in zip(pages, parts, strict=True)
            )
            self.read_bytes += len(data)
            self.pages += len(pages) if fits else 0
        finally:
            self.release(contents)
        if not fits:
            self._folder.remove(saved.name)
        return fits

    def release(self, contents: FileContents) -> None:
        """Give back the memory of what was read."""
        contents.payload.data.release()
        self._folder.release(contents.memory)

    def cancel(self, reading: Reading) -> None:
        """End a reading."""
        reading.cancel(self._folder.release)

    def _read(self, file: SavedFile) -> FileContents | None:
        try:
            with self._order.reading_page():
                return self._folder.read(file.name, file.depth)
        except Exception as error:
            _log.warning("Keys and values are computed again: %s: %s", type(error).__name__, error)
            return None

    def close(self, seconds: float) -> bool:
        """End the threads. Return whether they have ended after ``seconds``: a disk may hang."""
        return self._readers.close(seconds)


def _ends(end: int) -> Iterator[int]:
    """Yield where snapshots of a sequence may be whose first ``end`` tokens are kept, the last one first.

    The nearest one is less than SNAPSHOT_TOKENS and a page before the end. If it is not on the disk, earlier ones are
    looked for behind full pages only.
    """
    last = PAGE_TOKENS * (max(end - SNAPSHOT_TOKENS, 0) // PAGE_TOKENS)
    yield from range(end, last, -1)
    yield from range(last, 0, -PAGE_TOKENS)


def _release(release: Callable[[mmap.mmap], object], future: Future[FileContents | None]) -> None:
    if (contents := future.result()) is not None:
        contents.payload.data.release()
        release(contents.memory)
