"""Share: of the records that a process was given, those that came from one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    place: str  # for people
    records: int
    bytes: int
    away: str = ""  # of a daemon that is not there now: why
    lost: int = 0  # times that it went away
