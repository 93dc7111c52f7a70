"""Pieces of a record: stores read several at the same time, and pause between them if the record is prefetched."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from moetier.tiers.layout import CHECKSUM_BYTES
from moetier.tiers.source import interruptible_bytes

from .checksum import READ_PIECE_BYTES, crc32c

Pause = Callable[[], bool]
"""Type of a function that a read calls between two pieces of a record. See ``Store.read_into``."""

_log = logging.getLogger(__name__)


class RecordPart(NamedTuple):
    """A part of a record, which is read in pieces."""

    start: int  # offset of the part in the record
    memory: memoryview  # for the part
    payload: memoryview  # the same memory, without the record's checksum if the part includes that
    piece_bytes: int  # largest size of a single read

    def pieces(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, memoryview, memoryview]]:
        """Yield the pieces of the bytes from ``first`` to ``end`` of the part.

        For each, yields its offset in the record, its memory, and that memory without the record's checksum.
        """
        end = len(self.memory) if end is None else end
        for at in range(first, end, self.piece_bytes):
            stop = min(at + self.piece_bytes, end)
            yield self.start + at, self.memory[at:stop], self.payload[at:stop]


# reads a part; takes the CRC-32C of the record before the part, and returns that of the record up to the part's end
ReadPart = Callable[[RecordPart, int], int]


class Read(NamedTuple):
    """The read of one piece of a record."""

    threads: ThreadPoolExecutor  # threads that read from the disk that has the piece
    call: Callable[[], None]  # reads the piece
    payload: memoryview  # the memory for the piece, without the record's checksum


def read_in_pieces(view: memoryview, pause: Pause | None, read_part: ReadPart) -> int:
    """Read a record and its checksum into ``view``, in parts, with ``read_part``. Return the CRC-32C of the record.

    ``pause`` is called between two parts, as ``Store.read_into`` specifies. If it is None, there is one part.
    """
    payload = view[:-CHECKSUM_BYTES]
    start, part_bytes, crc = 0, interruptible_bytes(len(view)), 0
    while pause is not None and start < len(view):
        stop = start + part_bytes
        crc = read_part(RecordPart(start, view[start:stop], payload[start:stop], part_bytes), crc)
        start = stop
        if start < len(view) and not pause():
            pause = None  # read the rest in one part
    if start < len(view):
        crc = read_part(RecordPart(start, view[start:], payload[start:], READ_PIECE_BYTES), crc)
    return crc


def run_reads(reads: Sequence[Read], crc: int) -> int:
    """Read consecutive pieces of a record at the same time. Return the CRC-32C of the record up to their end.

    ``crc`` is the CRC-32C of the record before these pieces.
    """
    if len(reads) == 1:
        reads[0].call()
        return crc32c(reads[0].payload, crc)
    pieces = [_Piece(read.call) for read in reads]
    try:
        for read, piece in zip(reads, pieces, strict=True):
            read.threads.submit(piece.read)
    except RuntimeError:  # no thread can be started, or they have ended
        _log.debug("This thread reads what no other one can.", exc_info=True)
    try:
        # Checksum the pieces in order, while later pieces are read. This thread reads pieces that no other thread has
        # begun to read.
        for read, piece in zip(reads, pieces, strict=True):
            piece.wait()
            crc = crc32c(read.payload, crc)
    finally:
        for piece in pieces:  # no thread may write to the slot after this function has returned
            piece.end()
    return crc


class _Piece:
    """A read that is made at most once, by the first thread that begins it."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._lock = threading.Lock()  # guards: the fields below; held while the piece is read
        self._is_over = False
        self._error: BaseException | None = None

    def read(self) -> None:
        """Read the piece, unless it has been read, or ``end`` was called."""
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            try:
                self._call()
            except BaseException as error:
                self._error = error

    def wait(self) -> None:
        """Read the piece, or wait for the thread that reads it. Raises the error of the read."""
        self.read()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Wait for the thread that reads the piece. No other thread will read it."""
        with self._lock:
            self._is_over = True


def as_bytes(buffer: memoryview) -> memoryview:
    """Return a view of the same memory with one dimension and items of one byte."""
    return buffer.cast("B") if buffer.format != "B" or buffer.ndim != 1 else buffer
