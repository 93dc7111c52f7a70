"""Texts of others as a terminal may have them: a name of another host must not move its cursor, or write to it."""

from __future__ import annotations


def plain(text: str) -> str:
    """In one line, of what can be read; "?" for all else, the beginning of an escape sequence among it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
