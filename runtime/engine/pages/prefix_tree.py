"""Prefix tree of pages: finds the keys and values of a prompt's first tokens by their token ids.

A page holds the keys and values of up to PAGE_TOKENS tokens in all layers. A node of the tree is a page, and its path
from the root has all tokens of the sequence up to there. So sequences that begin alike share pages. Only the last page
of a sequence has fewer than PAGE_TOKENS tokens; it is a leaf.

Some models have a state besides keys and values, from which a sequence continues. A snapshot is that state behind some
of a node's tokens. It lies in pages too, and belongs to the node.

As in SGLang's radix cache (Zheng et al. 2023, arXiv 2312.07104), but nodes are whole pages, so none is ever split.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from moetier.runtime.kernels.layer.pages import PAGE_TOKENS


@dataclass(eq=False, slots=True)
class StateSnapshot:
    """The state of a sequence behind some of its tokens."""

    pages: list[int]  # numbers of the pages in which it lies; none once it is no longer in the tree
    used: int  # time at which it was last matched or added

    def remove(self) -> list[int]:
        """Note that the snapshot is no longer in the tree, and return its pages."""
        pages, self.pages = self.pages, []
        return pages


@dataclass(eq=False, slots=True)
class Node:
    """A page in the tree. The root of a tree has no page."""

    tokens: tuple[int, ...]  # token ids of the page
    page: int  # number of the page; -1 in a root, and once the node is no longer in the tree
    parent: Node | None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)  # by their tokens
    pins: int = 0  # number of running sequences whose tokens continue after this node
    used: int = 0  # time at which the node was last matched or added
    snapshots: dict[int, StateSnapshot] = field(default_factory=dict)  # by how many of its tokens they are behind

    @property
    def is_full(self) -> bool:
        """Whether further pages may follow: the node is a root, or its page has PAGE_TOKENS tokens."""
        return self.parent is None or len(self.tokens) == PAGE_TOKENS

    @property
    def path(self) -> list[Node]:
        """The nodes from the root, which is left out, to this one."""
        path, node = list[Node](), self
        while node.parent is not None:
            path.append(node)
            node = node.parent
        return path[::-1]


@dataclass(frozen=True, slots=True)
class Match:
    """The longest prefix of some tokens that a tree has."""

    nodes: tuple[Node, ...]  # full pages, from the first token on
    partial: Node | None  # page whose first ``shared`` tokens follow; None: no further token
    shared: int
    snapshot: StateSnapshot | None = None  # the state behind the prefix, if it was asked for

    @property
    def tokens(self) -> int:
        """Length of the prefix."""
        return PAGE_TOKENS * len(self.nodes) + self.shared


class PrefixTree:
    """Trees of pages, one for each name: requests under one name find no pages of another's.

    A pinned node and its ancestors stay. All others may be evicted, the least recently used leaf or snapshot first.
    """

    def __init__(self) -> None:
        self._roots: dict[str, Node] = {}
        self._time = 0

    def match(self, name: str, ids: Sequence[int]) -> Match:
        """Return the longest prefix of ``ids`` in the tree ``name``, and note that its pages were used."""
        self._time += 1
        node, nodes = self.root(name), list[Node]()
        while (
            child := node.children.get(tuple(ids[PAGE_TOKENS * len(nodes) : PAGE_TOKENS * (len(nodes) + 1)]))
        ) and child.is_full:
            node = child
            node.used = self._time
            nodes.append(node)
        rest = tuple(ids[PAGE_TOKENS * len(nodes) : PAGE_TOKENS * (len(nodes) + 1)])
        partial = max(node.children.values(), key=lambda child: _common(child.tokens, rest), default=None)
        shared = 0 if partial is None else _common(partial.tokens, rest)
        if partial is None or not shared:
            return Match(tuple(nodes), None, 0)
        partial.used = self._time
        return Match(tuple(nodes), partial, shared)

    def pin(self, node: Node) -> None:
        """Keep a node and its ancestors until ``unpin`` is called as often as this."""
        node.pins += 1

    def unpin(self, node: Node) -> None:
        """Undo one ``pin``."""
        assert node.pins
        node.pins -= 1

    def match_state(self, name: str, ids: Sequence[int]) -> tuple[Match, int]:
        """Return the longest prefix of ``ids`` behind which there is a snapshot; and the length of ``match``'s prefix.

        Pages and snapshot of the prefix are noted as used.
        """
        match = self.match(name, ids)
        last, begin = match.nodes[-1] if match.nodes else self.root(name), PAGE_TOKENS * len(match.nodes)
        rest = ids[begin : begin + PAGE_TOKENS]
        candidates = [(len(match.nodes), child, _common(child.tokens, rest)) for child in last.children.values()]
        candidates += [(depth, node, PAGE_TOKENS) for depth, node in enumerate(match.nodes)]
        behind = [
            (depth, shared, node) for depth, node, common in candidates for shared in node.snapshots if shared <= common
        ]
        if not behind:
            return Match((), None, 0), match.tokens
        depth, shared, node = max(behind, key=lambda snapshot: snapshot[:2])
        node.used = node.snapshots[shared].used = self._time
        if shared == PAGE_TOKENS:
            return Match((*match.nodes[:depth], node), None, 0, node.snapshots[shared]), match.tokens
        return Match(match.nodes[:depth], node, shared, node.snapshots[shared]), match.tokens

    def root(self, name: str) -> Node:
        """Return the root of the tree ``name``, which is made if there is none."""
        return self._roots.setdefault(name, Node((), -1, None))

    def add(self, parent: Node, tokens: Sequence[int], page: int) -> tuple[Node, list[int]]:
        """Add a page after ``parent``, a full node. Return its node, and the pages that are not needed any more.

        If the tree has a page of these tokens already, the node stays, with ``page`` in its place unless a running
        sequence uses it. A leaf that has only some of the first of these tokens is replaced. The node gets its
        snapshots.
        """
        assert parent.is_full, "a page follows one that is not full"
        self._time += 1
        key = tuple(tokens)
        if (node := parent.children.get(key)) is not None:
            node.used = self._time
            if _is_held(node):
                return node, [page]
            # that of the sequence that runs, as pages with consecutive numbers are read fastest
            earlier, node.page = node.page, page
            return node, [earlier]
        replaced = [
            child
            for length in range(1, len(key))
            if (child := parent.children.get(key[:length])) is not None and not child.pins
        ]
        node, unneeded = Node(key, page, parent, used=self._time), list[int]()
        parent.children[key] = node
        for child in replaced:
            unneeded.append(self.remove(child))
            for count, state in child.snapshots.items():
                if node.snapshots.setdefault(count, state) is not state:  # another one has it, too
                    unneeded += state.remove()
        return node, unneeded

    def use_snapshot(self, node: Node, rest: Sequence[int]) -> bool:
        """Return whether there is a snapshot behind ``rest``, the tokens after a full node, and note that it was used.

        If there are none after it, the snapshot is the node's own.
        """
        self._time += 1
        candidates, tokens = (node.children.values(), len(rest)) if rest else ([node], PAGE_TOKENS)
        for candidate in candidates:
            if tokens in candidate.snapshots and candidate.tokens[: len(rest)] == tuple(rest):
                candidate.used = candidate.snapshots[tokens].used = self._time
                return True
        return False

    def add_snapshot(self, node: Node, tokens: int, pages: list[int]) -> None:
        """Add the state behind the first ``tokens`` tokens of a node, which has none yet, in ``pages``."""
        assert tokens not in node.snapshots
        node.snapshots[tokens] = StateSnapshot(pages, self._time)

    def remove(self, node: Node) -> int:
        """Remove a leaf that is not pinned, and return the number of its page."""
        assert _is_evictable(node)
        assert node.parent is not None
        del node.parent.children[node.tokens]
        page, node.page = node.page, -1
        return page

    def evict(self, count: int) -> list[int]:
        """Remove ``count`` pages that are not pinned, if there are so many, and return their numbers.

        May return more than ``count``: a snapshot's pages go together.
        """
        # leaves, and snapshots with the number of tokens before them
        oldest = [(node.used, id(node), node, 0) for node in self._nodes() if _is_evictable(node)]
        oldest += [
            (state.used, id(state), node, tokens) for node in self._nodes() for tokens, state in node.snapshots.items()
        ]
        heapq.heapify(oldest)
        pages = list[int]()
        while oldest and len(pages) < count:
            _, _, node, tokens = heapq.heappop(oldest)
            if tokens:
                pages += _remove_snapshot(node, tokens)
                continue
            pages.append(self.remove(node))
            for behind in [*node.snapshots]:
                pages += _remove_snapshot(node, behind)
            if node.parent is not None and _is_evictable(node.parent):
                heapq.heappush(oldest, (node.parent.used, id(node.parent), node.parent, 0))
        self._roots = {name: root for name, root in self._roots.items() if root.children or root.pins}
        return pages

    def pages(self) -> list[int]:
        """Return the numbers of all pages."""
        states = [state for node in self._nodes() for state in node.snapshots.values()]
        return [*(node.page for node in self._nodes()), *(page for state in states for page in state.pages)]

    def _nodes(self) -> Iterator[Node]:
        return (node for node in _below(*self._roots.values()) if node.parent is not None)


def _is_evictable(node: Node) -> bool:
    return node.parent is not None and not node.children and not node.pins


def _remove_snapshot(node: Node, tokens: int) -> list[int]:
    """Remove a snapshot, if the node still has it, and return its pages."""
    state = node.snapshots.pop(tokens, None)
    return [] if state is None else state.remove()


def _is_held(node: Node) -> bool:
    """Return whether a running sequence uses the page of a node."""
    return any(below.pins for below in _below(node))


def _below(*nodes: Node) -> Iterator[Node]:
    """Yield nodes and all that follow them."""
    waiting = [*nodes]
    while waiting:
        node = waiting.pop()
        waiting += node.children.values()
        yield node


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    pairs = zip(some, others, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(some), len(others)))
