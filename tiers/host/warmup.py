"""Warm-up: count how often each expert is used, save the counts, and load the most used experts when a tier is opened.

The counts are saved in ``$XDG_CACHE_HOME/moetier`` (XDG Base Directory Specification 0.8). If the file can't be used,
for whatever reason, the tier begins without a warm-up.
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

from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import ClosedError, StoreError, TargetError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import ForkGuard
from moetier.tiers.store.atomic import make_folders, write_durably
from moetier.tiers.store.folder import user_cache
from moetier.tiers.threads import start_thread

from .tier import HostTier

EVERY = 300.0  # seconds between two writes of the file; a process that is killed loses the uses since the latest write
FORMAT = 1  # version of the file's format
# a use in an earlier run counts half after this many further uses, times the block's number of experts
HOT_SET_HALF_LIFE = 512
MAX_BYTES = 16 << 20  # size of the largest file that is read

_log = logging.getLogger(__name__)


class HotSet(dict[ExpertKey, float]):
    """A dictionary from each key to the number of its uses, in which uses in earlier runs count less."""

    def add(self, keys: Iterable[ExpertKey]) -> None:
        """Count one use of each key."""
        for key in keys:
            self[key] = self.get(key, 0) + 1

    def hottest(self, block: int, most: int) -> list[ExpertKey]:
        """Return the ``most`` most used experts of a block, the most used first, or fewer if fewer were used.

        Experts with the same count are in ascending order.
        """
        keys = [key for key in self if key.block == block]
        return sorted(keys, key=lambda key: (-self[key], key))[:most]

    def plus_decayed(self, earlier: HotSet, experts: Mapping[int, int]) -> HotSet:
        """Return the sum of these counts and those of ``earlier`` runs. Earlier counts decay with each use in this run.

        Only uses of experts of the same block make a count decay. ``experts`` is a dictionary from block to its number
        of experts.
        """
        uses = dict.fromkeys(experts, 0.0)
        for key, count in self.items():
            uses[key.block] += count
        hot_set = HotSet(self)
        for key, count in earlier.items():
            faded = count * 0.5 ** (uses[key.block] / (HOT_SET_HALF_LIFE * experts[key.block]))
            hot_set[key] = hot_set.get(key, 0) + faded
        return hot_set


class Learner(Closeable):
    """A thread that warms up a tier, and then saves the counts of uses from time to time until ``close``.

    Only ``close`` waits for the thread. Errors of the thread don't affect the tier.
    """

    def __init__(self, host: HostTier, *, every: float = EVERY) -> None:
        self._host = host
        self._fork_guard = ForkGuard()
        self._digest = host.manifest.digest
        self._experts = {number: block.experts for number, block in enumerate(host.manifest.blocks)}
        self._every = every
        self._ending = threading.Event()
        self._saved = host.uses.counts()
        self._thread = start_thread("moetier-learner", self._run)

    def close(self) -> None:
        """Save the counts, and end the thread. The tier may be closed before or after. Idempotent.

        Does nothing in a forked child.
        """
        if self._fork_guard.is_owner:
            self._ending.set()
            self._thread.join()
            self._save()

    def _run(self) -> None:
        hot = load_hot_set(self._digest, self._experts)
        try:
            self._host.warm(hot.hottest)
        except (ClosedError, StoreError):
            return
        while not self._ending.wait(self._every):
            self._save()

    def _save(self) -> None:
        uses = self._host.uses.counts()
        new = {key: count - self._saved.get(key, 0) for key, count in uses.items()}
        self._saved = uses
        if used := {key: count for key, count in new.items() if count}:
            save_hot_set(self._digest, self._experts, HotSet(used))


def hot_set_path(digest: str) -> Path:
    """Return the path of the file with the counts for the store with ``digest``.

    Raises FileNotFoundError if the user has no home directory.
    """
    assert re.fullmatch(r"[0-9a-f]+", digest), digest
    try:
        return user_cache(f"hot-{digest}.json")
    except TargetError:
        raise FileNotFoundError(errno.ENOENT, "the user has no home directory", "~/.cache") from None


def load_hot_set(digest: str, experts: Mapping[int, int]) -> HotSet:
    """Return the counts that earlier runs have saved for the store with ``digest``.

    The result is empty if there is no file. It is also empty, and a warning is logged, if the file is damaged, or if it
    has another version or belongs to another store or user. ``experts`` is a dictionary from block to its number of
    experts.
    """
    try:
        path = hot_set_path(digest)
        with _open(path) as stream:
            return _parse(json.loads(stream.read(MAX_BYTES)), digest, experts)
    except FileNotFoundError:
        return HotSet()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        cause = (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
        _log.warning("The counts of experts in %s are ignored (%s). Counting begins again.", path, cause)
        return HotSet()


def save_hot_set(digest: str, experts: Mapping[int, int], used: HotSet) -> None:
    """Add the uses of one run to the saved counts. The file is replaced atomically.

    A lock makes sure that no counts are lost if another process saves its counts at the same time. If the file can't be
    written, a warning is logged. ``experts`` is a dictionary from block to its number of experts.
    """
    where: Path | str = "$XDG_CACHE_HOME"
    try:
        path = where = hot_set_path(digest)
        make_folders(path.parent)
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the descriptor is closed, or when the process ends
            hot_set = used.plus_decayed(load_hot_set(digest, experts), experts)
            write_durably(path, _text(hot_set, digest).encode())
        finally:
            os.close(lock)
    except OSError as error:
        _log.warning("The counts of experts in %s can't be saved (%s).", where, error.strerror)


def _open(path: Path) -> Any:
    """Open a regular file of this user for reading. Raises OSError or ValueError if it is something else, or a link."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        os.close(descriptor)
        raise ValueError("it is not a regular file of this user")
    return os.fdopen(descriptor, encoding="utf-8")


def _text(hot_set: HotSet, digest: str) -> str:
    blocks: dict[str, dict[str, float]] = {}
    for key, count in sorted(hot_set.items()):
        blocks.setdefault(str(key.block), {})[str(key.expert)] = round(count, 3)
    return json.dumps({"format": FORMAT, "digest": digest, "counts": blocks})


def _parse(value: Any, digest: str, experts: Mapping[int, int]) -> HotSet:
    """Return the counts in ``value``, the JSON of a file.

    Raises ValueError, TypeError, KeyError, AttributeError or OverflowError if ``value`` is malformed.
    """
    if value["format"] != FORMAT:
        raise ValueError(f"it has version {value['format']!r} of the format, not {FORMAT}")
    if value["digest"] != digest:
        raise ValueError("it belongs to another store")
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
