from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from moetier.tiers.host.wishes import Wishes
from moetier.tiers.layout import ExpertKey


def keys(block: int, *experts: int) -> list[ExpertKey]:
    return [ExpertKey(block, expert) for expert in experts]


def replace(wishes: Wishes[str], wisher: str, block: int, place: str, wanted: list[ExpertKey]) -> int:
    """None of them is there already."""
    return wishes.replace(wisher, block, place, wanted, wanted)


def taken(wishes: Wishes[str], count: int = 100, *, closed: Sequence[str] = ()) -> list[ExpertKey]:
    """As a loader takes them: one at a time, each of which is begun."""
    found: list[ExpertKey] = []
    while len(found) < count:
        for wisher, _, key in wishes.take(lambda place: place not in closed):
            wishes.served(wisher)
            found.append(key)
            break
        else:
            break
    return found


def test_a_wishers_blocks_in_their_order_and_wishers_by_turns() -> None:
    wishes: Wishes[str] = Wishes()
    replace(wishes, "a", 1, "", keys(1, 5, 6))
    replace(wishes, "a", 2, "", keys(2, 7))
    replace(wishes, "b", 3, "", keys(3, 8, 9))
    assert taken(wishes) == [*keys(1, 5), *keys(3, 8), *keys(1, 6), *keys(3, 9), *keys(2, 7)]
    assert not wishes


def test_the_latest_are_the_wishes() -> None:
    wishes: Wishes[str] = Wishes()
    assert replace(wishes, "a", 1, "", keys(1, 5, 6, 7)) == 0
    assert taken(wishes, 1) == keys(1, 5)
    assert replace(wishes, "a", 1, "", keys(1, 7, 8)) == 1, "only the 6 was waiting and is not wished any more"
    assert taken(wishes) == keys(1, 7, 8)
    assert all(key in wishes for key in keys(1, 7, 8)), "until they are replaced"
    assert not any(key in wishes for key in keys(1, 5, 6))
    assert replace(wishes, "a", 1, "", []) == 0
    assert not any(key in wishes for key in keys(1, 7, 8))


def test_where_nothing_may_go_wishes_wait() -> None:
    wishes: Wishes[str] = Wishes()
    replace(wishes, "a", 1, "small", keys(1, 5))
    replace(wishes, "a", 2, "large", keys(2, 6))
    assert taken(wishes, closed=["small"]) == keys(2, 6)
    assert wishes
    assert taken(wishes) == keys(1, 5)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("replace"), st.sampled_from("abc"), st.integers(0, 2), st.lists(st.integers(0, 4))),
        st.tuples(st.just("withdraw"), st.sampled_from("abc"), st.just(0), st.just([])),
        st.tuples(st.just("take"), st.just(""), st.just(0), st.just([])),
    ),
    max_size=40,
)


@given(ACTIONS)
def test_nothing_is_lost_and_nothing_comes_twice(actions: list[tuple[str, str, int, list[int]]]) -> None:
    wishes: Wishes[str] = Wishes()
    waiting: dict[tuple[str, int], list[ExpertKey]] = {}
    latest: dict[tuple[str, int], list[ExpertKey]] = {}
    for action, wisher, block, experts in actions:
        if action == "replace":
            wanted = list(dict.fromkeys(keys(block, *experts)))
            before = waiting.get((wisher, block), [])
            absent = [key for key in wanted if key.expert]  # the 0 is there
            assert wishes.replace(wisher, block, "", wanted, absent) == len(set(before) - set(wanted))
            latest[wisher, block] = wanted
            waiting[wisher, block] = absent
        elif action == "withdraw":
            given_up = sum(len(found) for place, found in waiting.items() if place[0] == wisher)
            assert wishes.withdraw(wisher) == given_up
            waiting = {place: found for place, found in waiting.items() if place[0] != wisher}
            latest = {place: found for place, found in latest.items() if place[0] != wisher}
        else:
            for whose, _, key in wishes.take(lambda place: True):
                wishes.served(whose)
                assert waiting[str(whose), key.block].pop(0) == key
                break
        assert len(wishes) == sum(map(len, waiting.values()))
        every = {key for found in latest.values() for key in found}
        assert all((ExpertKey(b, e) in wishes) == (ExpertKey(b, e) in every) for b in range(3) for e in range(5))
    left = taken(wishes)
    assert sorted(left) == sorted(key for found in waiting.values() for key in found)
