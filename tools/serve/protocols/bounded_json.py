"""Parse JSON of clients. What would take long, or much memory, is refused before it is parsed.

Python's parser stops all other threads while it works. It takes seconds for 16 MiB of short values, and a tenth of a
second for the largest text that is accepted here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

MAX_VALUES = 1 << 16  # maximum number of commas, colons and opening brackets: a limit on the number of values
MAX_DEPTH = 100  # maximum number of arrays and objects inside each other
MAX_DIGITS = 400  # maximum number of digits of an integer; a float has fewer than 400 before its point
PIECE = 1 << 18  # bytes that are scanned at a time; between two pieces, other threads may run

STRUCTURE = b"[]{},:"
NO_STRUCTURE = bytes(set(range(256)) - set(STRUCTURE))


class BoundedJson:
    """Parse texts that have at most ``most`` values together."""

    def __init__(self, most: int = MAX_VALUES) -> None:
        self._most = self._left = most

    def parse(self, content: bytes) -> Any:
        """Return the value of ``content``, which is JSON in UTF-8.

        Raises ValueError if it is not, and its subclass BoundsError if it has too many values, too many levels or too
        long integers.
        """
        depth = 0
        for structure in _structure(content, self._left):
            self._left -= len(structure) - structure.count(b"]") - structure.count(b"}")
            if self._left < 0:
                raise BoundsError(f"it has more than {self._most:,} values")
            for byte in structure:
                depth += (byte in b"[{") - (byte in b"]}")
                if depth < 0:
                    raise ValueError("it closes more than it opens")
                if depth > MAX_DEPTH:
                    raise BoundsError(f"it is nested more than {MAX_DEPTH} levels deep")
        return json.loads(content.decode("utf-8-sig"), parse_int=_integer)


class BoundsError(ValueError):
    """JSON that takes too long to parse. The message begins with "it"."""


def _structure(content: bytes, most: int) -> Iterator[bytes]:
    """Yield the bytes of STRUCTURE that are outside of strings, piece by piece.

    Raises BoundsError if a piece has more than ``most`` strings.
    """
    is_string, carried = False, b""
    for start in range(0, len(content), PIECE):
        piece = (carried + content[start : start + PIECE]).replace(b"\\\\", b"")
        carried = b"\\" if piece.endswith(b"\\") else b""  # it escapes the first byte of the next piece
        piece = piece.removesuffix(carried).replace(b'\\"', b"")
        if piece.count(b'"') > 2 * (most + 2):
            raise BoundsError("it has too many strings")
        parts = piece.split(b'"')
        yield b"".join(parts[is_string::2]).translate(None, NO_STRUCTURE)
        is_string ^= len(parts) % 2 == 0


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise BoundsError(f"it has an integer of more than {MAX_DIGITS} digits")
    return int(digits)
