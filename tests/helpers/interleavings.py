"""Explore all interleavings of the atomic operations of a few threads.

A thread is a generator that yields an operation on shared memory and is sent its result. Memory is sequentially
consistent. All data of a thread must be in local variables of its frames, because they tell its states apart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Hashable, Mapping, Sequence
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


_State = tuple[int, ...]  # number of what memory holds; threads that sleep, as bits; states of the threads' automata
_THREADS = 2  # where they begin in a state


def explore(begin: Sequence[Callable[[], Thread]], memory: Memory, servants: Collection[int] = ()) -> list[Memory]:
    """Run threads in all interleavings, and return every memory that is left at an end.

    At an end all threads have ended; ``servants`` need not. Raises AssertionError with a schedule if a thread does so,
    or if no end can be reached any more.
    """
    system = _System(begin, memory)
    first = (0, 0, *[0] * len(begin))
    states, numbers = [first], {first: 0}  # as they are found: breadth first, for short schedules
    origins: list[int | None] = [None]
    before: list[list[int]] = [[]]  # by state: the others that lead to it
    ends = []
    for this, state in enumerate(states):  # which grows
        operations = system.operations(state)
        if all(each is None or n in servants for n, each in enumerate(operations)):
            ends.append(this)
        for number, operation in enumerate(operations):
            if operation is None or state[1] >> number & 1:
                continue
            try:
                following = system.steps(state, number, operation)
            except AssertionError as error:
                schedule = _schedule(system, states, origins, this)
                raise AssertionError(f"{error}\n{schedule}\n{number}: {operation}") from error
            for after in following:
                if (found := numbers.setdefault(after, len(states))) == len(states):
                    states.append(after)
                    origins.append(this)
                    before.append([])
                if found != this:
                    before[found].append(this)
    can_end, left = set(ends), deque(ends)
    while left:
        new = {state for state in before[left.pop()] if state not in can_end}
        can_end |= new
        left += new
    stuck = next((number for number in range(len(states)) if number not in can_end), None)
    assert stuck is None, f"the threads can't end any more\n{_schedule(system, states, origins, stuck or 0)}"
    return [system.memory(states[end]) for end in ends]


class _System:
    """The threads' automata, and all that memory may hold. What an operation does to it is found out once."""

    def __init__(self, begin: Sequence[Callable[[], Thread]], memory: Memory) -> None:
        self._index = {place: index for index, place in enumerate(memory)}
        self._memories = [tuple(memory.values())]
        self._numbers = {self._memories[0]: 0}
        shared = {each: _Automaton(each) for each in begin}
        self._automata = [shared[each] for each in begin]
        self._alike = [n for n, each in enumerate(begin) if begin.count(each) > 1]
        self._done: dict[tuple[int, int, int], tuple[int, list[int]]] = {}

    def memory(self, state: _State) -> Memory:
        return dict(zip(self._index, self._memories[state[0]], strict=True))

    def operations(self, state: _State) -> list[Operation | None]:
        """Return the operation that each thread does next; None if it has ended."""
        return [own.operations[number] for own, number in zip(self._automata, state[_THREADS:], strict=True)]

    def steps(self, state: _State, number: int, operation: Operation) -> list[_State]:
        """Return the states that a thread's operation can lead to."""
        index = _THREADS + number
        key = (state[0], number, state[index])
        if key not in self._done:
            self._done[key] = self._do(*key)
        memory, own = self._done[key]
        if not own:
            return [self._ordered(memory, state[1] | 1 << number, state[_THREADS:])]
        if not (state[1] and isinstance(operation, Wake)):
            return [
                self._ordered(memory, state[1], (*state[_THREADS:index], each, *state[index + 1 :])) for each in own
            ]
        following = []
        waiting = [
            n
            for n, each in enumerate(self.operations(state))
            if each is not None and state[1] >> n & 1 and each[0] == operation.place
        ]
        for chosen in combinations(waiting, min(operation.count, len(waiting))):
            threads, asleep = list(state[_THREADS:]), state[1]
            threads[number] = own[0]
            for n in chosen:
                threads[n] = self._automata[n].next(threads[n], 0)
                asleep ^= 1 << n
            following.append(self._ordered(memory, asleep, threads))
        return following

    def _do(self, memory: int, number: int, state: int) -> tuple[int, list[int]]:
        """Return the memory after a thread's operation, and the states it can lead to; none if it sleeps."""
        automaton, results, values = self._automata[number], [0], list(self._memories[memory])
        operation = automaton.operations[state]
        index = self._index[operation[0]] if operation else 0
        now = values[index]
        match operation:
            case Load():
                results = [now]
            case Store(_, value):
                values[index] = value
            case Add(_, value):
                results, values[index] = [now], now + value
            case And(_, value):
                results, values[index] = [now], now & value
            case Swap(_, old, new):
                results = [int(now == old)]
                if now == old:
                    values[index] = new
            case Wait(_, value) if now == value:
                return memory, []
            case Clock():
                results = [0, LATE]
        after = tuple(values)
        if (found := self._numbers.setdefault(after, len(self._memories))) == len(self._memories):
            self._memories.append(after)
        return found, [automaton.next(state, result) for result in results]

    def _ordered(self, memory: int, asleep: int, threads: Sequence[int]) -> _State:
        """Return a state. Of those that differ only in the order of threads that are alike, it is always the same."""
        if self._alike:
            own, sorted_ = list(threads), sorted((threads[n], asleep >> n & 1) for n in self._alike)
            for n, (each, sleeps) in zip(self._alike, sorted_, strict=True):
                own[n] = each
                asleep = asleep & ~(1 << n) | sleeps << n
            threads = own
        return (memory, asleep, *threads)


def _schedule(system: _System, states: Sequence[_State], origins: Sequence[int | None], last: int) -> str:
    """Return the operations that lead to a state, one a line, with the number of the thread."""
    lines = []
    while (origin := origins[last]) is not None:
        number, operation = next(
            (n, operation)
            for n, operation in enumerate(system.operations(states[origin]))
            if operation is not None
            and not states[origin][1] >> n & 1
            and states[last] in system.steps(states[origin], n, operation)
        )
        lines.append(f"{number}: {operation}")
        last = origin
    return "\n".join(reversed(lines))
