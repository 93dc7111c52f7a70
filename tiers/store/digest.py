"""Digest check: does an older store, whose manifest has no table of checksums, hold the records of its digest?"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from moetier.tiers.errors import ChecksumError, StoreError
from moetier.tiers.manifest import Manifest

from .atomic import read_errors
from .folder import METADATA
from .shard import OpenShard, store_digest, stored_checksums

WAIT_SECONDS = 0.1  # seconds for which opening a store waits: enough for a quick disk or a small store
READ_SHARE = 0.1  # share of the time for which it reads afterwards: reads of records come first
MAX_SUSPECTS = 3  # most shards that an error names

_log = logging.getLogger(__name__)


class DigestCheck:
    """Read the stored checksum of each record in a background thread, and compare their digest with the manifest's.

    The thread calls ``found`` with an error if they differ.
    """

    def __init__(
        self, manifest: Manifest, shards: Mapping[int, OpenShard], found: Callable[[ChecksumError], None]
    ) -> None:
        self._manifest = manifest
        self._shards = shards
        self._found = found
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moetier-digest", daemon=True)
        self._thread.start()
        self._thread.join(WAIT_SECONDS)

    def close(self) -> None:
        """End the thread. Call it before the shards are closed. Idempotent."""
        self._ending.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            checksums = [crc for _, shard in sorted(self._shards.items()) for crc in self._read(shard)]
        except StoreError as error:  # a later read of the records will raise it
            _log.warning("The digest of %s is not checked: %s", self._manifest.model, error.cause)
            return
        digest = store_digest(checksums)
        if not self._ending.is_set() and digest != self._manifest.digest:
            paths = [shard.file.path for shard in self._shards.values()]
            self._found(foreign_shards(self._manifest, digest, paths))

    def _read(self, shard: OpenShard) -> Iterator[int]:
        """Yield the stored checksums of the open file at a limited rate. Stops early after ``close``."""
        began, debt = time.monotonic(), 0.0
        with read_errors(shard.file.path):
            for crc in stored_checksums(f"/proc/self/fd/{shard.descriptor}", shard.offsets, shard.file.slot_bytes):
                yield crc
                now = time.monotonic()
                began, debt = now, debt + (now - began) * (1 / READ_SHARE - 1)
                if debt > WAIT_SECONDS:
                    self._ending.wait(debt)
                    began, debt = time.monotonic(), 0.0
                if self._ending.is_set():
                    return


def foreign_shards(manifest: Manifest, digest: str, paths: Sequence[Path]) -> ChecksumError:
    """Make the error for a store whose digest is not the manifest's.

    A digest does not tell which shard is wrong. Shards that are newer than the manifest, which is written last, are
    suspected.
    """
    folder = paths[0].parents[4]
    written = _written(folder / METADATA)
    later = [path for path in paths if _written(path) > written]
    which = "which of them, this manifest of an older moetier does not say"
    if later and len(later) < len(paths):
        names = ", ".join(map(str, later[:MAX_SUSPECTS])) + (
            f" and {len(later) - MAX_SUSPECTS} more" * (len(later) > MAX_SUSPECTS)
        )
        which = f"probably {names}, written after the manifest"
    return ChecksumError(
        f"{manifest.model}: the shards in {folder} are not all of one conversion: {which}. "
        f"The digest of their records is {digest}, the manifest says {manifest.digest}.",
        "Copy the shards again from where the model directory came from, or convert the model again with --overwrite.",
    )


def _written(path: Path) -> float:
    """The time of the last change of a file; 0 if it is unknown, as the folder may be replaced meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
