"""JSON of clients: what is parsed, and what is refused before."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette", reason='pip install ".[serve]"')

from moetier.tools.serve.protocols import bounded_json
from moetier.tools.serve.protocols.bounded_json import MAX_DEPTH, MAX_DIGITS, MAX_VALUES, BoundedJson, BoundsError

HARD = st.text(alphabet='\\"[]{},:a\u0122\U0001f600\n', max_size=30)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | HARD,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(HARD, inner, max_size=5),
    max_leaves=10,
)


def size(value: Any) -> int:
    """Commas, colons and opening brackets."""
    if isinstance(value, dict):
        return 1 + max(2 * len(value) - 1, 0) + sum(map(size, value.values()))
    return 1 + max(len(value) - 1, 0) + sum(map(size, value)) if isinstance(value, list) else 0


@settings(max_examples=50)
@given(VALUES, st.booleans(), st.integers(1, 9))
def test_values_are_those_of_python_and_counted(value: Any, ascii_only: bool, piece: int) -> None:
    content = json.dumps(value, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as change:
        change.setattr(bounded_json, "PIECE", piece)
        assert BoundedJson(size(value)).parse(content) == value
        with pytest.raises(BoundsError):
            BoundedJson(size(value) - 1).parse(content)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"]", b'["]', b"\\", b'[\\"]', b"\xff", b'"\xc3', "[]".encode("utf-16"), b"[1] 2", b'{"a"}']
)
def test_what_is_no_json_is_an_error(content: bytes) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        BoundedJson().parse(content)
    assert not isinstance(raised.value, BoundsError)


def test_limits_are_exact() -> None:
    for content in (
        b"[" * MAX_DEPTH + b"]" * MAX_DEPTH,
        b"1" * MAX_DIGITS,
        b"[" + b"1," * (MAX_VALUES - 1) + b"1]",
    ):
        assert BoundedJson().parse(content)
    for content, why in (
        (b"[" * (MAX_DEPTH + 1), "levels"),
        (b"1" * (MAX_DIGITS + 1), "digits"),
        (b"[" + b"1," * MAX_VALUES + b"1]", "values"),
        (b'"a"' * (MAX_VALUES + 3), "strings"),
    ):
        with pytest.raises(BoundsError, match=why):
            BoundedJson().parse(content)


def test_several_texts_have_one_limit() -> None:
    texts = BoundedJson(4)
    assert texts.parse(b"[1, 2]") == [1, 2]
    assert texts.parse(b"[3, 4]") == [3, 4]
    with pytest.raises(BoundsError, match="more than 4 values"):
        texts.parse(b"[5, 6]")
