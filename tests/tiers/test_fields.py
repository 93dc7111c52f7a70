"""Fields of JSON documents: a wrong one is named by its place, in a short message."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moetier.tiers.fields import SHOWN, Fields, shown

DOCUMENT = Fields({"blocks": [{"experts": 4}, {"experts": "four"}], "name": "x", "direct": True})


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: DOCUMENT["blocks"].items()[1]["experts"].number(1, 9), r"blocks[1].experts is 'four', not a whole"),
        (lambda: DOCUMENT["blocks"].items()[0]["experts"].number(5, 9), "blocks[0].experts is 4, not a whole number"),
        (lambda: DOCUMENT["direct"].number(0, 1), "direct is True, not a whole number from 0 to 1"),
        (lambda: DOCUMENT["direct"].among([1, 0]), "direct is True, not 1 or 0"),
        (lambda: DOCUMENT["name"].flag(), "name is 'x', not true or false"),
        (lambda: DOCUMENT["name"].text("[a-f]*", "a colour"), "name is 'x', not a colour"),
        (lambda: DOCUMENT["name"]["deeper"], "name is 'x', not an object"),
        (lambda: DOCUMENT["blocks"].items(1), "blocks has 2 items, more than 1"),
        (lambda: DOCUMENT["bits"], "bits is missing"),
        (lambda: DOCUMENT["blocks"].items()[0]["top_k"], "blocks[0].top_k is missing"),
    ],
)
def test_a_wrong_field_is_named(read: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        read()
    assert str(caught.value).startswith(message)


def test_a_right_field_is_returned() -> None:
    assert [block["experts"].value for block in DOCUMENT["blocks"].items(2)] == [4, "four"]
    assert DOCUMENT["blocks"].items()[0]["experts"].number(4, 4) == 4
    assert DOCUMENT["name"].text("[x-z]") == "x"
    assert DOCUMENT["direct"].flag() is True
    assert DOCUMENT.get("bits") is None
    assert [name for name, _ in DOCUMENT.members()] == ["blocks", "name", "direct"]


def test_the_first_field_that_differs_is_named() -> None:
    value = {"a": [1, {"b": 2.0}], "c": None}
    Fields(value).equals({"a": [1, {"b": 2.0}], "c": None}, "why")
    for other, message in (
        ({"a": [1, {"b": 2}], "c": None}, "a[1].b is 2.0, not 2: why"),
        ({"a": [1], "c": None}, "a has 2 items, not 1: why"),
        ({"a": [1, {"b": 2.0}]}, "c is an unknown field: why"),
    ):
        with pytest.raises(ValueError, match="why") as caught:
            Fields(value).equals(other, "why")
        assert str(caught.value) == message


def test_messages_stay_short() -> None:
    deep: object = "x" * 10_000
    for _ in range(50):
        deep = [deep] * 50
    for value in (deep, "y" * 10_000, 10**4_000, {"z" * 10_000: 1}):
        assert len(shown(value)) < 20 * SHOWN
    with pytest.raises(ValueError, match="is missing") as caught:
        Fields({}, "here")["n" * 10_000]
    assert len(str(caught.value)) < 2 * SHOWN


def test_texts_with_half_a_surrogate_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="not a text"):
        Fields("a\ud800").text()
