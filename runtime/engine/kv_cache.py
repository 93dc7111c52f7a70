"""The pages of running sequences, and of earlier ones that later prompts may begin with, within a budget of pages."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from moetier.runtime.kernels.layer.pages import PAGE_TOKENS
from moetier.runtime.model.context import SNAPSHOT_TOKENS

from .page_fetch import PageFetch
from .pages.free_pages import FreePages
from .pages.prefix_tree import Match, Node, PrefixTree
from .pages.saved_pages import SavedPages
from .sequence import TokenSequence

MIN_TOKENS = PAGE_TOKENS  # fewer tokens than these are computed again, rather than kept in a snapshot
# A prompt's last tokens, which a later one may not have: chat templates end a prompt with the beginning of an answer,
# and leave out its thoughts later. The snapshot of a prompt is before them, so that it serves the same prompt, too.
LAST_TOKENS = 8
NOTHING = Match((), None, 0)
_log = logging.getLogger(__name__)


class StateMemory(Protocol):
    """The states of sequences besides their keys and values, and copies of them in pages."""

    def state_pages(self, sequence: TokenSequence) -> int:
        """Return how many pages the state behind a sequence's computed tokens takes; 0 if there is no such state."""

    def save_state(self, sequence: TokenSequence, pages: list[int]) -> None:
        """Write the state of a sequence into pages."""

    def load_state(self, sequence: TokenSequence, pages: list[int]) -> None:
        """Let a sequence that begins continue from the state in pages."""


class SequenceMemory(Protocol):
    """Memory of pages, by their numbers."""

    @property
    def state_memory(self) -> StateMemory | None:
        """The states of sequences that can resume; None if they have none besides keys and values."""

    def copy_page(self, source: int, target: int, tokens: int) -> None:
        """Copy the keys and values of the first ``tokens`` tokens of a page to another page."""


@dataclass(slots=True)
class _Held:
    """Pages of a running sequence: those up to ``node`` are in the tree; ``own`` has those after them."""

    node: Node
    shared: list[int]
    own: list[int] = field(default_factory=list)
    snapshot: int = 0  # tokens behind which the last snapshot is
    branch: int = 0  # tokens in full pages of the tree that have no snapshot after them; 0 if there are none

    @property
    def pages(self) -> list[int]:
        """Numbers of all pages, from the sequence's first token on."""
        return self.shared + self.own


class KVCache:
    """Keys and values in pages. Each running sequence holds the pages of all its computed tokens.

    If a model has states besides, a sequence can only continue behind a snapshot of them. Snapshots are taken at each
    multiple of SNAPSHOT_TOKENS, LAST_TOKENS before the end of a prompt (if the latest snapshot is MIN_TOKENS or more
    before that place), after an answer, and where a prompt differs from an earlier one. So a sequence that continues
    another one computes fewer than MIN_TOKENS + LAST_TOKENS of the other's tokens again.
    """

    def __init__(
        self, pages: int, memory: SequenceMemory, *, keeps: bool = True, saved: SavedPages | None = None
    ) -> None:
        """Use at most ``pages`` pages of ``memory``.

        ``keeps``: whether pages stay once their sequence has ended, so that others with the same first tokens continue
        after them. ``saved``: pages on disk, if any are.
        """
        self.size = pages
        self._keeps = keeps
        self._memory = memory
        self._states = memory.state_memory
        self._free = FreePages(pages)
        self._tree = PrefixTree()
        self._held: dict[TokenSequence, _Held] = {}
        self._writer = saved.writer if saved is not None and keeps else None
        self._fetch = None
        if saved is not None and keeps:
            self._fetch = PageFetch(saved.reader, self._tree, self._free, self._take)

    def has_pages_for(self, sequence: TokenSequence) -> bool:
        """Return whether there are pages for all tokens of a sequence that has not begun, and for its next token."""
        nodes = self._match(sequence)[0].nodes
        return -(-(len(sequence.ids) + 1) // PAGE_TOKENS) - len(nodes) <= self._obtainable(node.page for node in nodes)

    def fetch(self, sequence: TokenSequence, seconds: float = 0.0) -> bool:
        """Read the missing first pages of a sequence from the disk. There must be room for the sequence.

        Returns True once there are no more, and the sequence is to begin at once; False if they are not there after
        ``seconds``.
        """
        if self._fetch is None or self._fetch.hangs:
            return True
        if not self._fetch.is_for(sequence):
            self._fetch.begin(sequence, _reusable(sequence), self._match(sequence)[0].tokens)
        return self._fetch.proceed(seconds)

    def cancel_fetch(self, sequence: TokenSequence) -> None:
        """Read no more pages for a sequence."""
        if self._fetch is not None and self._fetch.is_for(sequence):
            self._fetch.cancel()

    def begin(self, sequence: TokenSequence) -> None:
        """Let a sequence continue after the longest prefix of its tokens that is kept. Sets ``sequence.computed``.

        At least one token is left to compute. A last page that is not full is taken over under three conditions: all
        its tokens match, it has no snapshot, and no other sequence uses it. Otherwise the matching tokens are copied to
        a new page. If this raises an error, the sequence has not begun.
        """
        assert sequence not in self._held
        match, tokens = self._match(sequence)
        if not self._begin_after(sequence, match):
            self._begin_after(sequence, NOTHING)
        held = self._held[sequence]
        held.snapshot = sequence.computed
        branch = tokens - tokens % PAGE_TOKENS
        if branch - sequence.computed >= MIN_TOKENS:
            held.branch = branch

    def _match(self, sequence: TokenSequence) -> tuple[Match, int]:
        """Return the longest cached prefix that a sequence can resume from, and the length of the longest one."""
        ids = _reusable(sequence)
        if self._states is not None:
            return self._tree.match_state(sequence.request.user, ids)
        match = self._tree.match(sequence.request.user, ids)
        return match, match.tokens

    def _begin_after(self, sequence: TokenSequence, match: Match) -> bool:
        """Let a sequence continue after a prefix. Return whether it can: without all pages its state is of no use."""
        node = match.nodes[-1] if match.nodes else self._tree.root(sequence.request.user)
        held = _Held(node, [node.page for node in match.nodes])
        partial, shared = match.partial, match.shared
        self._tree.pin(node)
        with ExitStack() as pinned, ExitStack() as undo:
            undo.callback(self._tree.unpin, node)
            if match.snapshot is not None:  # from now on it may be evicted
                assert self._states is not None
                self._states.load_state(sequence, match.snapshot.pages)
            if (
                partial is not None
                and not (partial.is_full or partial.pins or partial.snapshots)
                and shared == len(partial.tokens)
            ):
                held.own = [self._tree.remove(partial)]
            elif partial is not None:
                self._tree.pin(partial)  # it stays until it is copied
                pinned.callback(self._tree.unpin, partial)
                held.own = self._take(1, held.pages)
                undo.callback(self._free.release, held.own)
                if held.own:
                    self._memory.copy_page(partial.page, held.own[0], shared)
                elif match.snapshot is not None:
                    return False
                else:
                    shared = 0
            undo.pop_all()  # the node stays pinned
        self._held[sequence] = held
        sequence.resume_at(PAGE_TOKENS * len(held.shared) + shared)
        return True

    def max_tokens(self, sequence: TokenSequence) -> int:
        """Return how many of a sequence's next tokens may be computed before a snapshot is to be taken."""
        if self._states is None:
            return sequence.remaining
        held, last = self._held[sequence], len(sequence.request.ids) - LAST_TOKENS
        stops = [SNAPSHOT_TOKENS * (sequence.computed // SNAPSHOT_TOKENS + 1), held.branch, len(sequence.ids)]
        if last - held.snapshot >= MIN_TOKENS:
            stops.append(last)
        return min(stop for stop in stops if stop > sequence.computed) - sequence.computed

    def reserve(self, sequence: TokenSequence, tokens: int) -> bool:
        """Take pages for the next ``tokens`` tokens of a sequence. Return whether there were enough; else take none."""
        held = self._held[sequence]
        missing = -(-(sequence.computed + tokens) // PAGE_TOKENS) - len(held.shared) - len(held.own)
        if missing > 0:
            pages = self._take(missing, held.pages)
            if not pages:
                return False
            held.own += pages
        return True

    def pages_of(self, sequence: TokenSequence) -> list[int]:
        """Return the numbers of a sequence's pages, from its first token on."""
        return self._held[sequence].pages

    def keep(self, sequence: TokenSequence) -> None:
        """Let other sequences find the full pages of a sequence, and a snapshot if one is to be taken now.

        Sets no other state of the sequence.
        """
        held = self._held[sequence]
        while self._keeps and held.own and PAGE_TOKENS * (len(held.shared) + 1) <= sequence.computed:
            self._add(sequence, held, PAGE_TOKENS)
        computed = sequence.computed
        if computed % SNAPSHOT_TOKENS == 0 or computed in (held.branch, len(sequence.request.ids) - LAST_TOKENS):
            self._take_snapshot(sequence, held)

    def end(self, sequence: TokenSequence, *, is_answered: bool = False) -> None:
        """Let other sequences find all pages of a sequence that has ended, and let them be evicted.

        ``is_answered``: whether the request has got an answer. If so, its pages are written to the disk, if there is a
        folder for them.
        """
        self.keep(sequence)
        self._take_snapshot(sequence, self._held[sequence])
        held = self._held.pop(sequence)
        self._tree.unpin(held.node)
        rest = sequence.computed - PAGE_TOKENS * len(held.shared)
        if rest > 0 and self._keeps:
            self._add(sequence, held, rest, pins=False)
        self._free.release(held.own)
        if is_answered and self._writer is not None:
            self._writer.save(sequence.request.user, held.node.path)

    def free_pages(self) -> int:
        """Return the number of pages that hold nothing."""
        return len(self._free)

    def _add(self, sequence: TokenSequence, held: _Held, count: int, *, pins: bool = True) -> None:
        begin = PAGE_TOKENS * len(held.shared)
        page = held.own.pop(0)
        node, unneeded = self._tree.add(held.node, sequence.ids[begin : begin + count], page)
        self._free.release(unneeded)
        if pins:
            self._tree.pin(node)
            self._tree.unpin(held.node)
        held.node = node
        held.shared.append(node.page)

    def _take_snapshot(self, sequence: TokenSequence, held: _Held) -> None:
        """Keep the state behind a sequence's computed tokens in the tree, if there is one and there is room.

        If the memory for that is missing, the sequence goes on without.
        """
        begin, end = PAGE_TOKENS * len(held.shared), sequence.computed
        if not self._keeps or self._states is None or end - held.snapshot < MIN_TOKENS:
            return
        count, copied = self._states.state_pages(sequence), int(end > begin)
        if not count:
            return
        if self._tree.use_snapshot(held.node, sequence.ids[begin:end]):
            held.snapshot = end
            return
        if self._obtainable() < count + copied:
            return
        self._evict_for(count + copied)
        held.snapshot = end
        pages = self._free.take_last(count + copied)
        try:
            self._states.save_state(sequence, pages[copied:])
            if copied:  # the sequence writes further tokens into its own page
                self._memory.copy_page(held.own[0], pages[0], end - begin)
        except Exception as error:
            self._free.release(pages)
            _log.warning("The state of a sequence is not kept: %s: %s", type(error).__name__, error)
            return
        node = held.node
        if copied:
            node, unneeded = self._tree.add(node, sequence.ids[begin:end], pages[0])
            self._free.release(unneeded)
        self._tree.add_snapshot(node, end - begin or PAGE_TOKENS, pages[copied:])

    def _obtainable(self, kept: Iterable[int] = ()) -> int:
        """Return the number of pages that are free or can be evicted, without those in ``kept``."""
        return self.size - len({page for held in self._held.values() for page in held.pages}.union(kept))

    def _take(self, count: int, before: list[int]) -> list[int]:
        """Return ``count`` pages to follow those in ``before``, or none if there are fewer, even with evicted ones."""
        return self._free.take(count, before[-1] if before else None) if self._evict_for(count) else []

    def _evict_for(self, count: int) -> bool:
        """Evict pages if fewer than ``count`` are free. Return whether there are so many then."""
        if len(self._free) < count:
            self._free.release(self._tree.evict(count - len(self._free)))
        if len(self._free) < count and self._fetch is not None and self._fetch.cancel():
            return self._evict_for(count)
        return len(self._free) >= count


def _reusable(sequence: TokenSequence) -> list[int]:
    """Return the first tokens of a sequence, those whose keys and values may be taken from another one."""
    return [] if sequence.request.scores_prompt else sequence.ids[:-1]
