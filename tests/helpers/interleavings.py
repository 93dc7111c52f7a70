"""Explore all interleavings of the atomic operations of a few threads.

A thread is a generator that yields an operation on shared memory and is sent its result. Memory is sequentially
consistent. All data of a thread must be in local variables of its frames, because they tell its states apart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Hashable, Iterator, Mapping, Sequence
from itertools import combinations
from types import GeneratorType
from typing import Any, NamedTuple

LATE = 1 << 40  # the time of a clock once any deadline has passed, in nanoseconds


class Load(NamedTuple):
    place: Hashable


class Store(NamedTuple):
    place: Hashable
    value: int


class Add(NamedTuple):
    """Result: the value before."""

    place: Hashable
    value: int


class And(NamedTuple):
    """Result: the value before."""

    place: Hashable
    value: int


class Swap(NamedTuple):
    """Compare-and-swap. Result: whether the value was ``old``."""

    place: Hashable
    old: int
    new: int


class Wait(NamedTuple):
    """Sleep until a thread wakes this one, unless the value differs from ``value`` already (futex)."""

    place: Hashable
    value: int


class Wake(NamedTuple):
    """Wake ``count`` of the threads that sleep on a place; which of them is explored too."""

    place: Hashable
    count: int


class Clock(NamedTuple):
    """Result: 0 or LATE; both are explored."""


class Call(NamedTuple):
    """Call of another function; see ``calling``."""

    function: int
    context: int


Operation = Load | Store | Add | And | Swap | Wait | Wake | Clock | Call
Thread = Generator[Operation, int, Any]
Memory = Mapping[Hashable, int]


def calling(thread: Thread, functions: Mapping[int, Callable[[int], Thread]]) -> Thread:
    """Run a thread whose calls are replaced by the operations of ``functions``."""
    result = None
    while True:
        try:
            operation = thread.send(result)  # type: ignore[arg-type] # None begins
        except StopIteration as end:
            return end.value
        if isinstance(operation, Call):
            yield from functions[operation.function](operation.context)
            result = 0
        else:
            result = yield operation


def together(one: Thread, other: Thread) -> Thread:
    """Run two threads as one; both must do the same operations, with the same result at the end."""
    result = None
    while True:
        done: list[Any] = []
        for thread in (one, other):
            try:
                done.append(thread.send(result))  # type: ignore[arg-type] # None begins
            except StopIteration as end:
                done.append(("end", end.value))
        assert done[0] == done[1], f"{done[0]} in one, {done[1]} in the other"
        if done[0][:1] == ("end",):
            return done[0][1]
        result = yield done[0]


class _Automaton:
    """States of one thread, found by running it, with the operation that the thread does next in each of them."""

    def __init__(self, begin: Callable[[], Thread]) -> None:
        self._begin = begin
        self.operations: list[Operation | None] = []  # by state; None at the end
        self._histories: list[tuple[int, ...]] = []  # results that lead to a state
        self._states: dict[Hashable, int] = {}
        self._next: dict[tuple[int, int], int] = {}
        self._run(())  # state 0

    def next(self, state: int, result: int) -> int:
        """Return the state after the operation of a state, which had a result."""
        if (state, result) not in self._next:
            self._next[state, result] = self._run((*self._histories[state], result))
        return self._next[state, result]

    def _run(self, history: tuple[int, ...]) -> int:
        thread, operation = self._begin(), None
        try:
            operation = next(thread)
            for result in history:
                operation = thread.send(result)
        except StopIteration:
            operation = None
        if (frozen := _frozen(thread)) not in self._states:
            self._states[frozen] = len(self.operations)
            self.operations.append(operation)
            self._histories.append(history)
        state = self._states[frozen]
        assert self.operations[state] == operation, "something that a thread knows is not in a local variable"
        return state


def _frozen(value: Any) -> Hashable:
    """Return what tells the states of a value apart: of a generator, where it is and its local variables."""
    if isinstance(value, GeneratorType):
        frame = value.gi_frame
        return frame and (frame.f_lasti, _frozen(dict(frame.f_locals)), _frozen(value.gi_yieldfrom))
    if isinstance(value, Mapping):
        return tuple(sorted((str(key), _frozen(each)) for key, each in value.items() if not callable(each)))
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    return value if isinstance(value, int | str | None) else id(value)


class _State(NamedTuple):
    memory: tuple[int, ...]
    threads: tuple[int, ...]  # states of their automata
    asleep: frozenset[int]


def explore(begin: Sequence[Callable[[], Thread]], memory: Memory, servants: Collection[int] = ()) -> list[Memory]:
    """Run threads in all interleavings, and return every memory that is left at an end.

    At an end all threads have ended; ``servants`` need not. Raises AssertionError with a schedule if a thread does so,
    or if no end can be reached any more.
    """
    system = _System(begin, [*memory])
    first = _State(tuple(memory.values()), (0,) * len(begin), frozenset())
    origins: dict[_State, _State | None] = {first: None}
    before: dict[_State, list[_State]] = {first: []}  # all states that lead to a state
    left, ends = deque([first]), []
    while left:  # breadth first, for short schedules
        state = left.popleft()
        operations = system.operations(state)
        if all(each is None or n in servants for n, each in enumerate(operations)):
            ends.append(state)
        for number, operation in enumerate(operations):
            if operation is None or number in state.asleep:
                continue
            try:
                following = [*system.steps(state, number, operation)]
            except AssertionError as error:
                raise AssertionError(f"{error}\n{_schedule(system, state, origins)}\n{number}: {operation}") from error
            for after in following:
                if after not in origins:
                    origins[after], before[after] = state, []
                    left.append(after)
                before[after].append(state)
    can_end, left = set(ends), deque(ends)
    while left:
        new = {state for state in before[left.pop()] if state not in can_end}
        can_end |= new
        left += new
    stuck = next((state for state in origins if state not in can_end), None)
    assert stuck is None, f"the threads can't end any more\n{_schedule(system, stuck, origins)}"
    return [dict(zip(memory, state.memory, strict=True)) for state in ends]


class _System:
    def __init__(self, begin: Sequence[Callable[[], Thread]], places: list[Hashable]) -> None:
        self._index = {place: index for index, place in enumerate(places)}
        shared = {each: _Automaton(each) for each in begin}
        self._automata = [shared[each] for each in begin]
        self._alike = [n for n, each in enumerate(begin) if begin.count(each) > 1]

    def operations(self, state: _State) -> list[Operation | None]:
        """Return the operation that each thread does next; None if it has ended."""
        return [own.operations[number] for own, number in zip(self._automata, state.threads, strict=True)]

    def steps(self, state: _State, number: int, operation: Operation) -> Iterator[_State]:
        """Yield the states that a thread's operation can lead to."""
        results, woken, asleep = [0], [()], state.asleep
        memory = list(state.memory)
        index = self._index[operation[0]] if operation else 0
        now = memory[index]
        match operation:
            case Load():
                results = [now]
            case Store(_, value):
                memory[index] = value
            case Add(_, value):
                results, memory[index] = [now], now + value
            case And(_, value):
                results, memory[index] = [now], now & value
            case Swap(_, old, new):
                results = [int(now == old)]
                if now == old:
                    memory[index] = new
            case Wait(_, value):
                if now == value:
                    yield self._ordered(memory, state.threads, asleep | {number})
                    return
            case Wake(place, count):
                waiting = [n for n in asleep if self.operations(state)[n][0] == place]  # type: ignore[index]
                woken = [*combinations(waiting, min(count, len(waiting)))]
            case Clock():
                results = [0, LATE]
        for result in results:
            for chosen in woken:
                threads = list(state.threads)
                for n, own in ((number, result), *((n, 0) for n in chosen)):
                    threads[n] = self._automata[n].next(threads[n], own)
                yield self._ordered(memory, threads, asleep.difference(chosen))

    def _ordered(self, memory: Sequence[int], threads: Sequence[int], asleep: frozenset[int]) -> _State:
        """Return a state. Of those that differ only in the order of threads that are alike, it is always the same."""
        if self._alike:
            threads, sorted_ = list(threads), sorted((threads[n], n in asleep) for n in self._alike)
            for n, (own, _) in zip(self._alike, sorted_, strict=True):
                threads[n] = own
            asleep = asleep.difference(self._alike).union(
                n for n, (_, sleeps) in zip(self._alike, sorted_, strict=True) if sleeps
            )
        return _State(tuple(memory), tuple(threads), asleep)


def _schedule(system: _System, state: _State, origins: Mapping[_State, _State | None]) -> str:
    """Return the operations that lead to a state, one a line, with the number of the thread."""
    lines = []
    while (origin := origins[state]) is not None:
        number = next(
            n
            for n, operation in enumerate(system.operations(origin))
            if operation is not None and state in system.steps(origin, n, operation)
        )
        lines.append(f"{number}: {system.operations(origin)[number]}")
        state = origin
    return "\n".join(reversed(lines))
