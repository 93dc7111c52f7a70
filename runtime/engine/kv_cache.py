"""The pages of running sequences, and of earlier ones that later prompts may begin with, within a budget of pages."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from moetier.runtime.kernels.layer.paged_cache import PAGE_TOKENS

from .free_pages import FreePages
from .prefix_tree import Node, PrefixTree
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


class KVCache:
    """Keys and values in pages. Each running sequence holds the pages of all its computed tokens."""

    def __init__(self, pages: int, memory: CopyablePages, *, keeps: bool = True) -> None:
        """Use at most ``pages`` pages of ``memory``.

        ``keeps``: whether a sequence may continue after pages of another one.
        """
        self.size = pages
        self._keeps = keeps
        self._memory = memory
        self._free = FreePages(pages)
        self._tree = PrefixTree()
        self._held: dict[Sequence, _Held] = {}

    def has_pages_for(self, sequence: Sequence) -> bool:
        """Return whether there are pages for all tokens of a sequence that has not begun, and for its next token."""
        nodes = self._tree.match(sequence.request.user, _reusable(sequence)).nodes
        pages = {page for held in self._held.values() for page in held.pages} | {node.page for node in nodes}
        return -(-(len(sequence.ids) + 1) // PAGE_TOKENS) - len(nodes) <= self.size - len(pages)

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
        self._tree.pin(node)
        with ExitStack() as undo:
            undo.callback(self._tree.unpin, node)
            if partial is not None and not partial.is_full and not partial.pins and shared == len(partial.tokens):
                self._tree.remove(partial)
                held.own = [partial.page]
            elif partial is not None:
                self._tree.pin(partial)  # it stays while a page is found for the copy
                undo.callback(self._tree.unpin, partial)
                held.own = self._take(1, held.pages)
                undo.callback(self._free.release, held.own)
                if held.own:
                    self._memory.copy_page(partial.page, held.own[0], shared)
                else:
                    shared = 0
                self._tree.unpin(partial)
            undo.pop_all()  # the node stays pinned
        self._held[sequence] = held
        sequence.resume_at(PAGE_TOKENS * len(held.shared) + shared)

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

    def end(self, sequence: Sequence) -> None:
        """Let other sequences find all pages of a sequence that has ended, and let them be evicted."""
        self.keep(sequence)
        held = self._held.pop(sequence)
        self._tree.unpin(held.node)
        rest = sequence.computed - PAGE_TOKENS * len(held.shared)
        if rest > 0 and self._keeps:
            self._add(sequence, held, rest, pins=False)
        self._free.release(held.own)

    def free_pages(self) -> int:
        """Return the number of pages that hold nothing."""
        return len(self._free)

    def _add(self, sequence: Sequence, held: _Held, count: int, *, pins: bool = True) -> None:
        begin = PAGE_TOKENS * len(held.shared)
        page = held.own.pop(0)
        node, unneeded = self._tree.add(held.node, sequence.ids[begin : begin + count], page)
        self._free.release(unneeded)
        if pins:
            self._tree.pin(node)
            self._tree.unpin(held.node)
        held.node = node
        held.shared.append(node.page)

    def _take(self, count: int, before: list[int]) -> list[int]:
        """Return ``count`` pages to follow those in ``before``, or none if there are fewer, even with evicted ones."""
        if len(self._free) < count:
            self._free.release(self._tree.evict(count - len(self._free)))
        if len(self._free) < count:
            return []
        return self._free.take(count, before[-1] if before else None)


def _reusable(sequence: Sequence) -> list[int]:
    """Return the first tokens of a sequence, those whose keys and values may be taken from another one."""
    return [] if sequence.request.scores_prompt else sequence.ids[:-1]
