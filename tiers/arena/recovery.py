"""What is whole in an arena that was taken back: proved by checksums, since its owner died at any moment."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.checksum import crc32c

from .arena import Arena


def intact_slots(arena: Arena, manifest: Manifest, threads: int) -> dict[int, ExpertKey]:
    """The slots whose records are whole, and whose they are: each of a key that belongs there, each key once."""
    plan = arena.plan
    claimed: dict[ExpertKey, int] = {}
    for region, first in zip(plan.regions, plan.first_slots, strict=True):
        for slot in range(first, first + region.slots):
            key = arena.directory.content(slot)
            if key is not None and manifest.blocks[key.block].array == region.array:
                claimed.setdefault(key, slot)
    pending = iter(list(claimed.items()))  # which the threads share: whichever is free takes the next

    def check() -> list[int]:
        return [slot for key, slot in pending if _is_whole(arena.whole(slot), key, manifest)]

    with ThreadPoolExecutor(threads, thread_name_prefix="moetier-recovery") as pool:
        checks = [pool.submit(check) for _ in range(threads)]
    whole = {slot for done in checks for slot in done.result()}
    return {slot: key for key, slot in claimed.items() if slot in whole}


def _is_whole(data: memoryview, key: ExpertKey, manifest: Manifest) -> bool:
    stored = int.from_bytes(data[-CHECKSUM_BYTES:], "little")
    if (known := manifest.checksums(key.block)) and known[key.expert] != stored:
        return False  # a moetier that did not know these has read it from a shard of another conversion
    return crc32c(data[:-CHECKSUM_BYTES]) == stored
