"""Writes pages and states of sequences that have ended to the disk.

The writer's thread copies a page of the tree while the engine goes on, and then looks whether the tree still has it: a
page that was evicted meanwhile is not written. It writes at a limited rate, and never waits for anything that waits for
it. It raises no error: a page that can't be written is lost.

Of the states of a sequence, those behind full pages are written, and the last two of the others: near the end of its
prompt, and behind its answer. A later prompt may not have the answer as it was computed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from moetier.runtime.kernels.layer.pages import PAGE_TOKENS
from moetier.tiers.disk_order import DiskOrder
from moetier.tiers.threads import start_thread

from .page_file import PageBytes, Payload, head_bytes
from .page_folder import STATE, PageFolder
from .prefix_tree import Node, StateSnapshot

RATE = 8 << 20  # bytes a second that are written, unless the engine closes: each MiB takes about 1 ms of a processor
MAX_WAIT = 1.0  # seconds that a piece waits if reads never pause: so at most a MiB a second is written
MAX_QUEUE = 256  # sequences that wait to be written; further ones replace the oldest
PAUSE = 60.0  # seconds after a failed write in which nothing is written
SWEEP_SECONDS = 3600.0  # pages that are too old are looked for so often

_log = logging.getLogger(__name__)


class _Ended(NamedTuple):
    """Pages of a sequence that has ended, which are to be written."""

    user: str
    nodes: list[Node]  # from the first page on
    states: list[tuple[int, int, StateSnapshot]]  # for each the number of its page, and how many tokens are before it


class PageWriter:
    """Writes files of one engine, on a thread of its own."""

    def __init__(
        self, folder: PageFolder, memory: PageBytes, order: DiskOrder, root_of: Callable[[str], bytes]
    ) -> None:
        """Start the thread.

        Args:
            folder: has the files.
            memory: has the pages.
            order: says when to write.
            root_of: returns the name that the first pages of a user follow.
        """
        self.written_bytes = 0  # changed by the writer's thread alone
        self._folder = folder
        self._memory = memory
        self._order = order
        self._root_of = root_of
        self._writes_from = 0.0  # time from which the next piece may be written
        self._sweeps_at = time.monotonic()  # time of the next sweep
        self._changed = threading.Condition()  # guards: ``_waiting``, ``_closes_at``, ``_is_busy``
        self._waiting = deque[_Ended](maxlen=MAX_QUEUE)
        self._closes_at: float | None = None  # time at which the writer ends even if some wait
        self._is_busy = False  # whether a sequence is being written
        self._thread = start_thread("moetier-page-writer", self._write_all)

    def save(self, user: str, nodes: list[Node]) -> None:
        """Let the pages of a sequence that has ended be written: ``nodes`` of the tree, from the first page on."""
        states = [
            (depth, count, state)
            for depth, node in enumerate(nodes)
            for count, state in sorted(node.snapshots.items(), key=lambda item: item[0])
        ]
        full = [state for state in states if state[1] == PAGE_TOKENS]
        states = full + [state for state in states if state[1] < PAGE_TOKENS][-2:]
        with self._changed:
            self._waiting.append(_Ended(user, nodes, states))
            self._changed.notify()

    def _write_all(self) -> None:
        while True:
            self._sweep_if_due()
            with self._changed:
                self._is_busy = False
                if self._is_late():
                    self._waiting.clear()
                seconds = max(self._sweeps_at - time.monotonic(), 0)
                self._changed.wait_for(lambda: self._waiting or self._closes_at, seconds)
                if not self._waiting and self._closes_at:
                    return
                ended = self._waiting.popleft() if self._waiting else None
                self._is_busy = ended is not None
            if ended is not None and not self._try(
                partial(self._write_pages, ended), "Keys and values are not kept for a minute"
            ):
                with self._changed:
                    self._changed.wait_for(lambda: self._closes_at, PAUSE)
                    self._waiting.clear()

    def _sweep_if_due(self) -> None:
        """Remove what is too old, though sequences wait or are being written: a server may always be busy."""
        if time.monotonic() >= self._sweeps_at:
            self._try(self._folder.sweep, "Old keys and values are not removed")
            self._sweeps_at = time.monotonic() + SWEEP_SECONDS

    def _try(self, work: Callable[[], object], failure: str) -> bool:
        """Call ``work``. If it fails, return False, and log ``failure`` and why."""
        try:
            work()
        except Exception as error:  # keys and values are then computed again
            reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            _log.warning("%s in %s: %s.", failure, self._folder.options.folder, reason)
            return False
        return True

    def _write_pages(self, ended: _Ended) -> None:
        names = [self._root_of(ended.user)]  # of the pages before each page, and of the last one
        for node in ended.nodes:
            names.append(self._folder.follow(names[-1], node.tokens))
        files = [  # for each the number of its page, the name before it, its own one, and what is in it
            (depth, names[depth], names[depth + 1], len(node.tokens), partial(_pages_of, node))
            for depth, node in enumerate(ended.nodes)
        ]
        for depth, count, state in ended.states:
            node = ended.nodes[depth]
            name = self._folder.follow(names[depth], node.tokens[:count])
            if count < len(node.tokens):  # without the page's last tokens, too
                files.append((depth, names[depth], name, count, partial(_pages_of, node)))
            files.append((depth, name, self._folder.follow(name, STATE), PAGE_TOKENS, partial(_pages_of, state)))
        lost = set[bytes]()  # names of files that are not on the disk: what follows them is not written
        for depth, before, name, tokens, pages in sorted(files, key=lambda file: file[0]):  # a state behind its page
            self._sweep_if_due()
            if before in lost or not (self._folder.has(name) or self._write(depth, name, tokens, pages)):
                lost.add(name)
        for depth, _, name, _, _ in files:
            self._folder.touch(name, depth)

    def _write(self, depth: int, name: bytes, tokens: int, pages_of: Callable[[], list[int]]) -> bool:
        """Write the first ``tokens`` tokens of pages into a file.

        Return False if that can't be: they were evicted, or don't fit, another process has removed the file, or it is
        late.
        """
        layout, pages = self._memory.layout, pages_of()
        if self._is_late() or not pages:
            return False
        page_bytes = tokens * sum(part.token_bytes for part in layout)
        begin, size = head_bytes(layout), page_bytes * len(pages)
        if not self._folder.fits(layout, size):
            return False
        memory = self._folder.memory(begin + size)
        data = memoryview(memory)[begin : begin + size]
        try:
            for at, page in enumerate(pages):
                self._memory.save_page(page, tokens, data[page_bytes * at : page_bytes * (at + 1)])
            if pages_of() != pages:  # they were evicted, and may have been written meanwhile
                return False
            written = self._folder.write(name, depth, Payload(layout, data), memory, self._wait_to_write)
            self.written_bytes += written
            return bool(written)
        finally:
            data.release()
            self._folder.release(memory)

    def _is_late(self) -> bool:
        """Return whether the time is over in which pages are still written when the engine closes."""
        return self._closes_at is not None and time.monotonic() >= self._closes_at

    def _wait_to_write(self, size: int) -> None:
        """Wait until ``size`` bytes may be written: so long that no more than RATE are, and nothing is read.

        A disk that is always read delays each piece by MAX_WAIT only: else no page would ever be written.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closes_at, max(self._writes_from - time.monotonic(), 0))
        late = time.monotonic() + MAX_WAIT
        self._order.wait_to_write(lambda: self._closes_at is not None or time.monotonic() >= late)
        self._writes_from = time.monotonic() + size / RATE

    @property
    def is_writing(self) -> bool:
        """Whether sequences are being written, or wait to be."""
        with self._changed:
            return bool(self._waiting) or self._is_busy

    def close(self, seconds: float) -> bool:
        """Write what is left for ``seconds``. Return whether the thread has ended, for which it has twice this time."""
        with self._changed:
            self._closes_at = time.monotonic() + seconds
            self._changed.notify_all()
        self._thread.join(2 * seconds)
        return not self._thread.is_alive()


def _pages_of(part: Node | StateSnapshot) -> list[int]:
    """Return the numbers of a node's or a snapshot's pages; none if it is no longer in the tree."""
    if isinstance(part, StateSnapshot):
        return part.pages
    return [part.page] if part.page >= 0 else []
