"""What is whole in an arena that was taken back: proved by checksums, since its owner died at any moment."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np

from .arena import Arena
from .keys import CHECKSUM_BYTES, ExpertKey
from .manifest import Manifest

_RUN = 16  # slots that one thread takes at a time


def intact_slots(arena: Arena, manifest: Manifest, threads: int) -> dict[int, ExpertKey]:
    """The slots whose records are whole, and whose they are: each of a key that belongs there, each key once."""
    plan = arena.plan
    claimed: dict[ExpertKey, int] = {}
    for region, first in zip(plan.regions, plan.first_slots, strict=True):
        for slot in range(first, first + region.slots):
            key = arena.directory.content(slot)
            if key is not None and manifest.blocks[key.block].array == region.array:
                claimed.setdefault(key, slot)
    slots = {slot: key for key, slot in claimed.items()}
    numbers = list(slots)
    runs = [numbers[start : start + _RUN] for start in range(0, len(numbers), _RUN)]
    with ThreadPoolExecutor(threads, thread_name_prefix="moetier-recovery") as pool:
        whole = {slot for run in pool.map(lambda run: _whole(arena, run), runs) for slot in run}
    return {slot: key for slot, key in slots.items() if slot in whole}


def _whole(arena: Arena, slots: Iterable[int]) -> list[int]:
    found = []
    for slot in slots:
        data = np.frombuffer(arena.whole(slot), np.uint8)
        stored = int.from_bytes(data[-CHECKSUM_BYTES:].tobytes(), "little")
        if google_crc32c.value(data[:-CHECKSUM_BYTES]) == stored:
            found.append(slot)
    return found
