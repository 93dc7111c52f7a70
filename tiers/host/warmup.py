"""Warm-up: which experts of a store are used most, by counts that are kept between runs.

They are in ``$XDG_CACHE_HOME/moetier`` (XDG Base Directory Specification 0.8). They are a hint: whatever is wrong with
the file, the tiers begin without it.
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
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moetier.tiers.layout import ExpertKey
from moetier.tiers.store.atomic import make_folders, write_durably

FORMAT = 1
HALF_LIFE = 512  # after so many uses of its block, per expert that the block has, an old use counts half
MOST_BYTES = 16 << 20

_log = logging.getLogger(__name__)


class HotSet:
    """Counts of uses by key. Uses of one run count alike, those of earlier runs less."""

    def __init__(self, counts: Mapping[ExpertKey, float] | None = None) -> None:
        self._counts: dict[int, Counter[int]] = {}
        for key, count in (counts or {}).items():
            self._counts.setdefault(key.block, Counter())[key.expert] = count  # type: ignore[assignment]

    @property
    def counts(self) -> dict[ExpertKey, float]:
        """Uses of each key that was used."""
        return {ExpertKey(block, expert): n for block, of in self._counts.items() for expert, n in of.items()}

    def use(self, keys: Iterable[ExpertKey]) -> None:
        """Count one use of each key."""
        for key in keys:
            self._counts.setdefault(key.block, Counter())[key.expert] += 1

    def hottest(self, block: int, most: int) -> list[ExpertKey]:
        """Return at most so many experts of a block, the most used first; equals in ascending order."""
        ordered = sorted(self._counts.get(block, {}).items(), key=lambda item: (-item[1], item[0]))
        return [ExpertKey(block, expert) for expert, _ in ordered[:most]]

    def after(self, earlier: HotSet, experts: Mapping[int, int]) -> HotSet:
        """Return the sum with the counts of earlier runs, which fade the more a block has been used since.

        ``experts``: how many each block has.
        """
        counts = dict(self.counts)
        for (block, expert), count in earlier.counts.items():
            uses = sum(self._counts.get(block, {}).values())
            faded = count * 0.5 ** (uses / (HALF_LIFE * experts[block]))
            counts[ExpertKey(block, expert)] = counts.get(ExpertKey(block, expert), 0) + faded
        return HotSet(counts)


def hot_set_path(digest: str) -> Path:
    """Return the file for the store of that digest. Raises FileNotFoundError for a user without a home directory."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not folder.is_absolute():  # the specification says to ignore it
        try:
            folder = Path.home() / ".cache"
        except RuntimeError:
            raise FileNotFoundError(errno.ENOENT, "the user has no home", "~/.cache") from None
    assert re.fullmatch(r"[0-9a-f]+", digest), digest
    return folder / "moetier" / f"hot-{digest}.json"


def load_hot_set(digest: str, experts: Mapping[int, int]) -> HotSet:
    """Return what is kept for a store, by earlier runs.

    It is empty where there is no file, and with a warning where the file is damaged or of another version, store or
    user.
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
    """Add the uses of one run to what is kept, whole or not at all.

    What other processes add at the same time is kept as well. A file that can't be written is a warning.
    """
    where: Path | str = "$XDG_CACHE_HOME"
    try:
        path = where = hot_set_path(digest)
        make_folders(path.parent)
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the descriptor, and with the process
            found = used.after(load_hot_set(digest, experts), experts)
            write_durably(path, _text(found, digest).encode())
        finally:
            os.close(lock)
    except OSError as error:
        _log.warning("The counts of experts in %s are not kept (%s).", where, error.strerror)


def _open(path: Path) -> Any:
    """Open a regular file of this user's own for reading: no symbolic link, and nothing that blocks."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        os.close(descriptor)
        raise ValueError("it is not a regular file of this user")
    return os.fdopen(descriptor, encoding="utf-8")


def _text(found: HotSet, digest: str) -> str:
    blocks: dict[str, dict[str, float]] = {}
    for key, count in sorted(found.counts.items()):
        blocks.setdefault(str(key.block), {})[str(key.expert)] = round(count, 3)
    return json.dumps({"format": FORMAT, "digest": digest, "counts": blocks})


def _parse(value: Any, digest: str, experts: Mapping[int, int]) -> HotSet:
    """Check the JSON value of a file. A value of another form raises what reading it raises."""
    if value["format"] != FORMAT:
        raise ValueError(f"format {value['format']!r}, not {FORMAT}")
    if value["digest"] != digest:
        raise ValueError("it is of another store")
    counts = {}
    for block, of in value["counts"].items():
        for expert, count in of.items():
            key = ExpertKey(int(block), int(expert))
            if not 0 <= key.expert < experts.get(key.block, 0):
                raise ValueError(f"{key} is not in the store")
            if not (type(count) in (int, float) and math.isfinite(count) and count >= 0):
                raise ValueError(f"{count!r} is not a count")
            counts[key] = float(count)
    return HotSet(counts)
