"""Order of the words that an arena's owner writes: what readers see in between, and what a kill leaves."""

from __future__ import annotations

import fcntl
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations_with_replacement
from typing import Any

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integrity import check_integrity
from readers import RamReader
from stores import layout_of, make_plan, make_records

from moetier.tiers.arena.arena import SEALS, Arena
from moetier.tiers.arena.directory import Directory
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.errors import ArenaError, ClosedError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey

MANIFEST = make_plan(blocks=1, experts=4, top_k=2, layout=layout_of(16, 16))
RECORDS = make_records(MANIFEST)
A, B, C, _ = RECORDS
LAYOUT = ArenaLayout.of(MANIFEST, {"records": 2})
SLOT_BYTES = LAYOUT.slot_bytes(0)


class Watched:
    """Words of a directory that call ``written`` after each write and ``read`` before each read."""

    def __init__(self, words: Any, written: Callable[[], None], read: Callable[[], None]) -> None:
        self._words = words
        self._written = written
        self._read = read

    def __getitem__(self, number: int) -> int:
        self._read()
        word: int = self._words[number]
        return word

    def __setitem__(self, number: int, word: int) -> None:
        self._words[number] = word
        self._written()

    def release(self) -> None:
        self._words.release()


def watch(directory: Directory, *, written: Callable[[], None] = int, read: Callable[[], None] = int) -> None:
    for name in ("_table", "_generations", "_contents"):
        setattr(directory, name, Watched(getattr(directory, name), written, read))


def stored(key: ExpertKey) -> bytes:
    record = RECORDS[key]
    return record + google_crc32c.value(record).to_bytes(CHECKSUM_BYTES, "little")


Step = tuple[
    ExpertKey | None, int, ExpertKey, bool
]  # what was in a slot, the slot, what is read into it; whether it is

RETURN: list[Step] = [(A, 0, C, True), (C, 0, A, True)]  # into the slot where it was
MOVE: list[Step] = [(A, 0, C, True), (B, 1, A, True)]
FAIL: list[Step] = [(A, 0, C, False), (None, 0, A, True)]


def life(steps: list[Step]) -> list[bytes]:
    """Return the arena after every word that its owner writes. At first A is in slot 0 and B in slot 1."""
    arena = Arena.create(LAYOUT)
    descriptor = arena.export()
    states: list[bytes] = []

    def snapshot() -> None:
        states.append(os.pread(descriptor, LAYOUT.nbytes, 0))

    def do(old: ExpertKey | None, slot: int, key: ExpertKey, succeeds: bool) -> None:
        arena.directory.begin_fill(slot, old)
        data, half = stored(key), SLOT_BYTES // 2
        arena.slot(slot)[:half] = data[:half]
        snapshot()
        if succeeds:
            arena.slot(slot)[half:] = data[half:]
            snapshot()
            arena.directory.complete_fill(slot, key)
        else:
            arena.directory.abort_fill(slot)

    do(None, 0, A, True)
    do(None, 1, B, True)
    states.clear()
    snapshot()
    watch(arena.directory, written=snapshot)
    for step in steps:
        do(*step)
    os.close(descriptor)
    arena.close()
    return states


def seen(states: list[bytes], find: Callable[[Directory, ExpertKey], tuple[int, int] | None]) -> Counter[str]:
    """How often a reader of A, whose reads fall between the owner's words in every possible way, was right, wrong, and
    had to throw away what it had read."""
    now = bytearray(LAYOUT.directory_bytes)
    directory = Directory(memoryview(now), LAYOUT)
    times: Iterator[int]

    def read() -> None:
        now[:] = states[next(times)][: LAYOUT.directory_bytes]

    def half(slot: int, number: int) -> bytes:
        start = LAYOUT.offset(slot) + number * (SLOT_BYTES // 2)
        return states[next(times)][start : start + SLOT_BYTES // 2]

    watch(directory, read=read)
    count: Counter[str] = Counter()
    right = stored(A)
    for schedule in combinations_with_replacement(range(len(states)), 6):
        times = iter(schedule)
        found = find(directory, A)
        if found is not None:
            slot, generation = found
            record = half(slot, 0) + half(slot, 1)
            if directory.generation(slot) != generation:
                count["thrown"] += 1
            else:
                count["right" if record == right else "wrong"] += 1
    return count


def hasty(directory: Directory, key: ExpertKey) -> tuple[int, int] | None:
    """Look up a key without comparing the slot again: a wrong reader."""
    slot = directory._table[LAYOUT.first_keys[key.block] + key.expert]
    if slot < 0:
        return None
    generation = directory.generation(slot)
    return None if generation & 1 else (slot, generation)


@pytest.mark.parametrize("steps", [RETURN, MOVE, FAIL], ids=["return", "move", "fail"])
def test_a_record_that_was_proved_was_the_keys_all_the_while(steps: list[Step]) -> None:
    states = life(steps)
    count = seen(states, Directory.find)
    assert count["wrong"] == 0
    assert count["right"] > 0
    assert count["thrown"] > 100
    if steps is not FAIL:
        assert seen(states, hasty)["wrong"] > 0, "this test finds nothing"


def left(content: bytes, seals: int = SEALS) -> int:
    """Make the memory file of a dead owner."""
    descriptor = os.memfd_create("left", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, content)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def take(content: bytes) -> HostTier:
    descriptor = left(content)
    try:
        return HostTier(
            RamReader(MANIFEST, RECORDS), slots={"records": 2}, loaders=1, arena=Arena.reclaim(descriptor, MANIFEST)
        )
    finally:
        os.close(descriptor)


def use(tier: HostTier, experts: Sequence[int] = (0, 1, 2, 3)) -> None:
    for _ in range(2):
        for lease in tier.acquire([ExpertKey(0, expert) for expert in experts]):
            assert bytes(lease.record) == RECORDS[lease.key]
    check_integrity(tier)


@pytest.mark.parametrize("steps", [RETURN, MOVE, FAIL], ids=["return", "move", "fail"])
def test_an_owner_killed_behind_any_word_leaves_all_but_the_slot_that_it_was_filling(steps: list[Step]) -> None:
    generations = [0, 0]
    recovered = Counter[int]()
    for content in life(steps):
        with take(content) as tier:
            descriptor = tier.export()
            directory = Arena.map(descriptor, tier.layout).directory
            os.close(descriptor)
            recovered[tier.recovered] += 1
            assert sum(directory.find(key) is not None for key in RECORDS) == tier.recovered
            for slot in range(2):
                generation = directory.generation(slot)
                assert generation >= generations[slot], "a reader of before would take it for the old record"
                generations[slot] = generation
            use(tier)
    assert recovered.keys() == {1, 2}


WORDS = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2, 2**63, 2**64 - 2, 2**64 - 1])


@settings(max_examples=60, deadline=None)
@given(
    table=st.lists(WORDS, min_size=4, max_size=4), generations=st.lists(WORDS, min_size=2, max_size=2), data=st.data()
)
def test_a_directory_of_nonsense_is_taken_back_too(
    table: list[int], generations: list[int], data: st.DataObject
) -> None:
    own = [LAYOUT.first_keys[A.block] + A.expert, LAYOUT.first_keys[B.block] + B.expert]
    contents = [data.draw(st.just(number) | st.integers(4, 2**64 - 1)) for number in own]
    words = memoryview(bytearray(life([])[0])).cast("Q")
    start = LAYOUT.header_words
    for number, word in enumerate([*table, *generations, *contents]):
        words[start + number] = word
    with take(bytes(words)) as tier:
        whole = [not generation & 1 and number in own for generation, number in zip(generations, contents, strict=True)]
        assert tier.recovered == sum(whole)
        check_integrity(tier)
        use(tier)
        use(tier, (3, 2, 1, 0))


def test_an_arena_that_no_daemon_makes_is_not_taken() -> None:
    for count in (1, 5):  # the top-2 of 4 experts
        arena = Arena.create(ArenaLayout.of(MANIFEST, {"records": count}))
        descriptor = arena.export()
        arena.close()
        with pytest.raises(ArenaError, match="do not fit the store"):
            Arena.reclaim(descriptor, MANIFEST)
        os.close(descriptor)
    descriptor = left(life([])[0][: LAYOUT.directory_bytes], 0)
    os.ftruncate(descriptor, LAYOUT.nbytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    with pytest.raises(ArenaError, match="are not allocated"):
        Arena.reclaim(descriptor, MANIFEST)
    os.close(descriptor)


def test_a_header_of_another_store_or_of_too_many_regions_is_refused() -> None:
    content = life([])[0]
    counts = struct.pack("<4Q", LAYOUT.nbytes, LAYOUT.keys, LAYOUT.slots, 1)
    assert counts in content
    hostile = content.replace(counts, counts[:24] + struct.pack("<Q", 300))
    for manifest, data, words in (
        (replace(MANIFEST, digest="1" * 64), content, "records of another store"),
        (MANIFEST, hostile, "has 300 regions, more than fit"),
    ):
        descriptor = left(data)
        with pytest.raises(ArenaError, match=words):
            Arena.reclaim(descriptor, manifest)
        os.close(descriptor)


def test_what_is_repaired_as_being_filled_is_not_found() -> None:
    arena = Arena.create(LAYOUT)
    directory = arena.directory
    for slot, key in enumerate((A, B)):
        directory.begin_fill(slot, None)
        directory.complete_fill(slot, key)
    before = directory.generation(0)
    directory.repair([(A, True), (B, False)])
    assert directory.find(A) is None
    assert directory.generation(0) == before + 1
    assert directory.find(B) == (1, 2)
    directory.complete_fill(0, A)
    assert directory.find(A) == (0, before + 2)
    arena.close()


def test_a_closed_directory_finds_nothing_and_a_retired_one_is_not_filled() -> None:
    arena = Arena.create(LAYOUT)
    directory = arena.directory
    directory.begin_fill(0, None)
    directory.complete_fill(0, A)
    assert directory.find(A) is not None
    directory.retire()
    generation = directory.generation(0)
    directory.begin_fill(0, None)
    assert directory.generation(0) == generation
    assert directory.find(A) is None
    arena.close()
    directory.repair([(A, False), (None, False)])
    with pytest.raises(ClosedError):
        directory.find(A)
