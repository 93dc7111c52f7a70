"""CheckpointStore: the experts of a checkpoint that is used as it is, read from its own files.

The table of a checkpoint's extents (``tiers.extents``) is that of ``moetier link``, or is made from the headers, and
kept in this process for the next look at the same files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

from moetier.runtime.checkpoint.containers import Checkpoint, is_one_file, open_checkpoint
from moetier.runtime.checkpoint.model_config import is_checkpoint
from moetier.runtime.checkpoint.safetensors_folder import contained
from moetier.tiers.errors import CheckpointError
from moetier.tiers.extents.reader import ExtentStore
from moetier.tiers.extents.table import ExtentTable, read_table
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.folder import command

_log = logging.getLogger(__name__)
_lock = threading.Lock()  # guards: ``_tables``; held while a table is made, so that it is made once
_tables: dict[Path, ExtentTable] = {}  # the last table that was made, by folder


class CheckpointStore(ExtentStore):
    """The experts of a checkpoint in safetensors or GGUF."""

    @classmethod
    def recognises(cls, location: Path) -> bool:
        """Return whether ``location`` is a checkpoint. Raises CheckpointError if its config.json can't be read."""
        return is_checkpoint(location)

    @classmethod
    def read_manifest(cls, location: Path) -> Manifest:
        """Return the manifest in the checkpoint's table."""
        return table_of(location).manifest

    @classmethod
    def open(cls, location: Path, *, damaged: bool = False) -> CheckpointStore:
        """Open the checkpoint at ``location``. Logs if its records can't be proved, unless ``damaged``."""
        store = cls.with_table(location, table_of(location), damaged=damaged)
        if not damaged and not store.has_checksums:
            _log.warning(
                "%s has no checksums of its experts: they are used without a check. Make them: %s",
                location,
                command("link", location),
            )
        return store

    @classmethod
    def with_table(cls, location: Path, table: ExtentTable, *, damaged: bool = False) -> CheckpointStore:
        """Open the shards that ``table`` names. Raises UnsafeCheckpointError if one lies outside the checkpoint."""
        paths = {shard.name: contained(_home(location), shard.name) for shard in table.shards}
        return cls(location, table, paths, damaged=damaged)


def check_shards(folder: Path) -> None:
    """Raise StoreError or UnsafeCheckpointError unless a checkpoint's files are those that its table describes."""
    CheckpointStore.with_table(folder, table_of(folder)).close()


def table_of(folder: Path) -> ExtentTable:
    """Return the table of a checkpoint: that of ``moetier link``, or one that is made from its headers.

    A table is made with torch and transformers. A process that has not imported torch, such as a daemon, lets another
    process make it. Raises StoreError or CheckpointError.
    """
    return read_table(folder) or _table_of_headers(folder)


def make_table(checkpoint: Checkpoint) -> ExtentTable:
    """Make the table of a checkpoint from its headers. Raises as ``extent_table``."""
    from moetier.runtime.checkpoint.extents import extent_table

    return extent_table(checkpoint)


def _home(folder: Path) -> Path:
    """Return the folder of a checkpoint's files. A table's names of shards are relative to it."""
    return (folder.parent if is_one_file(folder) else folder).resolve()


def _table_of_headers(folder: Path) -> ExtentTable:
    """Make the table of a checkpoint that is not linked, unless it was the last one to be made."""
    folder = folder.absolute()
    with _lock:
        if (table := _tables.get(folder)) is None or not _is_current(folder, table):
            _tables.clear()
            table = make_table(open_checkpoint(folder)) if "torch" in sys.modules else _make_in_process(folder)
            _tables[folder] = table
        return table


def _is_current(folder: Path, table: ExtentTable) -> bool:
    with contextlib.suppress(OSError):
        stats = [(_home(folder) / shard.name).stat() for shard in table.shards]
        return all(
            (stat.st_size, stat.st_mtime_ns) == (shard.bytes, shard.mtime_ns)
            for stat, shard in zip(stats, table.shards, strict=True)
        )
    return False


def _make_in_process(folder: Path) -> ExtentTable:
    """Make the table of a checkpoint in another process. Raises CheckpointError."""
    command_line = [sys.executable, "-m", "moetier.runtime.stores.table_process", str(folder)]
    ended = subprocess.run(command_line, stdout=subprocess.PIPE, check=False)
    try:
        answer = json.loads(ended.stdout)
    except ValueError as error:
        raise CheckpointError(
            f"{folder}: the process that looks for its experts has failed.", "See its messages above."
        ) from error
    if "cause" in answer:
        raise CheckpointError(answer["cause"], answer["fix"])
    return ExtentTable.from_json(answer, str(folder))
