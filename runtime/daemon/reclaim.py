"""Reclaim arenas: take over the memory files that a dead daemon has left, with the records in them.

A daemon's memory file outlives the daemon if a client or systemd has it open.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moetier.tiers.arena.arena import NAME, Arena
from moetier.tiers.arena.directory import ArenaHeader
from moetier.tiers.errors import ArenaError
from moetier.tiers.manifest import Manifest

_LINK = f"/memfd:{NAME}"
_POLL = 0.02  # seconds


@dataclass(frozen=True, slots=True)
class ReclaimedArena:
    """An arena that this process has taken over. ``holder`` says, for the log, what kept it open."""

    arena: Arena
    holder: str


def reclaim_arenas(
    manifests: Mapping[str, Manifest],
    closing: contextlib.ExitStack,
    passed: Iterable[tuple[str, int]] = (),
    *,
    timeout: float = 0.0,
) -> dict[str, list[ReclaimedArena]]:
    """Reclaim arenas of the stores in ``manifests``, a dictionary from digests to manifests.

    Returns a dictionary from digests to arenas, the fullest first. ``closing`` will close them. Arenas are looked for
    among the open files of this user's other processes and in ``passed``: pairs of a holder's name and a descriptor,
    which the caller has to close.
    A daemon that is being killed may still lock its arenas, so locked arenas are tried again for ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    candidates: dict[str, list[ReclaimedArena]] = {}
    seen: set[tuple[int, int]] = set()  # files that need not be examined again
    while True:
        locked = False
        with contextlib.ExitStack() as descriptors:
            for holder, descriptor in [*passed, *_held_by_processes(descriptors)]:
                if (file := _identity(os.fstat(descriptor))) is None or file in seen:
                    continue
                seen.add(file)
                try:
                    digest = ArenaHeader.read(descriptor).digest
                except (ArenaError, OSError):  # an arena of another version, or no arena
                    continue
                if digest in manifests:
                    try:
                        arena = Arena.reclaim(descriptor, manifests[digest])
                    except ArenaError:  # its daemon still runs, or its slots are laid out in another way
                        locked = True
                        seen.discard(file)
                    else:
                        closing.callback(arena.close)
                        candidates.setdefault(digest, []).append(ReclaimedArena(arena, holder))
        if len(candidates) == len(manifests) or not locked or time.monotonic() >= deadline:
            break
        time.sleep(_POLL)
    for arenas in candidates.values():
        arenas.sort(key=lambda reclaimed: reclaimed.arena.directory.ready, reverse=True)
    return candidates


def _identity(status: os.stat_result) -> tuple[int, int] | None:
    """Return the device and inode of a file; None if another user owns the file."""
    return (status.st_dev, status.st_ino) if status.st_uid == os.getuid() else None


def _held_by_processes(closing: contextlib.ExitStack) -> Iterator[tuple[str, int]]:
    """Yield (holder's name, descriptor) for each arena that another process of this user has open.

    ``closing`` will close the descriptors.
    """
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # the process has ended, or may not be inspected
            if process.stat().st_uid != os.getuid():
                continue
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(link).startswith(_LINK):  # noqa: PTH115 - the target is no path
                        descriptor = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
                        closing.callback(os.close, descriptor)
                        yield f"process {process.name}", descriptor
