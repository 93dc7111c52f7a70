"""Arenas whose owner is dead, still full: in the hands of its clients, or of systemd."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moetier.tiers.arena.arena import NAME, Arena
from moetier.tiers.arena.directory import Header
from moetier.tiers.errors import ArenaError
from moetier.tiers.manifest import Manifest

_LINK = f"/memfd:{NAME}"
_POLL = 0.02  # seconds


@dataclass(frozen=True, slots=True)
class Leftover:
    """An arena that was taken back, and is this process's to close; ``holder`` had kept it."""

    arena: Arena
    holder: str

    @property
    def filled(self) -> int:
        """How many of its slots hold a record, as its directory says."""
        content = self.arena.directory.content
        return sum(content(slot) is not None for slot in range(self.arena.plan.slots))


def find_leftovers(
    manifests: Mapping[str, Manifest], passed: Iterable[tuple[str, int]] = (), *, patience: float = 0.0
) -> dict[str, list[Leftover]]:
    """By digest, of the stores in ``manifests``, the fullest first. ``passed`` are descriptors (with names of who kept
    them) to be looked at beside those that other processes of this user hold; they stay the caller's.

    An owner who is being killed may need a moment yet: its arenas are tried again for ``patience`` seconds.
    """
    deadline = time.monotonic() + patience
    found: dict[str, list[Leftover]] = {}
    seen: set[tuple[int, int]] = set()  # files that need not be looked at again
    while True:
        locked = False
        with contextlib.ExitStack() as closing:
            for holder, descriptor in [*passed, *_held_by_processes(closing)]:
                if (file := _identity(os.fstat(descriptor))) is None or file in seen:
                    continue
                seen.add(file)
                try:
                    digest = Header.read(descriptor).digest
                except (ArenaError, OSError):  # none of this version's, or none at all
                    continue
                if digest in manifests:
                    try:
                        arena = Arena.reclaim(descriptor, manifests[digest])
                    except ArenaError:  # its owner lives, or it is divided otherwise
                        locked = True
                        seen.discard(file)
                    else:
                        found.setdefault(digest, []).append(Leftover(arena, holder))
        if len(found) == len(manifests) or not locked or time.monotonic() >= deadline:
            break
        time.sleep(_POLL)
    for leftovers in found.values():
        leftovers.sort(key=lambda leftover: leftover.filled, reverse=True)
    return found


def _identity(found: os.stat_result) -> tuple[int, int] | None:
    """Of a file of this user's."""
    return (found.st_dev, found.st_ino) if found.st_uid == os.getuid() else None


def _held_by_processes(closing: contextlib.ExitStack) -> Iterator[tuple[str, int]]:
    """The arenas that other processes of this user have open, each once."""
    seen: set[tuple[int, int] | None] = {None}
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        try:
            if process.stat().st_uid != os.getuid():
                continue
            links = list((process / "fd").iterdir())
        except OSError:  # it has just ended, or may not be looked at
            continue
        for link in links:
            with contextlib.suppress(OSError):
                if os.readlink(link).startswith(_LINK):  # noqa: PTH115 - it leads to no path
                    file = _identity(link.stat())
                    if file not in seen:
                        descriptor = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
                        closing.callback(os.close, descriptor)
                        seen.add(file)
                        yield f"process {process.name}", descriptor
