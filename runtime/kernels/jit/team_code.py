"""Emit the compiled code of a team of threads, for its callers and its workers. ``team.py`` describes the protocol.

``tests/helpers/team_reference.py`` has the same algorithm in plain Python, with functions of the same names. A test
runs both in all interleavings of small cases, and compares their operations one by one.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir

from .emitter import I32, I64, POINTER, Emitter, Value, new_module

# Numbers of the words (i64) in a team's memory. Words that several threads write are in cache lines of their own.
# STATE: see below. OPENED: number of jobs so far; workers sleep on it. FINISHED: number of workers that have finished
# the job. SLEEPERS: number of workers that sleep. BUSY: 1 while a job is in progress. CALLER_SLEEPS: 1 if the caller
# sleeps on FINISHED.
STATE, OPENED, FINISHED, SLEEPERS, BUSY, CALLER_SLEEPS = 0, 8, 16, 24, 32, 40
SPIN = 48  # nanoseconds for which a worker spins before it sleeps
JOB, CONTEXT = 56, 57  # addresses of the function to run, and of its context
STOPPED = 64  # 1 if workers must end
WORKERS = 65  # number of workers
SYSCALL, CLOCK = 66, 67  # addresses of two functions of the C library
LINE, WORDS = 64, 72  # bytes of a cache line, all words

# Bits of STATE. 0 to 14: number of workers that have joined; 15: whether the job is open; 16 to 31: most workers that
# may join; 32 to 63: number of the job
JOINED, OPEN, MAX_SHIFT, NUMBER_SHIFT = 0x7FFF, 0x8000, 16, 32
MAX_WORKERS = JOINED

# A worker that sleeps takes some 50 us to wake. Python's code between two products takes less than that, so a worker
# that spins is there in time. But if another process is busy on its core, a worker that spins long uses up its share.
FIRST_SPIN, LONGEST_SPIN = 20_000, 200_000  # ns
LONGER = 2_000  # ns by which workers spin longer after one had to be woken
CALLER_SPIN = 50_000  # ns for which the caller spins before it sleeps

FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine())  # number of the system call; None if it is not known
WAIT, WAKE = 128, 129  # operations of futex, for memory of one process
_MONOTONIC = 1  # number of a clock for clock_gettime
_PAUSE = {"x86_64": "llvm.x86.sse2.pause"}
# names of the compiled functions
RUN, RUN_ALL, WORK = "moetier_team_run", "moetier_team_run_all", "moetier_team_work"


def team_module() -> ir.Module:
    """Emit ``RUN(team, function, context, workers)``, ``RUN_ALL(team, tasks, count)`` and ``WORK(team)``.

    RUN_ALL sets the first number of each task's context to 0, and calls RUN for the task. A task is three words: the
    address of a function, the address of its context, and the most workers. Workers execute WORK until the team is
    stopped.
    """
    module = new_module()
    run = _TeamEmitter(module, RUN, [POINTER, I64, I64, I64])
    _emit_run(run)
    emit = Emitter(module, RUN_ALL, [POINTER, POINTER, I64])
    team, tasks, count = emit.function.args
    with emit.loop(emit.number(0), count) as task:
        first = emit.at.mul(task, emit.number(24))
        words = [emit.load(tasks, emit.at.add(first, emit.number(8 * word)), I64) for word in range(3)]
        emit.at.store(emit.number(0), emit.at.inttoptr(words[1], I64.as_pointer()))
        emit.at.call(run.function, [team, *words])
    emit.at.ret_void()
    _emit_work(_TeamEmitter(module, WORK, [POINTER]))
    return module


class _TeamEmitter(Emitter):
    """Emitter with operations on the words of a team, whose address is the function's first argument."""

    def __init__(self, module: ir.Module, name: str, arguments: list[Any]) -> None:
        super().__init__(module, name, arguments)
        self._team = self.function.args[0]
        self._time = self.at.alloca(ir.ArrayType(I64, 2))

    def word(self, number: int) -> Value:
        """Emit the address of a word."""
        return self.pointer_at(self._team, self.number(8 * number), I64)

    def get(self, number: int) -> Value:
        """Emit an atomic load of a word."""
        return self.at.load_atomic(self.word(number), "seq_cst", 8)

    def set(self, number: int, value: Value) -> None:
        """Emit an atomic store to a word."""
        self.at.store_atomic(value, self.word(number), "seq_cst", 8)

    def is_set(self, number: int) -> Value:
        """Emit whether a word is not 0."""
        return self.at.icmp_unsigned("!=", self.get(number), self.number(0))

    def add(self, number: int, value: int) -> None:
        """Emit an atomic addition to a word."""
        self.at.atomic_rmw("add", self.word(number), self.number(value), "seq_cst")

    def swap(self, number: int, old: Value, new: Value) -> Value:
        """Emit a compare-and-swap of a word. Return whether the word was ``old``, and so is ``new`` now."""
        return self.at.extract_value(self.at.cmpxchg(self.word(number), old, new, "seq_cst", "seq_cst"), 1)

    def call(self, function: Value, context: Value) -> None:
        """Emit a call of the function at an address with a context."""
        signature = ir.FunctionType(ir.VoidType(), [I64]).as_pointer()
        self.at.call(self.at.inttoptr(function, signature), [context])

    def now(self) -> Value:
        """Emit a reading of the monotonic clock, in nanoseconds."""
        signature = ir.FunctionType(I32, [I32, POINTER]).as_pointer()
        clock = self.at.inttoptr(self.at.load(self.word(CLOCK)), signature)
        time = self.at.bitcast(self._time, POINTER)
        self.at.call(clock, [ir.Constant(I32, _MONOTONIC), time])
        seconds, nanoseconds = (self.load(time, self.number(8 * part), I64) for part in range(2))
        return self.at.add(self.at.mul(seconds, self.number(1_000_000_000)), nanoseconds)

    def futex(self, number: int, operation: int, value: Value) -> None:
        """Emit a system call: sleep while the low half of a word is ``value``, or wake ``value`` sleepers."""
        signature = ir.FunctionType(I64, [I64], var_arg=True).as_pointer()
        call = self.at.inttoptr(self.at.load(self.word(SYSCALL)), signature)
        zero, place = self.number(0), self.at.ptrtoint(self.word(number), I64)
        self.at.call(call, [self.number(FUTEX or 0), place, self.number(operation), value, zero, zero, zero])

    def pause(self) -> None:
        """Emit an instruction that saves power in a loop that spins."""
        if (name := _PAUSE.get(platform.machine())) is not None:
            self.intrinsic(name, ir.VoidType())


def _emit_run(emit: _TeamEmitter) -> None:
    at, n = emit.at, emit.number
    _, function, context, workers = emit.function.args
    with at.if_then(at.icmp_signed("<", workers, n(1))):
        emit.call(function, context)
        at.ret_void()
    with at.if_then(at.not_(emit.swap(BUSY, n(0), n(1)))):  # another thread's job is in progress
        emit.call(function, context)
        at.ret_void()
    is_lacking = _open_job(emit, function, context, workers)
    emit.call(function, context)
    closed = at.atomic_rmw("and", emit.word(STATE), n(~OPEN), "seq_cst")
    joined = at.and_(closed, n(JOINED))
    _wait_for(emit, joined)
    _adapt_spin(emit, is_lacking, at.icmp_signed("<", joined, workers))
    emit.set(BUSY, n(0))
    at.ret_void()


def _open_job(emit: _TeamEmitter, function: Value, context: Value, workers: Value) -> Value:
    """Emit the opening of a job that workers may join. Return whether some of them have to be woken for it."""
    at, n = emit.at, emit.number
    number = at.add(at.lshr(emit.get(STATE), n(NUMBER_SHIFT)), n(1))
    emit.set(FINISHED, n(0))
    emit.set(CALLER_SLEEPS, n(0))
    at.store(function, emit.word(JOB))
    at.store(context, emit.word(CONTEXT))
    open_ = at.or_(at.shl(number, n(NUMBER_SHIFT)), at.or_(at.shl(workers, n(MAX_SHIFT)), n(OPEN)))
    emit.set(STATE, open_)
    emit.add(OPENED, 1)
    awake = at.sub(at.load(emit.word(WORKERS)), emit.get(SLEEPERS))
    lacking = at.sub(workers, awake)
    is_lacking = at.icmp_signed(">", lacking, n(0))
    with at.if_then(is_lacking):
        emit.futex(OPENED, WAKE, lacking)
    return is_lacking


def _wait_for(emit: _TeamEmitter, joined: Value) -> None:
    """Emit the caller's wait until as many workers as have joined the job have finished it."""
    at, n = emit.at, emit.number
    until = at.add(emit.now(), n(CALLER_SPIN))
    with emit.while_(lambda: at.icmp_signed("!=", emit.get(FINISHED), joined)):
        emit.pause()
        with at.if_then(at.icmp_signed(">=", emit.now(), until)):
            emit.set(CALLER_SLEEPS, n(1))
            finished = emit.get(FINISHED)
            with at.if_then(at.icmp_signed("!=", finished, joined)):
                emit.futex(FINISHED, WAIT, finished)


def _adapt_spin(emit: _TeamEmitter, is_lacking: Value, is_short: Value) -> None:
    """Emit the change of the time for which workers spin. ``is_short``: fewer workers have joined than might have."""
    at, n = emit.at, emit.number
    spin = at.load_atomic(emit.word(SPIN), "monotonic", 8)
    longer = at.add(spin, n(LONGER))
    longer = at.select(at.icmp_signed("<", longer, n(LONGEST_SPIN)), longer, n(LONGEST_SPIN))
    # a worker that was awake and still did not join had lost its core to another process: it should spin less
    is_late = at.and_(is_short, at.not_(is_lacking))
    next_spin = at.select(is_lacking, longer, at.select(is_late, at.lshr(spin, n(1)), spin))
    with at.if_then(at.icmp_signed("!=", next_spin, spin)):
        at.store_atomic(next_spin, emit.word(SPIN), "monotonic", 8)


def _emit_work(emit: _TeamEmitter) -> None:
    at, n = emit.at, emit.number
    last = at.alloca(I64)  # number of the last job that this worker has joined
    at.store(n(0), last)
    with emit.while_() as serving:
        until = at.add(emit.now(), at.load_atomic(emit.word(SPIN), "monotonic", 8))
        with emit.while_() as looking:
            opened = emit.get(OPENED)
            state = emit.get(STATE)
            with at.if_then(_may_join(emit, state, last)):
                with at.if_then(emit.swap(STATE, state, at.add(state, n(1)))):
                    at.store(at.lshr(state, n(NUMBER_SHIFT)), last)
                    _emit_job(emit)
                    looking.break_()
                looking.continue_()  # another thread has changed the state
            with at.if_then(emit.is_set(STOPPED)):
                serving.break_()
            emit.pause()
            with at.if_then(at.icmp_signed(">=", emit.now(), until)):
                _sleep(emit, opened, last)
                looking.break_()
    at.ret_void()


def _may_join(emit: _TeamEmitter, state: Value, last: Value) -> Value:
    """Emit whether a worker may join a job, by the word STATE and the variable ``last``."""
    at, n = emit.at, emit.number
    is_open = at.icmp_unsigned("!=", at.and_(state, n(OPEN)), n(0))
    is_new = at.icmp_unsigned("!=", at.lshr(state, n(NUMBER_SHIFT)), at.load(last))
    most = at.and_(at.lshr(state, n(MAX_SHIFT)), n(0xFFFF))
    return at.and_(at.and_(is_open, is_new), at.icmp_unsigned("<", at.and_(state, n(JOINED)), most))


def _emit_job(emit: _TeamEmitter) -> None:
    """Emit a worker's part of a job that it has joined."""
    at, n = emit.at, emit.number
    emit.call(at.load(emit.word(JOB)), at.load(emit.word(CONTEXT)))
    emit.add(FINISHED, 1)
    with at.if_then(emit.is_set(CALLER_SLEEPS)):
        emit.futex(FINISHED, WAKE, n(1))


def _sleep(emit: _TeamEmitter, opened: Value, last: Value) -> None:
    """Emit a worker's sleep until a job is opened after those that ``opened`` counts."""
    at = emit.at
    # SLEEPERS is raised before STATE is read once more: a caller that opens a job meanwhile sees it, and wakes workers
    emit.add(SLEEPERS, 1)
    is_needed = at.or_(_may_join(emit, emit.get(STATE), last), emit.is_set(STOPPED))
    with at.if_then(at.not_(is_needed)):
        emit.futex(OPENED, WAIT, opened)
    emit.add(SLEEPERS, -1)
