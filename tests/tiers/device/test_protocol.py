"""The protocols of a device tier, in all interleavings of small cases, and with each of their rules broken.

The tier queues the same work, in the same order, as the protocol with leases.
"""

from __future__ import annotations

import inspect
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import device_reference
import pytest
import torch
from consumers import Consumer
from fake_device import FakeDevice, FakeEvent, FakeStream
from interleavings import Load, Store, Swap, Thread, explore
from readers import RamReader
from stores import make_plan, make_records

from moetier.tiers.device.tier import DeviceTier
from moetier.tiers.host.tier import HostTier

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
        memory |= {("buffer", 1): 0, ("buffer", 2): 0, "filling": 0}
        memory |= {(name, slot): 0 for name in ("pinned", "used", "ready") for slot in range(1, len(self._held) + 1)}
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
PROMOTE_LEASED = ("promote_leased", (3, 2, COPIED))
CASES = {
    "three misses": Case("compute", [[(1, 1)], [(2, 2)], [(3, 1)]], [0], ("replace_record", (3,)), arena=2),
    "two misses": Case("compute", [[(1, 1), (2, 2)]], [0, 0], ("replace_record", (3,)), arena=2),
    "a hit and a miss": Case("compute", [[(1, 1), (2, 2)]], [1, 3], ("replace_record", (3,)), arena=2),
    "a hit": Case("compute", [[(1, 1)]], [1, 2], PROMOTE),
    "a promoted record": Case("compute", [[(1, 3)]], [1, 2], PROMOTE),
    "a graph": Case("replay", [[(1, 2)], [(2, 1)]], [1, 2], PROMOTE),
    "three leased misses": Case("compute_leased", [[(1, 1)], [(2, 2)], [(3, 1)]], [0], ("replace_record", (3,)), 2),
    "a leased hit": Case("compute_leased", [[(1, 1)]], [1, 2], PROMOTE_LEASED),
    "a leased miss": Case("compute_leased", [[(1, 2)]], [1, 0], PROMOTE_LEASED),
    "leases that end together": Case("compute_leased", [[(1, 1), (2, 2)]], [1, 2], PROMOTE_LEASED),
    "a promoted record is leased": Case("compute_leased", [[(1, 3)]], [1, 2], PROMOTE_LEASED),
}
SLOW = {"two misses", "a promoted record", "a graph", "a leased hit", "leases that end together"}

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
    "a leased record's copy is not waited for": (
        "*([work(WAIT, ready)] if ready else []), work(USE, pair, expert)",
        "work(USE, pair, expert)",
        "a promoted record is leased",
    ),
    "a copy does not wait for a lease's end": ("    if used:\n", "    if False:\n", "three leased misses"),
    "a leased slot is not pinned": ('Store(("pinned", slot), 1)', 'Store(("pinned", slot), 0)', "a leased hit"),
    "a lease ends before others that end together": (
        """work(USE, pair, expert))
    yield from lock()
    yield from queue("computing", work(RECORD, used))
""",
        """work(USE, pair, expert))
        yield Store(("pinned", slot), 0)
    yield from lock()
    yield from queue("computing", work(RECORD, used))
""",
        "leases that end together",
    ),
    "two slots are filled at a time": (
        'yield Store("filling", 1)',
        'yield Store("filling", 0)',
        "leases that end together",
    ),
    "a buffer is filled while it is copied from": (
        "if copied and buffer == 1:",
        "if False:",
        "three leased misses",
    ),
    "a graph's misses are not looked at": (
        "for number, block in enumerate(blocks):",
        "for number, block in ():",
        "a graph",
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES],
)
def test_every_pair_is_computed_with_its_own_record(name: str) -> None:
    CASES[name].explore(device_reference)


DEAR = "two slots are filled at a time"


@pytest.mark.parametrize("what", [pytest.param(what, marks=[pytest.mark.slow] * (what == DEAR)) for what in BROKEN])
def test_a_broken_rule_is_noticed(what: str) -> None:
    old, new, case = BROKEN[what]
    source = inspect.getsource(device_reference)
    assert old in source
    broken = ModuleType("broken")
    exec(compile(source.replace(old, new), "broken", "exec"), broken.__dict__)
    with pytest.raises(AssertionError, match=r"is computed with what slot|was not computed"):
        CASES[case].explore(broken)


class TracedStream(FakeStream):
    """A stream that notes in its device's ``trace`` what is queued: its own name, the kind of work, and a number."""

    def __init__(self, device: TracedDevice, name: str) -> None:
        super().__init__(device)
        self.name, self.trace, self.numbers = name, device.trace, device.numbers

    def record_event(self) -> FakeEvent:
        event = super().record_event()
        self.trace.append((self.name, device_reference.RECORD, self.numbers.setdefault(event, len(self.numbers))))
        return event

    def wait_event(self, event: FakeEvent) -> None:
        self.trace.append((self.name, device_reference.WAIT, self.numbers[event]))
        super().wait_event(event)


class TracedDevice(FakeDevice):
    def __init__(self) -> None:
        super().__init__(random.Random(0))
        self.trace: list[tuple[str, int, int]] = []
        self.numbers: dict[FakeEvent, int] = {}
        self.slots: dict[int, int] = {}  # number of each slot, by its address
        self.copies = TracedStream(self, "copying")
        self.streams = [self.copies, TracedStream(self, "computing")]

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        slot = self.slots.setdefault(target.data_ptr(), len(self.slots))
        self.trace.append(("copying", device_reference.COPY, slot))
        super().copy(target, source)

    def compute(self, work: Callable[[], None]) -> None:
        self.trace.append(("computing", device_reference.USE, 0))
        super().compute(work)


def trace_of_the_protocol(blocks: Sequence[Sequence[int]], slots: int) -> list[tuple[str, int, int]]:
    """The work that one caller queues who leases the records of some blocks, with numbers as ``TracedDevice`` has."""
    memory: defaultdict[Hashable, int] = defaultdict(int)
    trace: list[tuple[str, int, int]] = []
    events, numbers = dict[int, int](), dict[int, int]()
    numbered = itertools.count(1)
    pairs = [[(next(numbered), expert) for expert in block] for block in blocks]
    caller = device_reference.compute_leased(pairs, slots, range(1, 16))
    streams = {name: device_reference.stream(name) for name in ("computing", "copying")}
    threads = {None: caller, **streams}
    answers: dict[Any, Any] = dict.fromkeys(threads)
    while True:
        for name, thread in threads.items():
            try:
                operation = thread.send(answers[name])
            except StopIteration:
                return trace
            answers[name] = memory[operation.place]
            match operation:
                case Swap(place, old, new):
                    answers[name] = int(memory[place] == old)
                    memory[place] = new if memory[place] == old else memory[place]
                case Store((stream, int()), value) if stream in streams:
                    kind, first, second = value >> 8, value >> 4 & 15, value & 15
                    number = {
                        device_reference.COPY: lambda second=second: numbers.setdefault(second, len(numbers)),
                        device_reference.USE: lambda: 0,
                    }.get(kind, lambda first=first: events.setdefault(first, len(events)))
                    trace.append((stream, kind, number()))
                    memory[operation.place] = value
                case Store(place, value):
                    memory[place] = value


@pytest.mark.parametrize(
    "blocks",
    [
        *([[1]], [[1], [1]], [[1], [2], [1]], [[1], [2], [3]], [[1], [2], [3], [2], [1]]),
        *([[1], [2], [1, 2]], [[1], [2], [2, 1], [3]], [[1], [2], [1, 2], [2, 3], [2, 3]]),
    ],
)
def test_the_tier_queues_the_work_of_the_protocol(blocks: list[list[int]]) -> None:
    plan = make_plan(blocks=1, experts=3, top_k=1)
    device = TracedDevice()
    with HostTier(RamReader(plan, make_records(plan)), slots={"records": 3}) as host:
        tier = DeviceTier(host, plan, slots={"records": 2}, device=device, policy="lru")
        consumer = Consumer(tier, device)
        for block in blocks:
            consumer.run(0, [expert - 1 for expert in block])
        assert device.trace == trace_of_the_protocol(blocks, 2)
        device.finish()
        tier.close()
