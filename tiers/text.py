"""Texts for people: amounts of memory, and lists of names."""

from __future__ import annotations

from collections.abc import Iterable


def format_bytes(count: float) -> str:
    """Format a number of bytes for people: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def some(names: Iterable[str]) -> str:
    """Format ``names`` for a user: at most three of them, and the number of the others."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
