"""Free pages are given out next to one another where that is possible."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moetier.runtime.engine.pages.free_pages import FreePages


def test_a_sequence_gets_consecutive_pages() -> None:
    free = FreePages(10)
    first = free.take(3, None)
    assert first == [*range(first[0], first[0] + 3)]
    assert free.take(2, first[-1]) == [first[-1] + 1, first[-1] + 2]
    assert len(free) == 5


def test_another_sequence_begins_where_the_first_has_room_to_continue() -> None:
    free = FreePages(10)
    (first,) = free.take(1, None)
    (second,) = free.take(1, None)
    assert second > first + 1
    assert free.take(1, first) == [first + 1]


def test_a_sequence_continues_elsewhere_if_the_next_page_is_taken() -> None:
    free = FreePages(4)
    pages = free.take(4, None)
    free.release([pages[0], pages[2]])
    assert sorted(free.take(2, pages[3])) == sorted([pages[0], pages[2]])
    assert not len(free)


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=40))
def test_each_page_is_taken_once(operations: list[tuple[int, bool]]) -> None:
    free, held = FreePages(12), list[list[int]]()
    for count, takes in operations:
        if takes and count <= len(free):
            held.append(free.take(count, held[-1][-1] if held else None))
        elif held:
            free.release(held.pop(0))
        taken = [page for pages in held for page in pages]
        assert len({*taken}) == len(taken) == 12 - len(free)
        assert {*taken} <= {*range(12)}
