"""The experts of a directory: a model directory with a store, the cache of an object store, or a checkpoint as it is.

A checkpoint's experts are read from its own files (``tiers.extents``). Their table is that of ``moetier link``, or is
made from the headers, and kept in this process for the next look at the same files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from moetier.tiers.errors import CheckpointError
from moetier.tiers.extents.reader import ExtentStore
from moetier.tiers.extents.table import ExtentTable, read_table
from moetier.tiers.manifest import FORMAT, Manifest
from moetier.tiers.store.folder import GROUP, command, is_cache, store_folder
from moetier.tiers.store.folder import read_manifest as read_store_manifest
from moetier.tiers.store.mirror import MirroredStore, open_store
from moetier.tiers.store.reader import ExpertStore

from .checkpoint import Checkpoint
from .config_json import NAME, read_config
from .containers import container_of, is_one_file, open_source
from .files import INDEX, WEIGHTS, contained, read_json

_APART = """
import json, sys
from pathlib import Path
from moetier.runtime.checkpoint.experts import table_of
from moetier.tiers.errors import MoetierError
try:
    json.dump(table_of(Path(sys.argv[1])).to_json(), sys.stdout)
except MoetierError as error:
    json.dump({"cause": error.cause, "fix": error.fix}, sys.stdout)
"""

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_made: dict[Path, ExtentTable] = {}  # the last table that was made, by folder


def is_checkpoint(folder: Path) -> bool:
    """Return whether a path is a GGUF file, or a folder that holds a checkpoint in safetensors, and no store.

    A model directory whose store is missing is no checkpoint.

    Raises CheckpointError or UnsafeCheckpointError for a config.json that can't be read.
    """
    if is_one_file(folder):
        return True
    there = (folder / "config.json").is_file() and any((folder / name).is_file() for name in (WEIGHTS, INDEX))
    if not there or (folder / GROUP).is_dir():
        return False
    quantization = read_json(folder, "config.json").get("quantization_config")
    return not (isinstance(quantization, dict) and quantization.get("quant_method") == NAME)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a directory's experts. Raises StoreError, and CheckpointError for a checkpoint."""
    return table_of(folder).manifest if is_checkpoint(folder) else read_store_manifest(store_folder(folder))


def open_experts(folder: Path, *, apart: bool = False) -> ExpertStore | MirroredStore | ExtentStore:
    """Open the experts of a directory: a store with its mirrors, or a checkpoint. ``apart`` is as in ``table_of``.

    Logs if the records of a checkpoint can't be proved. Raises as ``read_manifest``.
    """
    if not is_checkpoint(folder):
        return _open_cache(folder) or open_store(folder)
    store = open_table(folder, table_of(folder, apart=apart))
    if not store.table.is_linked:
        _log.warning(
            "%s has no checksums of its experts: they are used without a check. Make them: %s",
            folder,
            command("link", folder),
        )
    return store


def open_copy(folder: Path, *, readers: int = 4, damaged: bool = False) -> ExpertStore | ExtentStore:
    """Open the experts of a directory, without mirrors. Further arguments are as in ``ExpertStore.open``.

    Raises as ``read_manifest``.
    """
    if is_checkpoint(folder):
        return open_table(folder, table_of(folder), readers=readers, damaged=damaged)
    return _open_cache(folder) or ExpertStore.open(folder, readers=readers, damaged=damaged)


def _open_cache(folder: Path) -> ExpertStore | None:
    """Open the cache of a model in an object store, if it lacks records. Return None for any other folder."""
    if not is_cache(store_folder(folder)):
        return None
    from moetier.tiers.objects.cache import CachedStore

    return CachedStore.open(folder)


def open_table(folder: Path, table: ExtentTable, *, readers: int = 4, damaged: bool = False) -> ExtentStore:
    """Open the shards that a table names. Raises UnsafeCheckpointError if one of them lies outside the checkpoint."""
    paths = {shard.name: contained(_home(folder), shard.name) for shard in table.shards}
    return ExtentStore.open(folder, table, paths, readers=readers, damaged=damaged)


def _home(folder: Path) -> Path:
    """Return the folder of a checkpoint's files. A table's names of shards are relative to it."""
    return (folder.parent if folder.is_file() else folder).resolve()


def check_shards(folder: Path) -> None:
    """Raise StoreError or UnsafeCheckpointError unless a checkpoint's files are those that its table describes."""
    open_table(folder, table_of(folder)).close()


def config_of(folder: Path) -> dict[str, Any]:
    """Return the config.json of a directory; that of a checkpoint as the config of a model directory made from it.

    Raises StoreFormatError, UnsafeCheckpointError, UnsupportedModelError or CheckpointError.
    """
    if not is_checkpoint(folder):
        return read_config(folder)
    as_it_is = {"quantization_config": {"quant_method": NAME, "format": FORMAT, "bits": 16}}
    return container_of(folder).config(folder) | as_it_is


def table_of(folder: Path, *, apart: bool = False) -> ExtentTable:
    """Return the table of a checkpoint: that of ``moetier link``, or one that is made from its headers.

    ``apart``: make it in a process of its own, as that needs torch and transformers. Raises StoreError or
    CheckpointError.
    """
    return read_table(folder) or _table_made(folder, apart)


def _table_made(folder: Path, apart: bool) -> ExtentTable:
    folder = folder.absolute()
    with _lock:
        if (known := _made.get(folder)) is not None and _is_current(folder, known):
            return known
        _made.clear()
        table = _made_apart(folder) if apart else make_table(open_source(folder))
        _made[folder] = table
        return table


def _is_current(folder: Path, table: ExtentTable) -> bool:
    with contextlib.suppress(OSError):
        found = [(_home(folder) / shard.name).stat() for shard in table.shards]
        return all(
            (stat.st_size, stat.st_mtime_ns) == (shard.bytes, shard.mtime_ns)
            for stat, shard in zip(found, table.shards, strict=True)
        )
    return False


def make_table(checkpoint: Checkpoint) -> ExtentTable:
    """Make the table of a checkpoint from its headers. Raises as ``extent_table``."""
    from .extents import extent_table

    return extent_table(checkpoint)


def _made_apart(folder: Path) -> ExtentTable:
    ended = subprocess.run([sys.executable, "-c", _APART, str(folder)], stdout=subprocess.PIPE, check=False)
    try:
        found = json.loads(ended.stdout)
    except ValueError as error:
        raise CheckpointError(
            f"{folder}: the process that looks for its experts has failed.", "See its messages above."
        ) from error
    if "cause" in found:
        raise CheckpointError(found["cause"], found["fix"])
    return ExtentTable.from_json(found, str(folder))
