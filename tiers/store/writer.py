"""StoreWriter: write a store record by record. A conversion can be interrupted at any moment and resumed later.

The order of writes makes this safe. A shard is written under a temporary name, which no reader opens, then synced and
renamed. Once all shards exist, the manifest is written in the same way. A finished shard is never changed. If the
process dies, the block that it was writing is written again. The bytes depend neither on the time nor on interruptions.
So a store whose conversion was resumed is equal to a store that was written without interruption.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import StoreError, TargetExistsError
from moetier.tiers.layout import CHECKSUM_BYTES
from moetier.tiers.manifest import FileSum, Manifest

from .atomic import PARTIAL, LargeFile, disk_errors, large_file, make_folders, sync_folder, write_durably
from .checksum import READ_PIECE_BYTES, checksum_bytes, crc32c
from .folder import METADATA, PLAN, read_plan
from .shard import ShardFile, store_digest

Bytes = npt.NDArray[np.uint8]


class StoreWriter(Closeable):
    """Writes the blocks of one plan, in any order. Several threads may write different blocks at the same time.

    The writer holds a lock on the folder until ``finish`` or ``close``, so the folder has one writer at a time.
    """

    @classmethod
    def open(cls, folder: Path, plan: Manifest) -> StoreWriter:
        """Create a store, or resume the conversion that began with the same plan.

        Args:
            folder: the folder ``experts.zarr`` in the model directory. It is created if it does not exist.
            plan: the manifest without the fields that are unknown until the store is written (``Manifest.plan``).

        Raises:
            TargetExistsError: something else is in the folder, or another process is writing to it.
            DiskSpaceError: the disk is full.
            TargetError: the folder can't be written.
        """
        assert plan == plan.plan
        assert Manifest.from_json(plan.to_json(), str(folder)) == plan
        with disk_errors(folder):
            make_folders(folder)
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TargetExistsError(
                    f"Another process is converting a model into {folder.parent}.",
                    "Wait until that process has ended, or choose another folder.",
                ) from None
            _check_target(folder, plan)
            with disk_errors(folder):
                write_durably(folder / PLAN, _to_json(plan.to_json()))
                for leftover in folder.rglob(f"*{PARTIAL}"):
                    leftover.unlink()
                for array in plan.layouts:
                    make_folders(folder / array)
                    write_durably(folder / array / METADATA, array_metadata(plan, array))
            writer = cls(folder, plan, lock)
            undo.pop_all()
        return writer

    def __init__(self, folder: Path, plan: Manifest, lock: int) -> None:
        self.folder = folder
        self.plan = plan
        self._folder_lock = lock
        self._files = [ShardFile.of(folder, plan, block) for block in range(len(plan.blocks))]
        self._finished = {block for block, file in enumerate(self._files) if is_complete(file)}
        self._is_closed = False

    @property
    def finished_blocks(self) -> frozenset[int]:
        """The blocks whose shards are complete. All other blocks must be written before ``finish``."""
        return frozenset(self._finished)

    @property
    def missing_bytes(self) -> int:
        """Total size of the shards that are not complete, in bytes."""
        finished = self.finished_blocks
        return sum(file.file_bytes for block, file in enumerate(self._files) if block not in finished)

    @contextlib.contextmanager
    def block(self, block: int) -> Iterator[ShardWriter]:
        """Open the shard of a block for writing. The ``with`` block must write all experts of the block, in order.

        At the end of the ``with`` block, the shard gets its final name. If the block raises an exception, the shard is
        removed. Raises DiskSpaceError, before the block begins, if the disk has no room for the whole shard. Raises
        TargetError if the shard can't be written.
        """
        assert not self._is_closed
        assert block not in self.finished_blocks, f"block {block} is written twice"
        file = self._files[block]
        with self._disk_errors():
            make_folders(file.path.parent)
            file.path.unlink(missing_ok=True)  # a shard that exists here is not complete
        with large_file(file.path, file.file_bytes, self._disk_errors) as stream:
            shard = ShardWriter(stream, file)
            yield shard
            assert shard.written == file.experts, f"{shard.written} of {file.experts} experts were written"
            stream.write(file.make_index())
        self._finished.add(block)

    def _disk_errors(self) -> contextlib.AbstractContextManager[None]:
        return disk_errors(self.folder, lambda: self.missing_bytes)

    def finish(
        self,
        trunk: Mapping[str, FileSum] | None = None,
        source_digest: str | None = None,
        copied: Mapping[str, FileSum] | None = None,
    ) -> Manifest:
        """Write the manifest, which makes the store complete, and close the writer. Return the manifest.

        Args:
            trunk: a dictionary from the name of each trunk file to its size and checksum.
            source_digest: digest of the checkpoint, if the plan does not have the final one; else None.
            copied: a dictionary of the same kind for the files that were copied from the checkpoint.

        Raises:
            DiskSpaceError: the disk is full.
            TargetError: the manifest can't be written.
        """
        assert len(self._finished) == len(self._files), "blocks are missing"
        with self._disk_errors():
            crcs = [crc for file in self._files for crc in file.stored_checksums()]
            manifest = replace(
                self.plan,
                source_digest=self.plan.source_digest if source_digest is None else source_digest,
                digest=store_digest(crcs),
                trunk=trunk or {},
                copied=copied or {},
                record_checksums=b"".join(map(checksum_bytes, crcs)),
            )
            # An earlier process may have died after it renamed a shard and before it made the name durable.
            for name in sorted({parent for file in self._files for parent in list(file.path.parents)[:4]}):
                sync_folder(name)
            group = {"zarr_format": 3, "node_type": "group", "attributes": {"moetier": manifest.to_json()}}
            write_durably(self.folder / METADATA, _to_json(group))
            (self.folder / PLAN).unlink()
            sync_folder(self.folder)
        self.close()
        return manifest

    def close(self) -> None:
        """Release the lock on the folder. Finished shards stay. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            os.close(self._folder_lock)


class ShardWriter:
    """Writes the records of one block. Not thread-safe."""

    def __init__(self, stream: LargeFile, file: ShardFile) -> None:
        self._stream = stream
        self._file = file

    @property
    def written(self) -> int:
        """The number of records written so far, which is the index of the next expert."""
        return self._stream.written // self._file.slot_bytes

    def write(self, payload: memoryview | Bytes | bytes) -> None:
        """Append ``payload``, the record of the next expert, and its checksum. A record has ``record_bytes`` bytes."""
        data = np.frombuffer(payload, np.uint8).data
        assert self.written < self._file.experts
        assert len(data) == self._file.slot_bytes - CHECKSUM_BYTES, f"{len(data)} bytes are no record"
        crc = 0
        for start in range(0, len(data), READ_PIECE_BYTES):
            piece = data[start : start + READ_PIECE_BYTES]
            crc = crc32c(piece, crc)
            self._stream.write(piece)
        self._stream.write(checksum_bytes(crc))


def array_metadata(plan: Manifest, array: str) -> bytes:
    """Return the content of the file ``zarr.json`` of a zarr array. It is made by zarr itself."""
    shape = plan.shape(array)
    zarr_array = zarr.create_array(
        MemoryStore(),
        shape=shape,
        chunks=(1, 1, shape[2]),
        shards=(1, shape[1], shape[2]),
        dtype="uint8",
        filters=None,
        serializer=BytesCodec(),
        compressors=[Crc32cCodec()],
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    return zarr_array.metadata.to_buffer_dict(default_buffer_prototype())[METADATA].to_bytes()


def is_complete(file: ShardFile) -> bool:
    """Return whether a shard exists and has the right size and the right index."""
    try:
        with file.path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size != file.file_bytes:
                return False
            return os.pread(stream.fileno(), file.index_bytes, file.data_bytes) == file.make_index()
    except FileNotFoundError:
        return False


def _check_target(folder: Path, plan: Manifest) -> None:
    """Raise TargetExistsError unless the folder is empty, or holds a finished or unfinished store of this plan."""
    strangers = sorted(path.name for path in folder.iterdir() if not path.name.endswith(PARTIAL))
    try:
        earlier = read_plan(folder)
    except StoreError:
        earlier = None
    if earlier == plan or not strangers:
        return
    if earlier is None:
        cause = f"{folder} holds {strangers[0]}, and is not a moetier store."
    else:
        differing = [field.name for field in fields(plan) if getattr(earlier, field.name) != getattr(plan, field.name)]
        cause = (
            f"{folder.parent} holds another conversion, of {earlier.model}, which differs in {', '.join(differing)}."
        )
    raise TargetExistsError(cause, "Choose another folder, or remove this folder first.")


def _to_json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
