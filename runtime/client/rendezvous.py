"""Rendezvous hashing (Thaler & Ravishankar 1998, "Using name-based mappings to increase hit rates"): whom to ask first.

All who use it agree, and one that goes or comes moves its own keys alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import TypeVar

from moetier.tiers.layout import ExpertKey

Name = TypeVar("Name", bound=str)


def rendezvous(names: Iterable[Name], key: ExpertKey) -> list[Name]:
    """``names`` in a key's own order."""
    place = b"%d/%d/" % key
    return sorted(names, key=lambda name: blake2b(place + name.encode(), digest_size=8).digest())
