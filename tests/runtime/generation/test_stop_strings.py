from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moetier.runtime.generation.stop_strings import StopStrings

TEXT = st.text("abc", max_size=12)


@given(st.lists(TEXT, max_size=6), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_where_the_first_string_begins(pieces: list[str], strings: list[str]) -> None:
    stops, passed = StopStrings(strings), []
    for piece in [*pieces, None]:
        passed += stops.feed(piece)
    text = "".join(pieces)
    places = [at for at in map(text.find, strings) if at >= 0]
    assert "".join(passed[:-1]) == text[: min(places, default=len(text))]
    assert passed[-1] is None
    assert stops.is_over
    assert stops.feed("more") == []


def test_what_can_be_no_beginning_is_passed_on_at_once() -> None:
    stops = StopStrings(["\n\nUser:"])
    assert stops.feed("Sì.\n") == ["Sì."]
    assert stops.feed("\nUs") == []
    assert stops.feed("o di") == ["\n\nUso di"]


def test_other_things_come_in_their_turn() -> None:
    class Reasoning(str):
        __slots__ = ()

    stops, thought = StopStrings(["ab"]), Reasoning("ab")
    assert stops.feed("xa") == ["x"]
    assert stops.feed(thought) == ["a", thought]
    assert stops.feed("b") == ["b"]
    assert stops.feed("ab") == [None]
