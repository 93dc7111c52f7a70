"""Make a mirror: a complete copy of a store's records in a folder on another disk."""

from __future__ import annotations

import json
import mmap
import sys
from collections.abc import Mapping
from pathlib import Path

from moetier.tiers.errors import ChecksumError, DiskSpaceError, StoreError, TargetExistsError
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey
from moetier.tiers.manifest import FileSum, Manifest
from moetier.tiers.store.atomic import disk_errors, write_durably
from moetier.tiers.store.folder import GROUP, MIRRORS, read_manifest, read_plan, store_folder
from moetier.tiers.store.mirror import read_mirrors
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.shard import ShardFile
from moetier.tiers.store.writer import StoreWriter, is_complete
from moetier.tools.cli.progress import ByteProgress

from .model_files import empty, free_bytes, freed_bytes, is_ours, locked, outside_store
from .target import check_place


def make_mirror(directory: Path, target: Path, *, quiet: bool = True, overwrite: bool = False) -> None:
    """Copy the records of the model directory ``directory`` into ``target``, and list ``target`` as its mirror.

    Shards that an earlier run copied are kept. ``overwrite``: replace the mirror of another model.

    Raises StoreError if a record can't be read, or if the finished mirror has the records of another conversion;
    TargetError if ``target`` overlaps with ``directory`` or holds other experts, or if its disk is too small.
    """
    directory = store_folder(directory, "mirrored").parent
    check_place(target, directory)
    with ShardStore.open(directory) as store:
        manifest = store.manifest
        shards = [ShardFile.of(target / GROUP, manifest, block) for block in range(len(manifest.blocks))]
        replaced = overwrite and _is_mirror_of_another(target, manifest)
        missing = sum(shard.file_bytes for shard in shards if replaced or not is_complete(shard))
        digest, trunk = ("", {}) if replaced else _manifest_sums(target)
        if digest not in ("", manifest.digest):
            raise TargetExistsError(
                f"{target} holds the experts of another model.", "Choose another folder for the mirror."
            )
        if missing or digest != manifest.digest:
            if missing > (free := free_bytes(target) + (freed_bytes(target) if replaced else 0)):
                then = " once the old mirror is removed" if replaced else ""
                raise DiskSpaceError(
                    f"{target} needs {missing:,} bytes more; {free:,} are free{then}.", "Free some space."
                )
            if replaced:
                with locked(str(target), target):
                    empty(target, [])
            digest = _copy(store, target / GROUP, shards, trunk, ByteProgress("mirror", missing, quiet=quiet))
    if digest != manifest.digest:
        raise ChecksumError(
            f"The records in {target} and in {directory} come from different conversions.",
            f"Remove {target}, and run the same command again.",
        )
    try:
        listed = read_mirrors(directory)
    except StoreError:
        listed = []
    folders = [str(folder) for folder in dict.fromkeys([*listed, target.resolve()])]
    with disk_errors(directory / GROUP):
        write_durably(directory / MIRRORS, json.dumps({"mirrors": folders}, indent=2).encode() + b"\n")


def mirror_to(folder: Path, target: Path, *, overwrite: bool = False) -> None:
    """Make a mirror of the model directory ``folder`` in ``target``, and warn if both are on the same disk.

    ``overwrite`` is as in ``make_mirror``. Raises the errors of ``make_mirror``.
    """
    make_mirror(folder, target, quiet=False, overwrite=overwrite)
    if target.stat().st_dev == store_folder(folder).stat().st_dev:
        print(f"{target} is on the same disk as {folder}, so this mirror makes reads no faster.", file=sys.stderr)


def _is_mirror_of_another(target: Path, manifest: Manifest) -> bool:
    """Return whether ``target`` has nothing but records, complete or not, and these are of another model.

    An unfinished conversion has more: its journal, or files that are downloaded.
    """
    if not is_ours(target) or outside_store(target):
        return False
    try:
        plan = read_plan(target / GROUP)
        return plan is not None and (plan != manifest.plan or _manifest_sums(target)[0] not in ("", manifest.digest))
    except StoreError:
        return False


def _manifest_sums(target: Path) -> tuple[str, Mapping[str, FileSum]]:
    """Return the digest and the trunk's checksums in the manifest of ``target``; "" and {} if there is no manifest.

    ``target`` may be a whole model directory, not only a mirror.
    """
    try:
        manifest = read_manifest(target / GROUP)
    except StoreError:
        return "", {}
    return manifest.digest, manifest.trunk


def _copy(
    store: ShardStore, folder: Path, shards: list[ShardFile], trunk: Mapping[str, FileSum], progress: ByteProgress
) -> str:
    """Copy the shards that are missing in the store ``folder``, write its manifest, and return its digest."""
    buffer = memoryview(mmap.mmap(-1, max(shard.slot_bytes for shard in shards)))
    with StoreWriter.open(folder, store.manifest.plan) as writer, progress:
        for block in sorted(set(range(len(shards))) - writer.finished_blocks):
            slot = buffer[: shards[block].slot_bytes]
            with writer.block(block) as shard:
                for expert in range(shards[block].experts):
                    store.read_into(ExpertKey(block, expert), slot)
                    shard.write(slot[:-CHECKSUM_BYTES])
                    progress.advance(len(slot))
        return writer.finish(trunk).digest
