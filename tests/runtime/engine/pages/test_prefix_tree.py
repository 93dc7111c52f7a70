"""A prefix tree finds pages by the tokens up to their end, and evicts only what no sequence continues."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import example, given
from hypothesis import strategies as st

from moetier.runtime.engine.pages.prefix_tree import Node, PrefixTree
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS


def add_all(tree: PrefixTree, ids: Sequence[int], first_page: int, name: str = "") -> tuple[list[Node], list[int]]:
    """Add pages with the tokens of a sequence. Return their nodes, and the pages that the tree does not need."""
    nodes, unneeded = [tree.root(name)], list[int]()
    for page, begin in enumerate(range(0, len(ids), PAGE_TOKENS), first_page):
        node, more = tree.add(nodes[-1], ids[begin : begin + PAGE_TOKENS], page)
        nodes.append(node)
        unneeded += more
    return nodes[1:], unneeded


def test_a_match_is_the_longest_prefix_up_to_a_token() -> None:
    tree = PrefixTree()
    add_all(tree, [*range(2 * PAGE_TOKENS + 10)], 0)
    match = tree.match("", [*range(2 * PAGE_TOKENS + 4), 999])
    assert ([node.page for node in match.nodes], match.shared) == ([0, 1], 4)
    assert match.partial is not None
    assert match.partial.page == 2
    assert match.tokens == 2 * PAGE_TOKENS + 4
    assert tree.match("other", [*range(100)]).tokens == 0, "another name has another tree"


def test_the_same_tokens_keep_one_page() -> None:
    tree, ids = PrefixTree(), [*range(PAGE_TOKENS)]
    (node,), _ = add_all(tree, ids, 0)
    assert add_all(tree, ids, 5)[1] == [0], "the page of the sequence that runs replaces the other one"
    tree.pin(node)
    assert add_all(tree, ids, 7)[1] == [7], "unless a sequence uses that"
    assert tree.pages() == [5]


def test_a_longer_page_replaces_the_page_that_it_begins_with() -> None:
    tree = PrefixTree()
    add_all(tree, [*range(10)], 0)
    assert add_all(tree, [*range(30)], 1)[1] == [0]
    assert add_all(tree, [*range(5), 77], 2)[1] == [], "tokens that differ are another page"


def test_leaves_are_evicted_first_and_pinned_nodes_not_at_all() -> None:
    tree = PrefixTree()
    nodes, _ = add_all(tree, [*range(3 * PAGE_TOKENS)], 0)
    add_all(tree, [7] * PAGE_TOKENS, 3)
    tree.match("", [*range(3 * PAGE_TOKENS)])
    tree.pin(nodes[1])
    assert tree.evict(9) == [3, 2], "the page that was used least recently, and then the end of the other sequence"
    assert tree.evict(9) == []
    tree.unpin(nodes[1])
    assert tree.evict(1) == [1]
    assert tree.evict(9) == [0]


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 1), min_size=1, max_size=4),  # of each page: which of two tokens it repeats
            st.sampled_from([1, 20, 40, PAGE_TOKENS]),  # tokens of the last page
            st.integers(0, 2),  # pages of a snapshot behind them
            st.sampled_from([0, 0, 0, 1, 3]),  # pages to evict
        ),
        max_size=20,
    )
)
@example([([0], 1, 1, 0), ([0], 20, 0, 0), ([0], 1, 1, 0), ([0], 40, 0, 0)])  # two replaced pages have a snapshot each
def test_what_is_matched_was_added_and_no_page_is_lost(operations: list[tuple[list[int], int, int, int]]) -> None:
    tree, added, page, gone = PrefixTree(), set[tuple[int, ...]](), 0, list[int]()
    for tokens, length, size, evicted in operations:
        ids = [token for token in tokens for _ in range(PAGE_TOKENS)][: PAGE_TOKENS * (len(tokens) - 1) + length]
        nodes, unneeded = add_all(tree, ids, page)
        gone += unneeded
        page += len(tokens)
        if size and length not in nodes[-1].snapshots:
            tree.add_snapshot(nodes[-1], length, [*range(page, page + size)])
            page += size
        added |= {tuple(ids[:end]) for end in range(1, len(ids) + 1)}
        gone += tree.evict(evicted)
        match = tree.match("", ids)
        assert not match.tokens or tuple(ids[: match.tokens]) in added
        assert sorted(gone + tree.pages()) == [*range(page)]
