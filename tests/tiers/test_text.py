"""Texts for people."""

from __future__ import annotations

import pytest

from moetier.tiers.text import format_bytes, some


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (1 << 20, "1 MiB"), (5 << 40, "5 TiB"), (3 << 29, "1.5 GiB")]
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_of_many_names_three_are_shown() -> None:
    assert some(["b", "a"]) == "a, b"
    assert some("edcba") == "a, b, c and 2 more"
