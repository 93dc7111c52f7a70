"""The protocol of look-ups by the device, in all interleavings of small cases, and with each of its rules broken."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from functools import partial
from types import ModuleType
from typing import Any

import device_reference
import pytest
from interleavings import Load, Thread, explore

COMPUTING, COPYING = 27, 9  # most work that is queued on each stream
EVENTS, USED, COPIED, LAST = range(1, 10), 10, 11, 12  # of the computing thread; of a promotion; of the end
Threads = Callable[[Any], list[Callable[[], Thread]]]


class Case:
    """A thread that computes, another beside it, and what slots hold when they begin."""

    def __init__(
        self,
        computes: str,
        blocks: list[list[tuple[int, int]]],
        held: list[int],
        beside: tuple[str, Any],
        arena: int = 0,
    ) -> None:
        """
        Args:
            computes: the function of the thread that computes.
            blocks: the pairs of each block.
            held: the record in each slot, or 0.
            beside: the function of the other thread, and its arguments.
            arena: the record in the arena.
        """
        self._computes, self._blocks, self._held, self._beside, self._arena = computes, blocks, held, beside, arena

    def explore(self, reference: Any) -> None:
        """Raises AssertionError if a pair is computed with another record, or is not computed, or if a thread hangs."""
        memory: dict[Hashable, int] = {"lock": 0, "generation": 0, "arena": self._arena, "copied": 0}
        for name, length in (("computing", COMPUTING), ("copying", COPYING)):
            memory |= dict.fromkeys([(name, "end"), *((name, place) for place in range(length + 1))], 0)
        memory |= {("table", expert): 0 for expert in (1, 2, 3)} | {
            ("event", number): 0 for number in range(1, LAST + 1)
        }
        for slot, record in enumerate(self._held, 1):
            memory |= {("slot", slot): record, ("holder", slot): record} | ({("table", record): slot} if record else {})
        for pair, _ in (each for block in self._blocks for each in block):
            memory |= {("found", pair): 0, ("missing", pair): 0, ("output", pair): 0}
        memory |= {("buffer", 1): 0, ("buffer", 2): 0}
        name, given = self._beside
        streams = [partial(reference.stream, name) for name in ("computing", "copying")]
        explore(
            [partial(self._compute, reference), partial(getattr(reference, name), *given), *streams], memory, (2, 3)
        )

    def _compute(self, reference: Any) -> Thread:
        yield from getattr(reference, self._computes)(self._blocks, len(self._held), EVENTS)
        yield from reference.lock()
        yield from reference.queue("computing", reference.work(reference.RECORD, LAST))
        yield from reference.unlock()
        yield from reference.wait(LAST)
        for pair, expert in (each for block in self._blocks for each in block):
            output = yield Load(("output", pair))
            assert output == expert, f"pair {pair} was not computed"


PROMOTE = ("promote", (3, 2, USED, COPIED))  # the record 3, to one of two slots
CASES = {
    "three misses": Case("compute", [[(1, 1)], [(2, 2)], [(3, 1)]], [0], ("replace_record", (3,)), arena=2),
    "two misses": Case("compute", [[(1, 1), (2, 2)]], [0, 0], ("replace_record", (3,)), arena=2),
    "a hit and a miss": Case("compute", [[(1, 1), (2, 2)]], [1, 3], ("replace_record", (3,)), arena=2),
    "a hit": Case("compute", [[(1, 1)]], [1, 2], PROMOTE),
    "a promoted record": Case("compute", [[(1, 3)]], [1, 2], PROMOTE),
    "a graph": Case("replay", [[(1, 2)], [(2, 1)]], [1, 2], PROMOTE),
}

BROKEN = {
    "a copy does not wait for the uses of its slot": ("work(WAIT, used)", "work(RECORD, used)", "a hit"),
    "computing does not wait for the copy": (
        'yield from queue("computing", work(WAIT, copied), work(PUBLISH, expert, slot))',
        'yield from queue("computing", work(PUBLISH, expert, slot))',
        "three misses",
    ),
    "a buffer is filled before its last copy has ended": ("if copied and buffer == 1:", "if False:", "two misses"),
    "the record in the arena is not looked at again": (" or before != after", "", "three misses"),
    "an evicted record is still found": ("    if evicted:\n", "    if False:\n", "three misses"),
    "the host does not wait for the look-up": (
        "        yield from unlock()\n        yield from wait(looked)\n",
        "        yield from unlock()\n",
        "three misses",
    ),
    "a promoted record is found before its copy has ended": (
        "        yield from unlock()\n        yield from wait(copied)\n",
        "        yield from unlock()\n",
        "a promoted record",
    ),
    "a slot is refilled between its look-up and its use": (
        'yield from queue("computing", *launch(block), work(RECORD, looked))',
        """yield from queue("computing", *launch(block)[: len(block)])
        yield from unlock()
        yield from lock()
        yield from queue("computing", *launch(block)[len(block) :], work(RECORD, looked))""",
        "a hit",
    ),
    "a graph's misses are not looked at": (
        "for number, block in enumerate(blocks):",
        "for number, block in ():",
        "a graph",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_pair_is_computed_with_its_own_record(name: str) -> None:
    CASES[name].explore(device_reference)


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_rule_is_noticed(what: str) -> None:
    old, new, case = BROKEN[what]
    source = inspect.getsource(device_reference)
    assert old in source
    broken = ModuleType("broken")
    exec(compile(source.replace(old, new), "broken", "exec"), broken.__dict__)
    with pytest.raises(AssertionError, match=r"is computed with what slot|was not computed"):
        CASES[case].explore(broken)
