"""Warm-up: count how often experts are used, save the counts, and load the most used experts when a tier is opened.

The counts are saved in ``$XDG_CACHE_HOME/moetier`` (XDG Base Directory Specification 0.8). They are only a hint: if the
file can't be used for any reason, the tier begins without a warm-up.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import re
import stat
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moetier.tiers.errors import ClosedError, StoreError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import ForkGuard
from moetier.tiers.store.atomic import make_folders, write_durably

from .tier import HostTier

EVERY = 300.0  # seconds between writes; a process that is killed loses the uses since the latest write
FORMAT = 1  # version of the file format
HALF_LIFE = 512  # a use in an earlier run counts half after 512 uses per expert of its block
MOST_BYTES = 16 << 20  # largest file that is read

_log = logging.getLogger(__name__)


class HotSet(dict[ExpertKey, float]):
    """How often each key was used. Uses in earlier runs count less than those in the latest run."""

    def use(self, keys: Iterable[ExpertKey]) -> None:
        """Count one use of each key."""
        for key in keys:
            self[key] = self.get(key, 0) + 1

    def hottest(self, block: int, most: int) -> list[ExpertKey]:
        """Return the ``most`` most used experts of a block, or fewer. Equally used ones are in ascending order."""
        keys = [key for key in self if key.block == block]
        return sorted(keys, key=lambda key: (-self[key], key))[:most]

    def after(self, earlier: HotSet, experts: Mapping[int, int]) -> HotSet:
        """Return the sum of these counts and those of ``earlier`` runs, which decay with each use of their block since.

        ``experts`` is the number of experts by block.
        """
        uses = dict.fromkeys(experts, 0.0)
        for key, count in self.items():
            uses[key.block] += count
        found = HotSet(self)
        for key, count in earlier.items():
            faded = count * 0.5 ** (uses[key.block] / (HALF_LIFE * experts[key.block]))
            found[key] = found.get(key, 0) + faded
        return found


class Learner:
    """Thread that warms up an open tier, and saves its counts of uses until ``close``.

    Nothing waits for the thread but ``close``, and its errors don't affect the tier.
    """

    def __init__(self, host: HostTier, *, every: float = EVERY) -> None:
        self._host = host
        self._fork_guard = ForkGuard()
        self._digest = host.manifest.digest
        self._experts = {number: block.experts for number, block in enumerate(host.manifest.blocks)}
        self._every = every
        self._ending = threading.Event()
        self._kept = host.uses()
        self._thread = threading.Thread(target=self._run, name="moetier-learner", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Save the counts and end the thread. The tier may be closed before or after. Idempotent.

        Does nothing in a forked child.
        """
        if self._fork_guard.is_owner:
            self._ending.set()
            self._thread.join()
            self._keep()

    def _run(self) -> None:
        hot = load_hot_set(self._digest, self._experts)
        try:
            self._host.warm(hot.hottest)
        except (ClosedError, StoreError):
            return
        while not self._ending.wait(self._every):
            self._keep()

    def _keep(self) -> None:
        uses = self._host.uses()
        new = {key: count - self._kept.get(key, 0) for key, count in uses.items()}
        self._kept = uses
        if used := {key: count for key, count in new.items() if count}:
            keep_hot_set(self._digest, self._experts, HotSet(used))


def hot_set_path(digest: str) -> Path:
    """Return the path of the counts for the store with ``digest``. Raises FileNotFoundError if the user has no home."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not folder.is_absolute():  # the specification says to ignore relative paths
        try:
            folder = Path.home() / ".cache"
        except RuntimeError:
            raise FileNotFoundError(errno.ENOENT, "the user has no home", "~/.cache") from None
    assert re.fullmatch(r"[0-9a-f]+", digest), digest
    return folder / "moetier" / f"hot-{digest}.json"


def load_hot_set(digest: str, experts: Mapping[int, int]) -> HotSet:
    """Read the counts that earlier runs have saved for the store with ``digest``.

    They are empty if there is no file. They are also empty, with a warning, if the file is damaged, or of another
    version, store or user. ``experts`` is the number of experts by block.
    """
    try:
        path = hot_set_path(digest)
        with _open(path) as stream:
            return _parse(json.loads(stream.read(MOST_BYTES)), digest, experts)
    except FileNotFoundError:
        return HotSet()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        cause = (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
        _log.warning("The counts of experts in %s are not used (%s). They begin anew.", path, cause)
        return HotSet()


def keep_hot_set(digest: str, experts: Mapping[int, int], used: HotSet) -> None:
    """Add the uses of one run to the saved counts, in one atomic write.

    A lock makes sure that no counts are lost if other processes save theirs at the same time. If the file can't be
    written, a warning is logged. ``experts`` is the number of experts by block.
    """
    where: Path | str = "$XDG_CACHE_HOME"
    try:
        path = where = hot_set_path(digest)
        make_folders(path.parent)
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the lock ends with the descriptor, or with the process
            found = used.after(load_hot_set(digest, experts), experts)
            write_durably(path, _text(found, digest).encode())
        finally:
            os.close(lock)
    except OSError as error:
        _log.warning("The counts of experts in %s are not kept (%s).", where, error.strerror)


def _open(path: Path) -> Any:
    """Open a regular file of this user for reading. Raises OSError or ValueError for anything else, such as a link."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        os.close(descriptor)
        raise ValueError("it is not a regular file of this user")
    return os.fdopen(descriptor, encoding="utf-8")


def _text(found: HotSet, digest: str) -> str:
    blocks: dict[str, dict[str, float]] = {}
    for key, count in sorted(found.items()):
        blocks.setdefault(str(key.block), {})[str(key.expert)] = round(count, 3)
    return json.dumps({"format": FORMAT, "digest": digest, "counts": blocks})


def _parse(value: Any, digest: str, experts: Mapping[int, int]) -> HotSet:
    """Return the counts in the JSON ``value`` of a file.

    Raises ValueError, or for a value of another form TypeError, KeyError, AttributeError or OverflowError.
    """
    if value["format"] != FORMAT:
        raise ValueError(f"format {value['format']!r}, not {FORMAT}")
    if value["digest"] != digest:
        raise ValueError("it is of another store")
    counts = HotSet()
    for block, of in value["counts"].items():
        for expert, count in of.items():
            key = ExpertKey(int(block), int(expert))
            if not 0 <= key.expert < experts.get(key.block, 0):
                raise ValueError(f"{key} is not in the store")
            if not (type(count) in (int, float) and math.isfinite(count) and count >= 0):
                raise ValueError(f"{count!r} is not a count")
            counts[key] = float(count)
    return counts
