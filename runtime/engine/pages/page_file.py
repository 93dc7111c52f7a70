"""A file with the keys and values of a page, or the pages of a state: renamed once it is whole, checked when read.

    magic and version, sizes, name of the page, CRC-32C of the data     HEAD
    what the data is, as JSON
    zeros up to a multiple of ALIGNMENT bytes
    the data, and zeros up to a multiple of ALIGNMENT bytes

The name is a digest of all that the data depends on (``page_folder``). So a file is used only if it has the name that
is looked for, its whole length, and both checksums. Files are not synced: after a crash some are short or have other
bytes, and count as absent. They are read and written past the page cache where the file system can do that.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from moetier.tiers.store.atomic import PARTIAL, write_all
from moetier.tiers.store.checksum import crc32c

ALIGNMENT = 4096  # bytes; O_DIRECT reads and writes multiples of it, at multiples of it in file and memory
NAME_BYTES = 32
PIECE = 1 << 20  # most bytes of one write
LARGEST_KEPT = 16 << 20  # bytes of memory that is used again; a state takes more, but is seldom read or written
MAX_BYTES = 1 << 30  # of a file; a longer one is no page
# magic, version, bytes of the JSON, bytes of the data, CRC-32C of the data, name, CRC-32C of all this and the JSON
HEAD = struct.Struct("<8sIIQI32sI")
MAGIC, VERSION = b"moetierP", 1


@dataclass(frozen=True, slots=True)
class Payload:
    """Bytes of a page, and what they are: ``layout`` is written as JSON, and means something to the runner alone."""

    layout: Any
    data: memoryview


class FileContents(NamedTuple):
    """The contents of a file, and the memory that holds them. Release the payload before the memory is given back."""

    payload: Payload
    memory: mmap.mmap


class PageBytes(Protocol):
    """Memory of pages whose bytes can be saved and restored."""

    @property
    def layout(self) -> Sequence[Any]:
        """The parts of a page, in the order in which they are saved, for JSON. Each has ``token_bytes``."""

    def save_page(self, page: int, tokens: int, data: memoryview) -> None:
        """Write the first ``tokens`` tokens of a page into ``data``. Called on another thread than the engine's."""

    def restore_page(self, page: int, tokens: int, layout: Any, data: memoryview) -> bool:
        """Write into a page what ``save_page`` has written. Return False if that does not fit this memory."""


class DamagedFileError(Exception):
    """A file is not the page that it should be, or not all of it."""


class Buffers:
    """Memory for whole files, which begins at a multiple of ALIGNMENT. Thread-safe.

    Up to LARGEST_KEPT bytes are used again, as new memory is slow.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}

    def take(self, size: int) -> mmap.mmap:
        """Return memory of at least ``size`` bytes."""
        size = 1 << max(size - 1, ALIGNMENT - 1).bit_length()  # a few sizes; what is not written takes no memory
        with contextlib.suppress(KeyError, IndexError):
            return self._free[size].pop()
        return mmap.mmap(-1, size)

    def release(self, memory: mmap.mmap) -> None:
        """Let memory be taken again."""
        if len(memory) > LARGEST_KEPT:
            return  # the kernel takes it back once nothing refers to it
        self._free.setdefault(len(memory), []).append(memory)


def head_bytes(layout: Any) -> int:
    """Return the offset of the data in a file."""
    return _whole(HEAD.size + len(_json(layout)))


def file_bytes(layout: Any, size: int) -> int:
    """Return the size of a page file, with its header, for ``size`` bytes of data."""
    return _whole(head_bytes(layout) + size)


def write_file(
    path: Path, name: bytes, payload: Payload, memory: mmap.mmap, before_piece: Callable[[int], None] = lambda _: None
) -> int:
    """Write a page to ``path``. Return the size of the file. Raises OSError; then there is no file.

    Args:
        path: of the file. One that exists is replaced.
        name: of the page, NAME_BYTES.
        payload: its data is at ``head_bytes(layout)`` in ``memory``.
        memory: has room for the whole file.
        before_piece: called before each write with its size; it may wait. If it waits for long between two, another
            process may remove the unfinished file.
    """
    text = _json(payload.layout)
    begin, size = head_bytes(payload.layout), len(payload.data)
    head = HEAD.pack(MAGIC, VERSION, len(text), size, crc32c(payload.data), name, 0)[:-4]
    end, total = begin + size, _whole(begin + size)
    memory[:begin] = (head + crc32c(text, crc32c(head)).to_bytes(4, "little") + text).ljust(begin, b"\0")
    memory[end:total] = bytes(total - end)
    partial = path.with_name(f"{path.name}.{os.urandom(4).hex()}{PARTIAL}")  # other processes may write the same page
    before_piece(min(PIECE, total))
    with _opened(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as (descriptor, is_direct):
        try:
            view = memoryview(memory)
            for at in range(0, total, PIECE):
                size = min(PIECE, total - at)
                if at:
                    before_piece(size)
                write_all(descriptor, view[at : at + size], at)
            if not is_direct:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            partial.rename(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
    return total


def read_file(path: Path, name: bytes, buffers: Buffers) -> FileContents:
    """Read the file of the page ``name`` into memory of ``buffers``, to which the caller gives it back.

    Raises DamagedFileError if the file is not that page, and OSError, FileNotFoundError above all.
    """
    # what is no file is opened at once, a pipe too, and is refused as it has no size or can't be read
    with _opened(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as (descriptor, is_direct):
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            raise DamagedFileError("a file of another user")
        size = status.st_size
        if size % ALIGNMENT or not 0 < size <= MAX_BYTES:
            raise DamagedFileError(f"{size:,} bytes")
        memory = buffers.take(size)
        try:
            done = 0
            while done < size and (count := os.preadv(descriptor, [memoryview(memory)[done:size]], done)):
                done += count
            if not is_direct:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            return FileContents(_checked(memory, done, name), memory)
        except BaseException:
            buffers.release(memory)
            raise


def _checked(memory: mmap.mmap, size: int, name: bytes) -> Payload:
    """Return the page in the first ``size`` bytes of ``memory``. Raises DamagedFileError."""
    magic, version, text_bytes, data_bytes, crc, stored, head_crc = HEAD.unpack(memory[: HEAD.size])
    if (magic, version) != (MAGIC, VERSION):
        raise DamagedFileError("another format")
    begin = _whole(HEAD.size + text_bytes)
    if size != _whole(begin + data_bytes):
        raise DamagedFileError(f"{size:,} bytes in place of {_whole(begin + data_bytes):,}")
    text = memory[HEAD.size : HEAD.size + text_bytes]
    data = memoryview(memory)[begin : begin + data_bytes]
    if crc32c(text, crc32c(memory[: HEAD.size - 4])) != head_crc or crc32c(data) != crc:
        raise DamagedFileError("a wrong checksum")
    if stored != name:
        raise DamagedFileError("another page")
    return Payload(json.loads(text), data)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[tuple[int, bool]]:
    """Open a file, past the page cache if that is possible. Yield its descriptor, and whether it is."""
    is_direct = True
    try:
        descriptor = os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        is_direct = False
        descriptor = os.open(path, (flags & ~os.O_EXCL) | os.O_CLOEXEC, 0o600)  # the first call may have made it
    try:
        yield descriptor, is_direct
    finally:
        os.close(descriptor)


def _json(layout: Any) -> bytes:
    return json.dumps(layout, separators=(",", ":")).encode()


def _whole(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
