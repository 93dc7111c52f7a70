"""The pages of running sequences, and of earlier ones that later prompts may begin with, within a budget of pages."""

from __future__ import annotations

import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from moetier.runtime.kernels.layer.paged_cache import PAGE_TOKENS

from .free_pages import FreePages
from .prefix_tree import Node, PrefixTree
from .saved_pages import Reading, SavedPage, SavedPages
from .sequence import Sequence


class CopyablePages(Protocol):
    """Memory of pages, by their numbers."""

    def copy_page(self, source: int, target: int, tokens: int) -> None:
        """Copy the keys and values of the first ``tokens`` tokens of a page to another page."""


@dataclass(slots=True)
class _Held:
    """Pages of a running sequence: those up to ``node`` are in the tree; ``own`` has those after them."""

    node: Node
    shared: list[int]
    own: list[int] = field(default_factory=list)

    @property
    def pages(self) -> list[int]:
        """Numbers of all pages, from the sequence's first token on."""
        return self.shared + self.own


@dataclass(slots=True)
class _Fetch:
    """Pages that are being read: those up to ``node`` are in the tree; ``pages`` are for those that are left."""

    sequence: Sequence
    node: Node
    pages: list[int]
    left: deque[SavedPage]
    reading: Reading


class KVCache:
    """Keys and values in pages. Each running sequence holds the pages of all its computed tokens."""

    def __init__(
        self, pages: int, memory: CopyablePages, *, keeps: bool = True, saved: SavedPages | None = None
    ) -> None:
        """Use at most ``pages`` pages of ``memory``.

        ``keeps``: whether a sequence may continue after pages of another one. ``saved``: pages on disk, if any are.
        """
        self.size = pages
        self._keeps = keeps
        self._memory = memory
        self._free = FreePages(pages)
        self._tree = PrefixTree()
        self._held: dict[Sequence, _Held] = {}
        self._saved = saved if keeps else None
        self._fetch: _Fetch | None = None  # what is being read for the sequence that waits first

    def has_room(self, sequence: Sequence) -> bool:
        """Return whether there are pages for all tokens of a sequence that has not begun, and for its next token."""
        nodes = self._tree.match(sequence.request.user, _reusable(sequence)).nodes
        pages = {page for held in self._held.values() for page in held.pages} | {node.page for node in nodes}
        return -(-(len(sequence.ids) + 1) // PAGE_TOKENS) - len(nodes) <= self.size - len(pages)

    def fetch(self, sequence: Sequence, seconds: float = 0.0) -> bool:
        """Read pages on disk that have the first tokens of a sequence for which there is room, and that are not here.

        Returns True once there are no more, and the sequence is to begin at once; False if they are not there after
        ``seconds``. Pages are read for one sequence at a time. They may be taken from it, as they hold nothing yet.
        """
        if self._saved is None:
            return True
        if self._fetch is None or self._fetch.sequence is not sequence:
            self._begin_fetch(self._saved, sequence)
        deadline = time.monotonic() + seconds
        while (fetch := self._fetch) is not None and fetch.left:
            if (taken := fetch.reading.take(max(deadline - time.monotonic(), 0.0))) is None:
                return False
            saved = fetch.left.popleft()
            if taken[0] is None or not self._saved.restore(saved, taken[0], fetch.pages[0]):
                break
            node, unneeded = self._tree.add(fetch.node, saved.tokens, fetch.pages.pop(0))
            self._free.release(unneeded)
            node.pins, fetch.node.pins, fetch.node = node.pins + 1, fetch.node.pins - 1, node
        self.cancel_fetch()
        return True

    def _begin_fetch(self, saved: SavedPages, sequence: Sequence) -> None:
        self.cancel_fetch()
        user, ids = sequence.request.user, _reusable(sequence)
        match = self._tree.match(user, ids)
        if found := saved.find(user, ids, match.tokens):
            node = match.nodes[-1] if match.nodes else self._tree.root(user)
            node.pins += 1
            pages = self._take(len(found), [node.page for node in match.nodes])
            self._fetch = _Fetch(sequence, node, pages, deque(found[: len(pages)]), saved.read(found[: len(pages)]))

    def cancel_fetch(self, sequence: Sequence | None = None) -> None:
        """Read no more pages for a sequence, None: for any, and release those that hold nothing."""
        if (
            (fetch := self._fetch) is not None
            and self._saved is not None
            and (sequence is None or sequence is fetch.sequence)
        ):
            self._fetch = None
            self._saved.cancel(fetch.reading)
            fetch.node.pins -= 1
            self._free.release(fetch.pages)

    def begin(self, sequence: Sequence) -> None:
        """Let a sequence continue after the longest prefix of its tokens that is kept. Sets ``sequence.computed``.

        At least one token is left to compute. A last page that is not full is taken over if all of it is equal and no
        other sequence runs on from it. Of one that is only partly equal, the equal part is copied. If that raises an
        error, nothing has begun.
        """
        assert sequence not in self._held
        match = self._tree.match(sequence.request.user, _reusable(sequence))
        node = match.nodes[-1] if match.nodes else self._tree.root(sequence.request.user)
        held = _Held(node, [node.page for node in match.nodes])
        partial, shared = match.partial, match.shared
        node.pins += 1
        with ExitStack() as undo:
            undo.callback(_unpin, node)
            if partial is not None and not partial.is_full and not partial.pins and shared == len(partial.tokens):
                held.own = [self._tree.remove(partial)]
            elif partial is not None:
                partial.pins += 1  # it stays while a page is found for the copy
                undo.callback(_unpin, partial)
                held.own = self._take(1, held.pages)
                undo.callback(self._free.release, held.own)
                if held.own:
                    self._memory.copy_page(partial.page, held.own[0], shared)
                else:
                    shared = 0
                partial.pins -= 1
            undo.pop_all()  # the node stays pinned
        self._held[sequence] = held
        sequence.computed = PAGE_TOKENS * len(held.shared) + shared

    def reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Take pages for the next ``tokens`` tokens of a sequence. Returns False, and takes none, if there are none."""
        held = self._held[sequence]
        missing = -(-(sequence.computed + tokens) // PAGE_TOKENS) - len(held.shared) - len(held.own)
        if missing > 0:
            pages = self._take(missing, held.pages)
            if not pages:
                return False
            held.own += pages
        return True

    def pages_of(self, sequence: Sequence) -> list[int]:
        """Return the numbers of a sequence's pages, from its first token on."""
        return self._held[sequence].pages

    def keep(self, sequence: Sequence) -> None:
        """Let other sequences find the full pages of a sequence. Sets no other state of the sequence."""
        held = self._held[sequence]
        while self._keeps and held.own and PAGE_TOKENS * (len(held.shared) + 1) <= sequence.computed:
            self._add(sequence, held, PAGE_TOKENS)

    def end(self, sequence: Sequence, *, is_turn: bool = False) -> None:
        """Let other sequences find all pages of a sequence that has ended, and let them be evicted.

        ``is_turn``: whether a request ends that has got an answer. Its pages are then written to the disk, if there is
        a folder for them.
        """
        self.keep(sequence)
        held = self._held.pop(sequence)
        held.node.pins -= 1
        rest = sequence.computed - PAGE_TOKENS * len(held.shared)
        if rest > 0 and self._keeps:
            self._add(sequence, held, rest, pins=False)
        self._free.release(held.own)
        if is_turn and self._saved is not None:
            self._saved.save(sequence.request.user, held.node.path)

    def free_pages(self) -> int:
        """Return the number of pages that hold nothing."""
        return len(self._free)

    def _add(self, sequence: Sequence, held: _Held, count: int, *, pins: bool = True) -> None:
        begin = PAGE_TOKENS * len(held.shared)
        page = held.own.pop(0)
        node, unneeded = self._tree.add(held.node, sequence.ids[begin : begin + count], page)
        self._free.release(unneeded)
        if pins:
            node.pins += 1
            held.node.pins -= 1
        held.node = node
        held.shared.append(node.page)

    def _take(self, count: int, before: list[int]) -> list[int]:
        """Return ``count`` pages to follow those in ``before``, or none if there are fewer, even with evicted ones."""
        if len(self._free) < count:
            self._free.release(self._tree.evict(count - len(self._free)))
        if len(self._free) < count and self._fetch is not None:
            self.cancel_fetch()
            return self._take(count, before)
        if len(self._free) < count:
            return []
        return self._free.take(count, before[-1] if before else None)


def _unpin(node: Node) -> None:
    node.pins -= 1


def _reusable(sequence: Sequence) -> list[int]:
    """Return the first tokens of a sequence, those whose keys and values may be taken from another one."""
    return [] if sequence.request.scores_prompt else sequence.ids[:-1]
