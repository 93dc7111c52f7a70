"""Checked access to the fields of a JSON document. Errors name the path of the wrong field."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Iterator
from typing import Any

SHOWN = 80  # largest number of characters of a value in an error message

_repr = reprlib.Repr()
_repr.maxlevel = 2
_repr.maxstring = _repr.maxother = _repr.maxlong = SHOWN


def shown(value: object) -> str:
    """Return a text for a value in an error message. It is short even if the value is long or deeply nested."""
    return _repr.repr(value)


class Fields:
    """A JSON value and its path in the document, for example "blocks[3].experts".

    Each method raises ValueError if the value does not have the type that the method returns. The message names the
    path.
    """

    __slots__ = ("path", "value")

    def __init__(self, value: Any, path: str = "") -> None:
        self.value = value
        self.path = path

    def __getitem__(self, name: str) -> Fields:
        """Return the member ``name`` of a JSON object. Raises ValueError if the object has no such member."""
        if (member := self.get(name)) is None:
            raise ValueError(f"{self._member(name)} is missing")
        return member

    def get(self, name: str) -> Fields | None:
        """Return the member ``name`` of a JSON object, or None if the object has no such member."""
        members = self._of(dict, "an object")
        return Fields(members[name], self._member(name)) if name in members else None

    def members(self) -> Iterator[tuple[str, Fields]]:
        """Yield the name and the value of each member of a JSON object."""
        return ((name, Fields(value, self._member(name))) for name, value in self._of(dict, "an object").items())

    def items(self, most: int | None = None) -> list[Fields]:
        """Return the items of a list. Raises ValueError if there are more than ``most``, unless ``most`` is None."""
        values = self._of(list, "a list")
        if most is not None and len(values) > most:
            raise ValueError(f"{self.path} has {len(values):,} items, more than {most}")
        return [Fields(value, f"{self.path}[{i}]") for i, value in enumerate(values)]

    def text(self, pattern: str = r"[^\ud800-\udfff]*", what: str = "a text") -> str:
        """Return the string. Raises ValueError unless the whole string matches ``pattern``.

        ``what`` describes the expected string in the message. The default pattern matches every string without
        surrogates.
        """
        string: str = self._of(str, what)
        return string if re.fullmatch(pattern, string, re.DOTALL) else self._fail(what)

    def number(self, least: int, most: int) -> int:
        """Return the whole number. Raises ValueError unless it is from ``least`` to ``most``."""
        fits = type(self.value) is int and least <= self.value <= most
        return int(self.value) if fits else self._fail(f"a whole number from {least:,} to {most:,}")

    def flag(self) -> bool:
        """Return the boolean."""
        return bool(self._of(bool, "true or false"))

    def among(self, allowed: Collection[Any]) -> Any:
        """Return the value. Raises ValueError unless it equals one of ``allowed`` and has its type: 1 is not True."""
        for value in allowed:
            if type(value) is type(self.value) and value == self.value:
                return value
        names = " or ".join(map(shown, allowed))
        raise ValueError(f"{self.path} is {shown(self.value)}, not {names}")

    def equals(self, expected: Any, why: str) -> None:
        """Raise ValueError unless the value equals ``expected``.

        The message names the first field that differs, and ends with ``why``.
        """
        if isinstance(expected, dict):
            for name, value in expected.items():
                self[name].equals(value, why)
            for name, member in self.members():
                if name not in expected:
                    raise ValueError(f"{member.path} is an unknown field: {why}")
        elif isinstance(expected, list):
            items = self.items()
            for item, value in zip(items, expected, strict=False):
                item.equals(value, why)
            if len(items) != len(expected):
                raise ValueError(f"{self.path} has {len(items)} items, not {len(expected)}: {why}")
        elif type(self.value) is not type(expected) or self.value != expected:
            raise ValueError(f"{self.path} is {shown(self.value)}, not {shown(expected)}: {why}")

    def _member(self, name: str) -> str:
        name = name if len(name) <= SHOWN else f"{name[:SHOWN]}..."
        return f"{self.path}.{name}" if self.path else name

    def _of(self, json_type: type, what: str) -> Any:
        return self.value if isinstance(self.value, json_type) else self._fail(what)

    def _fail(self, what: str) -> Any:
        raise ValueError(f"{self.path} is {shown(self.value)}, not {what}")
