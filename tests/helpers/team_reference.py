"""The protocol of ``runtime/kernels/jit/team_code.py`` in plain Python, as threads of ``interleavings``.

Functions have the names of those that emit the compiled code. ``team.py`` describes the protocol.
"""

from __future__ import annotations

from interleavings import Add, And, Call, Clock, Load, Store, Swap, Thread, Wait, Wake

from moetier.runtime.kernels.jit.team_code import (
    BUSY,
    CALLER_SLEEPS,
    CALLER_SPIN,
    CONTEXT,
    FINISHED,
    JOB,
    JOINED,
    LONGER,
    LONGEST_SPIN,
    MAX_SHIFT,
    NUMBER_SHIFT,
    OPEN,
    OPENED,
    SLEEPERS,
    SPIN,
    STATE,
    STOPPED,
    WORKERS,
)


def run(function: int, context: int, workers: int) -> Thread:
    """Run a job in the calling thread, and in up to ``workers`` workers."""
    if workers < 1:
        yield Call(function, context)
        return
    if not (yield Swap(BUSY, 0, 1)):  # another thread's job is in progress
        yield Call(function, context)
        return
    is_lacking = yield from open_job(function, context, workers)
    yield Call(function, context)
    joined = (yield And(STATE, ~OPEN)) & JOINED
    yield from wait_for(joined)
    yield from adapt_spin(is_lacking, joined < workers)
    yield Store(BUSY, 0)


def open_job(function: int, context: int, workers: int) -> Thread:
    """Open a job that workers may join. Return whether some of them have to be woken for it."""
    number = ((yield Load(STATE)) >> NUMBER_SHIFT) + 1
    state = number << NUMBER_SHIFT | workers << MAX_SHIFT | OPEN
    yield Store(FINISHED, 0)
    yield Store(CALLER_SLEEPS, 0)
    yield Store(JOB, function)
    yield Store(CONTEXT, context)
    yield Store(STATE, state)
    yield Add(OPENED, 1)
    all_workers = yield Load(WORKERS)
    awake = all_workers - (yield Load(SLEEPERS))
    is_lacking = workers > awake
    if is_lacking:
        yield Wake(OPENED, workers - awake)
    return is_lacking


def wait_for(joined: int) -> Thread:
    """Wait until as many workers as have joined the job have finished it."""
    until = (yield Clock()) + CALLER_SPIN
    while (yield Load(FINISHED)) != joined:
        if (yield Clock()) >= until:
            yield Store(CALLER_SLEEPS, 1)
            finished = yield Load(FINISHED)
            if finished != joined:
                yield Wait(FINISHED, finished)


def adapt_spin(is_lacking: bool, is_short: bool) -> Thread:
    """Change the time for which workers spin."""
    spin = yield Load(SPIN)
    next_spin = spin
    if is_lacking:
        next_spin = min(spin + LONGER, LONGEST_SPIN)
    elif is_short:
        next_spin = spin >> 1
    if next_spin != spin:
        yield Store(SPIN, next_spin)


def work() -> Thread:
    """Join jobs until the team is stopped."""
    last = 0  # number of the last job that this worker has joined
    while True:
        now = yield Clock()
        until = now + (yield Load(SPIN))
        while True:
            opened = yield Load(OPENED)
            state = yield Load(STATE)
            if may_join(state, last):
                if (yield Swap(STATE, state, state + 1)):
                    last = state >> NUMBER_SHIFT
                    yield from job()
                    break
                continue  # another thread has changed the state
            if (yield Load(STOPPED)):
                return
            if (yield Clock()) >= until:
                yield from sleep(opened, last)
                break


def may_join(state: int, last: int) -> bool:
    """Return whether a worker may join a job."""
    most = state >> MAX_SHIFT & 0xFFFF
    return bool(state & OPEN) and state >> NUMBER_SHIFT != last and state & JOINED < most


def job() -> Thread:
    """Do a worker's part of a job that it has joined."""
    function = yield Load(JOB)
    context = yield Load(CONTEXT)
    yield Call(function, context)
    yield Add(FINISHED, 1)
    if (yield Load(CALLER_SLEEPS)):
        yield Wake(FINISHED, 1)


def sleep(opened: int, last: int) -> Thread:
    """Sleep until a job is opened after those that ``opened`` counts."""
    yield Add(SLEEPERS, 1)
    state = yield Load(STATE)
    stopped = yield Load(STOPPED)
    if not may_join(state, last) and not stopped:
        yield Wait(OPENED, opened)
    yield Add(SLEEPERS, -1)
