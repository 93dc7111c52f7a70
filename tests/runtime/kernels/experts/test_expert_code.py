"""Look-up and proof of experts beside an arena's owner, in all interleavings: emitted code, and plain Python."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import directory_reference
import pytest
from interleavings import Load, Store, Thread, explore, together
from interpreted import interpret
from llvmlite import ir
from stores import layout_of, make_plan

from moetier.runtime.kernels.experts.expert_code import (
    FIND,
    PROVE,
    FindContext,
    ProveContext,
    find_module,
    prove_module,
)
from moetier.runtime.kernels.experts.expert_kernels import RESIDENT_FIELDS
from moetier.tiers.arena.directory import Directory
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import Residents

MANIFEST = make_plan(blocks=1, experts=4, top_k=2, layout=layout_of(16, 16))
ARENA = ArenaLayout.of(MANIFEST, {"records": 2})
A, B, C, _ = (ExpertKey(0, expert) for expert in range(4))
TABLE = 8 * ARENA.header_words
RECORDS, SLOT_BYTES = 1 << 20, 64
RESIDENTS = Residents(ARENA.keys, TABLE, TABLE + 8 * ARENA.keys, 0, ARENA.slots, RECORDS, SLOT_BYTES, None)
HALVES = ("first half", "second half")  # of a record in a slot; each is the number of the record's expert
Found = Sequence[tuple[int, int]]


class Words:
    """Words of a directory, whose stores are noted by the number of the word."""

    def __init__(self, words: memoryview, stores: list[Store], first: int = 0) -> None:
        self._words, self._stores, self._first = words, stores, first

    def __len__(self) -> int:
        return self._words.nbytes

    def cast(self, form: Any) -> Words:
        return Words(self._words.cast(form), self._stores)

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return Words(self._words[place], self._stores, self._first + (place.start or 0))
        return self._words[place]

    def __setitem__(self, place: int, value: int) -> None:
        self._words[place] = value
        self._stores.append(Store(self._first + place, value))


class Arena:
    """An arena of two slots: A is in slot 0, B in slot 1. ``stores`` are those of its owner, which refills slot 0."""

    def __init__(self, *refills: tuple[ExpertKey, bool]) -> None:
        memory = memoryview(bytearray(ARENA.directory_bytes))
        directory = Directory.create(memory, ARENA)
        for slot, key in enumerate((A, B)):
            directory.begin_fill(slot, None)
            directory.complete_fill(slot, key)
        self.memory: dict[Any, int] = dict(enumerate(memory.cast("q")))
        self.memory |= {f"{half} {slot}": slot for half in HALVES for slot in range(2)} | {"proved": 0}
        self.stores: list[Store] = []
        directory, held = Directory(Words(memory, self.stores), ARENA), A  # type: ignore[arg-type] # like a memoryview
        for key, succeeds in refills:
            directory.begin_fill(0, held)
            self.stores += [Store(f"{half} 0", key.expert) for half in HALVES]
            directory.complete_fill(0, key) if succeeds else directory.abort_fill(0)
            held = key if succeeds else None

    def explore(self, experts: Sequence[int], find: Callable[..., Thread], prove: Callable[..., Thread]) -> set[int]:
        """Explore a reader beside the owner. Return the numbers of proved experts that were seen.

        Raises AssertionError if a reader proves another record than the one that it wanted.
        """
        reader = partial(read, experts, find, prove)
        return {memory["proved"] for memory in explore([partial(iter_stores, self.stores), reader], self.memory)}


def iter_stores(stores: Sequence[Store]) -> Thread:
    for store in stores:  # noqa: UP028 # a list can't be sent results
        yield store


def read(experts: Sequence[int], find: Callable[..., Thread], prove: Callable[..., Thread]) -> Thread:
    """Compute with the records of experts, if they are found: here, load both halves of each."""
    found: Found = yield from find(experts, RESIDENTS)
    if len(found) < len(experts):
        return
    loaded: list[int] = []
    for slot, _ in found:
        for half in HALVES:
            value = yield Load(f"{half} {slot}")
            loaded = [*loaded, value]
    proved = yield from prove(found, RESIDENTS)
    if proved == len(experts):
        assert loaded == [expert for expert in experts for _ in HALVES], "it has computed with another record"
        yield Store("proved", proved)


@pytest.fixture(scope="module")
def functions() -> dict[str, ir.Function]:
    return {function.name: function for module in (find_module(), prove_module()) for function in module.functions}


def emitted_find(function: ir.Function, experts: Sequence[int], residents: Residents) -> Thread:
    """Run FIND. Jobs must be those of the experts that it has found."""
    context, wanted, jobs, slots, seen = (ADDRESS * n for n in range(1, 6))
    count = len(experts)
    assert FindContext._fields[RESIDENT_FIELDS] == residents._fields[: len(residents.numbers)]
    numbers = dict(zip(FindContext._fields[RESIDENT_FIELDS], residents.numbers, strict=True))
    given = FindContext(top_k=count, wanted=wanted, **numbers, jobs=jobs, found_slots=slots, found_generations=seen)
    private = words(context, given) | words(wanted, experts)
    private |= words(jobs, [0] * 3 * count) | words(slots, [0] * count) | words(seen, [0] * count)
    yield from interpret(function, (context,), private)
    found = [(private[slots + 8 * n], private[seen + 8 * n]) for n in range(private[context])]
    for n, (slot, _) in enumerate(found):
        job = [private[jobs + 24 * n + 8 * field] for field in range(3)]
        assert job == [RECORDS + SLOT_BYTES * slot, n, 1]
    return found


def emitted_prove(function: ir.Function, found: Found, residents: Residents) -> Thread:
    context, slots, seen = (ADDRESS * n for n in range(1, 4))
    given = ProveContext(top_k=len(found), generations=residents.generations, found_slots=slots, found_generations=seen)
    private = words(context, given)
    private |= words(slots, [slot for slot, _ in found]) | words(seen, [generation for _, generation in found])
    yield from interpret(function, (context,), private)
    return private[context]


ADDRESS = 1 << 30  # of a reader's first array; each is as far from the next


def words(address: int, values: Sequence[int]) -> dict[int, int]:
    return {address + 8 * n: value for n, value in enumerate(values)}


OWNERS = {
    "another record, and the first one again": Arena((C, True), (A, True)),
    "a fill that fails, and the same record again": Arena((C, False), (A, True)),
}


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("experts", [[A.expert], [B.expert, A.expert], [C.expert], [4], [-1]], ids=str)
def test_the_emitted_code_and_the_reference_prove_only_the_record_that_was_wanted(
    experts: list[int], owner: str, functions: dict[str, ir.Function]
) -> None:
    """In all interleavings with the stores of an arena's owner, they do the same operation at every step."""

    def find(*arguments: Any) -> Thread:
        return together(directory_reference.find(*arguments), emitted_find(functions[FIND], *arguments))

    def prove(*arguments: Any) -> Thread:
        return together(directory_reference.prove(*arguments), emitted_prove(functions[PROVE], *arguments))

    proved = OWNERS[owner].explore(experts, find, prove)
    is_there = experts[-1] == A.expert or (experts[-1] == C.expert and "another" in owner)
    assert proved == ({0, len(experts)} if is_there else {0})


BROKEN = {
    "the slot is not looked up again": ("if now != slot or generation & 1:", "if generation & 1:"),
    "the slot is looked up again before its generation is read": (
        "        now = yield Load(residents.table // 8 + expert)\n",
        "        now = yield Load(residents.table // 8 + expert)\n"
        "        generation = yield Load(residents.generations // 8 + slot)\n",
    ),
    "generations are not compared": ("same += now == generation", "same += 1"),
}


@pytest.mark.parametrize("error", BROKEN)
def test_an_error_in_the_reference_is_found(error: str) -> None:
    right, wrong = BROKEN[error]
    source = inspect.getsource(directory_reference)
    assert right in source
    broken = ModuleType("broken")
    exec(source.replace(right, wrong), vars(broken))
    with pytest.raises(AssertionError, match="another record"):
        OWNERS["another record, and the first one again"].explore([A.expert], broken.find, broken.prove)


def test_generations_that_are_compared_before_the_products_are_found() -> None:
    """The proof is made by the look-up here, before the record is loaded."""

    def find(*arguments: Any) -> Thread:
        found = yield from directory_reference.find(*arguments)
        same = yield from directory_reference.prove(found, RESIDENTS)
        return found if same == len(found) else []

    def prove(found: Found, _: Residents) -> Thread:
        yield from ()
        return len(found)

    with pytest.raises(AssertionError, match="another record"):
        OWNERS["another record, and the first one again"].explore([A.expert], find, prove)
