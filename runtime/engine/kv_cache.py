"""The pages of running sequences, and of earlier ones that later prompts may begin with, within a budget of pages."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Protocol

from .prefix_tree import PAGE, Node, PrefixTree
from .sequence import Sequence


class PageMemory(Protocol):
    """Memory of pages, by their numbers."""

    def copy_page(self, source: int, target: int, tokens: int) -> None:
        """Copy the keys and values of the first ``tokens`` tokens of a page to another page."""

    def free_page(self, page: int) -> None:
        """Forget what is in a page, whose memory is not needed any more."""


@dataclass(slots=True)
class _Held:
    """Pages of a running sequence: those up to ``node`` are in the tree; ``own`` has those after them."""

    node: Node
    shared: list[int]
    own: list[int] = field(default_factory=list)


class KVCache:
    """Keys and values in pages. Each running sequence holds the pages of all its computed tokens."""

    def __init__(self, pages: int, memory: PageMemory, *, keeps: bool = True) -> None:
        """Use at most ``pages`` pages of ``memory``.

        ``keeps``: whether a sequence may continue after pages of another one.
        """
        self.size = pages
        self._keeps = keeps
        self._memory = memory
        self._free = list(range(pages))  # a heap: low numbers are used again first
        self._tree = PrefixTree()
        self._held: dict[Sequence, _Held] = {}

    def has_room(self, sequence: Sequence) -> bool:
        """Return whether there are pages for all tokens of a sequence that has not begun, and for its next token."""
        nodes = self._tree.match(sequence.request.user, sequence.ids[:-1]).nodes
        held = {page for running in self._held for page in self.pages_of(running)} | {node.page for node in nodes}
        return -(-(len(sequence.ids) + 1) // PAGE) - len(nodes) <= self.size - len(held)

    def begin(self, sequence: Sequence) -> None:
        """Let a sequence continue after the longest prefix of its tokens that is kept. Sets ``sequence.computed``.

        At least one token is left to compute. Of a page that is only partly equal, the equal part is copied.
        """
        assert sequence not in self._held
        match = self._tree.match(sequence.request.user, sequence.ids[:-1])
        node = match.nodes[-1] if match.nodes else self._tree.root(sequence.request.user)
        node.pins += 1
        held = _Held(node, [node.page for node in match.nodes])
        shared = 0
        if match.partial is not None:
            match.partial.pins += 1  # stays while a page is found for the copy
            try:
                copies = self._take(1)
            finally:
                match.partial.pins -= 1
            if copies:
                self._memory.copy_page(match.partial.page, copies[0], match.shared)
                held.own, shared = copies, match.shared
        self._held[sequence] = held
        sequence.computed = PAGE * len(held.shared) + shared

    def reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Take pages for the next ``tokens`` tokens of a sequence. Returns False, and takes none, if there are none."""
        held = self._held[sequence]
        missing = -(-(sequence.computed + tokens) // PAGE) - len(held.shared) - len(held.own)
        if missing > 0:
            pages = self._take(missing)
            if not pages:
                return False
            held.own += pages
        return True

    def pages_of(self, sequence: Sequence) -> list[int]:
        """Return the numbers of a sequence's pages, from its first token on."""
        held = self._held[sequence]
        return held.shared + held.own

    def keep(self, sequence: Sequence) -> None:
        """Let other sequences find the full pages of a sequence. Sets no other state of the sequence."""
        held = self._held[sequence]
        while self._keeps and held.own and PAGE * (len(held.shared) + 1) <= sequence.computed:
            self._add(sequence, held, PAGE)

    def end(self, sequence: Sequence) -> None:
        """Let other sequences find all pages of a sequence that has ended, and let them be evicted."""
        self.keep(sequence)
        held = self._held.pop(sequence)
        held.node.pins -= 1
        rest = sequence.computed - PAGE * len(held.shared)
        if rest > 0 and self._keeps:
            self._add(sequence, held, rest, pins=False)
        self._release(held.own)

    def free_pages(self) -> int:
        """Return the number of pages that hold nothing."""
        return len(self._free)

    def _add(self, sequence: Sequence, held: _Held, count: int, *, pins: bool = True) -> None:
        begin = PAGE * len(held.shared)
        page = held.own.pop(0)
        node, unneeded = self._tree.add(held.node, sequence.ids[begin : begin + count], page)
        self._release(unneeded)
        if pins:
            node.pins += 1
            held.node.pins -= 1
        held.node = node
        held.shared.append(node.page)

    def _take(self, count: int) -> list[int]:
        """Return ``count`` pages, or none if there are fewer, even with what can be evicted."""
        if len(self._free) < count:
            self._release(self._tree.evict(count - len(self._free)))
        if len(self._free) < count:
            return []
        return [heapq.heappop(self._free) for _ in range(count)]

    def _release(self, pages: list[int]) -> None:
        for page in pages:
            self._memory.free_page(page)
            heapq.heappush(self._free, page)
