"""Pieces of a record are read by any threads, checked in order, and never after the read has returned."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from readers import PATIENCE

from moetier.tiers.layout import CHECKSUM_BYTES, PAGE_BYTES
from moetier.tiers.source import INTERRUPTIBLE_BYTES
from moetier.tiers.store.checksum import crc32c
from moetier.tiers.store.pieces import Read, RecordPart, as_bytes, read_in_pieces, run_reads


def test_a_part_is_divided_into_pieces_without_the_checksum() -> None:
    view = memoryview(bytearray(10 + CHECKSUM_BYTES))
    part = RecordPart(100, view, view[:-CHECKSUM_BYTES], 6)
    pieces = list(part.pieces())
    assert [(at, len(memory), len(payload)) for at, memory, payload in pieces] == [
        (100, 6, 6),
        (106, 6, 4),
        (112, 2, 0),
    ]
    assert [at for at, *_ in part.pieces(2, 9)] == [102, 108]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_checksum_is_that_of_all_pieces_in_order(threads: int) -> None:
    data, memory = bytes(range(250)), bytearray(250)
    view = memoryview(memory)

    def copy(at: int) -> None:
        view[at : at + 50] = data[at : at + 50]

    with ThreadPoolExecutor(threads) as pool:
        reads = [Read(pool, lambda at=at: copy(at), view[at : at + 50]) for at in range(0, 250, 50)]
        assert run_reads(reads, crc32c(b"before")) == crc32c(b"before" + data)
    assert memory == data


def test_a_piece_that_fails_ends_the_read_and_later_pieces_are_not_begun() -> None:
    begun, go_on = list[int](), threading.Event()

    def read(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise OSError("broken")
        go_on.wait(PATIENCE)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(go_on.wait, PATIENCE)  # so that the thread that waits for the read makes all of it
        view = memoryview(bytearray(30))
        with pytest.raises(OSError, match="broken"):
            run_reads([Read(pool, lambda number=number: read(number), view) for number in range(3)], 0)
        go_on.set()
    assert begun == [0]


def test_a_read_pauses_between_parts_until_it_need_not_any_more() -> None:
    view = memoryview(bytearray(8 * INTERRUPTIBLE_BYTES + PAGE_BYTES))
    parts, answers = list[tuple[int, int]](), iter([True, False])

    def read_part(part: RecordPart, crc: int) -> int:
        parts.append((part.start, len(part.memory)))
        return crc + 1

    assert read_in_pieces(view, lambda: next(answers), read_part) == 3
    length = parts[0][1]
    assert parts == [(0, length), (length, length), (2 * length, len(view) - 2 * length)]
    parts.clear()
    assert read_in_pieces(view, None, read_part) == 1
    assert parts == [(0, len(view))]


def test_memory_of_any_shape_is_seen_as_bytes() -> None:
    view = memoryview(bytearray(16)).cast("I", [2, 2])
    assert (as_bytes(view).format, as_bytes(view).shape) == ("B", (16,))
