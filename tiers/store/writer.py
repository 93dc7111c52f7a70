"""StoreWriter: writes a store record by record, so that it can be cut at any moment and resumed.

The order on disk is what makes it safe: a shard is written under a name that no reader looks for, synced, renamed;
when all are there, the manifest is synced and renamed into place, last of all. A finished shard is never touched again;
the block that was being written when the process died is written anew. Nothing that is written depends on time or on
how often the conversion was cut, so a resumed store is byte-identical to an uncut one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from moetier.tiers.errors import StoreError, TargetExistsError
from moetier.tiers.layout import CHECKSUM_BYTES
from moetier.tiers.manifest import FileSum, Manifest

from .atomic import PARTIAL, allocate, disk_errors, make_folders, sync_folder, write_all, write_durably
from .checksum import checksum_bytes, crc32c
from .folder import METADATA, PLAN, read_json, read_manifest
from .shard import ShardFile, store_digest, stored_checksums

Bytes = npt.NDArray[np.uint8]
PIECE_BYTES = 8 << 20  # checksummed and written at a time, while it is in the processor's cache
FLUSH_BYTES = 64 << 20  # of dirty pages at most: a small cgroup must not be stalled by them


class StoreWriter:
    """Writes the blocks of one plan, each once, in any order, several at a time. Thread-safe.

    Holds a lock on the folder until ``finish`` or ``close``: a second conversion into it is refused.
    """

    @classmethod
    def open(cls, folder: Path, plan: Manifest) -> StoreWriter:
        """Creates ``folder`` (a model directory's ``experts.zarr``), or resumes the conversion of the very same plan.

        ``plan`` is the manifest with neither digest nor trunk. Raises TargetExistsError when the folder holds anything
        else or another process is writing to it, DiskSpaceError when it is full, TargetError when it can't be written.
        """
        assert plan == plan.plan
        assert Manifest.from_json(plan.to_json(), str(folder)) == plan
        with disk_errors(folder):
            make_folders(folder)
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(lock, folder)
            _check_target(folder, plan)
            with disk_errors(folder):
                write_durably(folder / PLAN, _to_json(plan.to_json()))
                for leftover in folder.rglob(f"*{PARTIAL}"):
                    leftover.unlink()
                for array in plan.layouts:
                    make_folders(folder / array)
                    write_durably(folder / array / METADATA, array_metadata(plan, array))
            return cls(folder, plan, lock)
        except BaseException:
            os.close(lock)
            raise

    def __init__(self, folder: Path, plan: Manifest, lock: int) -> None:
        self.folder = folder
        self.plan = plan
        self._folder_lock = lock
        self._files = [ShardFile.of(folder, plan, block) for block in range(len(plan.blocks))]
        self._lock = threading.Lock()  # guards the two sets below
        self._finished = {block for block, file in enumerate(self._files) if is_complete(file)}
        self._open: set[int] = set()
        self._closed = False

    @property
    def finished_blocks(self) -> frozenset[int]:
        """Blocks whose shards are complete; the others are to be written."""
        with self._lock:
            return frozenset(self._finished)

    @property
    def missing_bytes(self) -> int:
        """What the blocks that are not finished will take on the disk."""
        finished = self.finished_blocks
        return sum(file.file_bytes for block, file in enumerate(self._files) if block not in finished)

    @contextlib.contextmanager
    def block(self, block: int) -> Iterator[ShardWriter]:
        """Opens a block's shard; all its experts are to be written in order. Renamed into place on a clean exit,
        removed on an exception. Raises DiskSpaceError, at once, when the disk can't take the whole shard."""
        with self._lock:
            assert not self._closed
            assert block not in self._finished | self._open, f"block {block} is written twice"
            self._open.add(block)
        file = self._files[block]
        partial = file.path.with_name(file.path.name + PARTIAL)
        try:
            with self._disk_errors():
                make_folders(file.path.parent)
                file.path.unlink(missing_ok=True)  # there, but not complete
                stream = partial.open("wb", buffering=0)
            with stream:
                with self._disk_errors():
                    allocate(stream.fileno(), file.file_bytes)
                shard = ShardWriter(stream.fileno(), file, self._disk_errors)
                yield shard
                shard.finish()
            with self._disk_errors():
                partial.rename(file.path)
                sync_folder(file.path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            with self._lock:
                self._open.discard(block)
            raise
        with self._lock:
            self._open.discard(block)
            self._finished.add(block)

    def _disk_errors(self) -> contextlib.AbstractContextManager[None]:
        return disk_errors(self.folder, lambda: self.missing_bytes)

    def finish(self, trunk: Mapping[str, FileSum] | None = None, source_digest: str | None = None) -> Manifest:
        """Writes the manifest, with the digest of all records and what the trunk's files are; from now on the store is
        complete. ``source_digest`` takes the place of the plan's, where it was not known before. Closes the writer."""
        assert not self._open
        assert len(self._finished) == len(self._files), "blocks are missing"
        with self._disk_errors():
            crcs = [crc for file in self._files for crc in stored_checksums(file.path, file.offsets, file.slot_bytes)]
            manifest = replace(
                self.plan,
                source_digest=self.plan.source_digest if source_digest is None else source_digest,
                digest=store_digest(crcs),
                trunk=trunk or {},
                record_checksums=b"".join(map(checksum_bytes, crcs)),
            )
            # Shards that an earlier process renamed may not be in their folders durably yet.
            for name in sorted({parent for file in self._files for parent in list(file.path.parents)[:4]}):
                sync_folder(name)
            group = {"zarr_format": 3, "node_type": "group", "attributes": {"moetier": manifest.to_json()}}
            write_durably(self.folder / METADATA, _to_json(group))
            (self.folder / PLAN).unlink()
            sync_folder(self.folder)
        self.close()
        return manifest

    def close(self) -> None:
        """Gives the folder's lock back; what is finished stays. Idempotent."""
        if not self._closed:
            self._closed = True
            os.close(self._folder_lock)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class ShardWriter:
    """One block's file under its temporary name. Used by one thread at a time."""

    def __init__(
        self, descriptor: int, file: ShardFile, disk_errors: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        self._descriptor = descriptor
        self._file = file
        self._disk_errors = disk_errors
        self._position = 0  # bytes written
        self._flushed = 0  # bytes that are on the disk, and no longer in the page cache

    @property
    def written(self) -> int:
        """Records so far: the next one is this expert's."""
        return self._position // self._file.slot_bytes

    def write(self, payload: memoryview | Bytes | bytes) -> None:
        """Appends the next expert's record, ``record_bytes`` long."""
        data = np.frombuffer(payload, np.uint8).data
        assert self.written < self._file.experts
        assert len(data) == self._file.slot_bytes - CHECKSUM_BYTES, f"{len(data)} bytes are no record"
        crc = 0
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            crc = crc32c(piece, crc)
            self._append(piece)
        self._append(memoryview(checksum_bytes(crc)))

    def finish(self) -> None:
        assert self.written == self._file.experts, f"{self.written} of {self._file.experts} experts were written"
        self._append(memoryview(self._file.make_index()))
        with self._disk_errors():
            self._flush()
            os.fsync(self._descriptor)

    def _append(self, data: memoryview) -> None:
        with self._disk_errors():
            write_all(self._descriptor, data, self._position)
            self._position += len(data)
            if self._position - self._flushed >= FLUSH_BYTES:
                self._flush()

    def _flush(self) -> None:
        os.fdatasync(self._descriptor)
        os.posix_fadvise(self._descriptor, self._flushed, self._position - self._flushed, os.POSIX_FADV_DONTNEED)
        self._flushed = self._position


def array_metadata(plan: Manifest, array: str) -> bytes:
    """``zarr.json`` of an array, as zarr itself writes it."""
    shape = plan.shape(array)
    made = zarr.create_array(
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
    return made.metadata.to_buffer_dict(default_buffer_prototype())[METADATA].to_bytes()


def is_complete(file: ShardFile) -> bool:
    """Whether a shard was written to its end: its size, its index, and a place for every record."""
    try:
        with file.path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size != file.file_bytes:
                return False
            return os.pread(stream.fileno(), file.index_bytes, file.data_bytes) == file.make_index()
    except FileNotFoundError:
        return False


def _lock(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TargetExistsError(
            f"Another process is converting into {folder.parent}.", "Wait until it has ended, or choose another folder."
        ) from None


def _check_target(folder: Path, plan: Manifest) -> None:
    """Passes an empty folder, and one that holds this very plan, finished or not."""
    for name in (METADATA, PLAN):
        if (folder / name).exists():
            found = _plan_in(folder / name)
            break
    else:
        found = None
        if not (strangers := sorted(p.name for p in folder.iterdir() if not p.name.endswith(PARTIAL))):
            return
        name = strangers[0]
    asked = plan.to_json()
    if found == asked:
        return
    if found is None:
        cause = f"{folder} holds something that is not a moetier store: {name}."
    else:
        differing = ", ".join(key for key in asked if found.get(key) != asked[key])
        cause = f"{folder.parent} holds another conversion, of {found.get('model')}: it differs in {differing}."
    raise TargetExistsError(cause, "Choose another folder, or remove this one first.")


def _plan_in(path: Path) -> dict[str, Any] | None:
    """The plan of a finished store or an unfinished one; None if it is neither."""
    try:
        return read_json(path) if path.name == PLAN else read_manifest(path.parent).plan.to_json()
    except StoreError:
        return None


def _to_json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
