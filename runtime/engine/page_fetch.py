"""Pages on disk that are brought into the prefix tree for the sequence that waits first."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from .pages.free_pages import FreePages
from .pages.page_file import FileContents
from .pages.page_reader import PageReader, Reading, SavedFile
from .pages.prefix_tree import Node, PrefixTree
from .sequence import TokenSequence

READ_SECONDS = 5.0  # time in which the next page is read, or those that are left are computed: a disk may hang
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Search:
    """Pages that are being looked for or read: those up to ``node`` are in the tree."""

    sequence: TokenSequence
    node: Node
    finding: Future[list[SavedFile]]
    since: float  # time since which it waits for the result, or for the next page
    reading: Reading | None = None  # once they were found
    left: deque[SavedFile] = field(default_factory=deque[SavedFile])
    pages: list[int] = field(default_factory=list[int])  # for those that are left

    @property
    def next(self) -> Future[Any]:
        """The future that it waits for."""
        return self.finding if self.reading is None else self.reading.next


class PageFetch:
    """Reads pages for one sequence at a time. They may be taken from it, as they hold nothing yet."""

    def __init__(
        self,
        reader: PageReader,
        tree: PrefixTree,
        free: FreePages,
        take: Callable[[int, list[int]], list[int]],
    ) -> None:
        """``take`` returns so many pages to follow others, as ``KVCache`` takes them."""
        self._reader = reader
        self._tree = tree
        self._free = free
        self._take = take
        self._search: _Search | None = None
        self._hung: Future[Any] | None = None  # a read that took too long: until its end, nothing is read

    @property
    def hangs(self) -> bool:
        """Whether a read takes too long."""
        return self._hung is not None and not self._hung.done()

    def is_for(self, sequence: TokenSequence) -> bool:
        """Return whether pages are read for a sequence now."""
        return self._search is not None and self._search.sequence is sequence

    def begin(self, sequence: TokenSequence, ids: list[int], kept: int) -> None:
        """Begin to read pages with the first tokens of a sequence, those of ``ids``. It can resume after ``kept``."""
        self.cancel()
        user = sequence.request.user
        match = self._tree.match(user, ids)
        node = match.nodes[-1] if match.nodes else self._tree.root(user)
        self._search = _Search(sequence, node, self._reader.find(user, ids, match.tokens, kept), time.monotonic())
        self._tree.pin(node)

    def proceed(self, seconds: float) -> bool:
        """Let the pages that are read be found in the tree.

        Returns True once there are no more, or none comes for READ_SECONDS; False if they are not there after
        ``seconds``.
        """
        deadline = time.monotonic() + seconds
        try:
            while self._add_next(max(deadline - time.monotonic(), 0.0)):
                pass
        except TimeoutError:
            assert self._search is not None
            if time.monotonic() - self._search.since < READ_SECONDS:
                return False
            _log.warning("Keys and values are computed, as none were read from the disk for %g s.", READ_SECONDS)
            self._hung = self._search.next
        except BaseException:
            self.cancel()
            raise
        self.cancel()
        return True

    def _add_next(self, seconds: float) -> bool:
        """Add the next page that is read to the tree. Return whether there may be another one.

        Raises TimeoutError if it is not there after ``seconds``.
        """
        if (search := self._search) is None:  # its pages were taken from it
            return False
        if search.reading is None:
            search.left = deque(search.finding.result(seconds))
            count = sum(not file.is_state for file in search.left)
            pages = self._take(count, [node.page for node in search.node.path])
            if self._search is not search:  # its node was unpinned for them
                self._free.release(pages)
                return False
            search.pages = pages
            search.reading = self._reader.read([*search.left])
            return bool(search.left) and len(pages) == count
        contents, file = search.reading.take(seconds), search.left.popleft()
        search.since = time.monotonic()
        if contents is None:
            return False
        if file.is_state:
            self._restore_state(search.sequence, file, contents)
        elif not self._reader.restore(file, contents, search.pages[:1]):
            return False
        else:
            node, unneeded = self._tree.add(search.node, file.tokens, search.pages.pop(0))
            self._free.release(unneeded)
            self._tree.pin(node)
            self._tree.unpin(search.node)
            search.node = node
        return bool(search.left)

    def _restore_state(self, sequence: TokenSequence, state: SavedFile, contents: FileContents) -> None:
        """Insert a state from the disk into the tree, unless that has it by now, lacks its tokens or has no room."""
        match, tokens = self._tree.match(sequence.request.user, sequence.ids[: state.end]), len(state.tokens)
        count, pages = self._reader.pages_of_state(contents), list[int]()
        if match.tokens == state.end and tokens not in (node := match.partial or match.nodes[-1]).snapshots:
            self._tree.pin(node)
            self._free.release(self._tree.evict(count - len(self._free)))
            self._tree.unpin(node)
            if len(self._free) >= count:
                pages = self._free.take_last(count)
        if not pages:
            self._reader.release(contents)
            return
        with ExitStack() as undo:
            undo.callback(self._free.release, pages)
            if self._reader.restore(state, contents, pages):
                self._tree.add_snapshot(node, tokens, pages)
                undo.pop_all()

    def cancel(self) -> bool:
        """Read no more, and release the pages that hold nothing. Return whether any were being read."""
        if (search := self._search) is None:
            return False
        self._search = None
        if search.reading is not None:
            self._reader.cancel(search.reading)
        self._tree.unpin(search.node)
        self._free.release(search.pages)
        return True
