"""Emit the compiled code of a team of threads, for its callers and its workers. ``team.py`` describes the protocol."""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir

from .emitter import I32, I64, POINTER, Emitter, Value, new_module

# Numbers of the words (i64) in a team's memory. Words that several threads write are in cache lines of their own.
# STATE: see below. BELL: goes up with each job; workers sleep on it. FINISHED: number of workers that have finished the
# job. SLEEPERS: number of workers that sleep. BUSY: 1 while a job is in progress. CALLER_SLEEPS: 1 if the caller sleeps
# on FINISHED.
STATE, BELL, FINISHED, SLEEPERS, BUSY, CALLER_SLEEPS = 0, 8, 16, 24, 32, 40
SPIN = 48  # nanoseconds for which a worker spins before it sleeps
JOB, CONTEXT = 56, 57  # addresses of the function to run, and of its context
STOPPED = 64  # 1 if workers must end
WORKERS = 65  # number of workers
SYSCALL, CLOCK = 66, 67  # addresses of two functions of the C library
LINE, WORDS = 64, 72  # bytes of a cache line, all words

# Bits of STATE. 0 to 14: number of workers that have joined; 15: whether the job is open; 16 to 31: most workers that
# may join; 32 to 63: number of the job
JOINED, OPEN, MOST_SHIFT, NUMBER_SHIFT = 0x7FFF, 0x8000, 16, 32
MOST_WORKERS = JOINED

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
    """Emit ``RUN(team, function, context, workers)``, ``RUN_ALL(team, steps, count)`` and ``WORK(team)``.

    RUN_ALL sets the first number of each step's context to 0, and calls RUN for the step. A step is three words: the
    address of a function, the address of its context, and the most workers. Workers execute WORK until the team is
    stopped.
    """
    module = new_module()
    run = _TeamEmitter(module, RUN, [POINTER, I64, I64, I64])
    _emit_run(run)
    emit = Emitter(module, RUN_ALL, [POINTER, POINTER, I64])
    team, steps, count = emit.function.args
    with emit.loop(emit.number(0), count) as step:
        first = emit.at.mul(step, emit.number(24))
        words = [emit.load(steps, emit.at.add(first, emit.number(8 * word)), I64) for word in range(3)]
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
        return self.place(self._team, self.number(8 * number), I64)

    def get(self, number: int) -> Value:
        """Emit an atomic load of a word."""
        return self.at.load_atomic(self.word(number), "seq_cst", 8)

    def set(self, number: int, value: Value) -> None:
        """Emit an atomic store to a word."""
        self.at.store_atomic(value, self.word(number), "seq_cst", 8)

    def add(self, number: int, value: int) -> None:
        """Emit an atomic addition to a word."""
        self.at.atomic_rmw("add", self.word(number), self.number(value), "seq_cst")

    def swap(self, number: int, old: Value, new: Value) -> Value:
        """Emit a compare-and-swap of a word. Return whether the word was ``old``, and so is ``new`` now."""
        return self.at.extract_value(self.at.cmpxchg(self.word(number), old, new, "seq_cst", "seq_cst"), 1)

    def call(self, function: Value, context: Value) -> None:
        """Emit a call of the function at an address with a context."""
        kind = ir.FunctionType(ir.VoidType(), [I64]).as_pointer()
        self.at.call(self.at.inttoptr(function, kind), [context])

    def now(self) -> Value:
        """Emit a reading of the monotonic clock, in nanoseconds."""
        kind = ir.FunctionType(I32, [I32, POINTER]).as_pointer()
        clock = self.at.inttoptr(self.at.load(self.word(CLOCK)), kind)
        time = self.at.bitcast(self._time, POINTER)
        self.at.call(clock, [ir.Constant(I32, _MONOTONIC), time])
        seconds, nanoseconds = (self.load(time, self.number(8 * part), I64) for part in range(2))
        return self.at.add(self.at.mul(seconds, self.number(1_000_000_000)), nanoseconds)

    def futex(self, number: int, operation: int, value: Value) -> None:
        """Emit a system call: sleep while the low half of a word is ``value``, or wake ``value`` sleepers."""
        kind = ir.FunctionType(I64, [I64], var_arg=True).as_pointer()
        call = self.at.inttoptr(self.at.load(self.word(SYSCALL)), kind)
        zero, place = self.number(0), self.at.ptrtoint(self.word(number), I64)
        self.at.call(call, [self.number(FUTEX or 0), place, self.number(operation), value, zero, zero, zero])

    def pause(self) -> None:
        """Emit an instruction that saves power in a loop that spins."""
        if (name := _PAUSE.get(platform.machine())) is not None:
            self.intrinsic(name, ir.VoidType())

    def block(self, name: str) -> Value:
        """Emit a new block, to be filled later."""
        return self.function.append_basic_block(name)


def _emit_run(emit: _TeamEmitter) -> None:
    at, n = emit.at, emit.number
    _, function, context, workers = emit.function.args
    claim, publish, wake, work, alone = (emit.block(name) for name in ("claim", "publish", "wake", "work", "alone"))
    wait, turn, sleep, rest, over = (emit.block(name) for name in ("wait", "turn", "sleep", "rest", "over"))
    adapt, leave = emit.block("adapt"), emit.block("leave")
    at.cbranch(at.icmp_signed("<", workers, n(1)), alone, claim)

    at.position_at_end(claim)
    at.cbranch(emit.swap(BUSY, n(0), n(1)), publish, alone)

    at.position_at_end(alone)
    emit.call(function, context)
    at.ret_void()

    at.position_at_end(publish)
    number = at.add(at.lshr(emit.get(STATE), n(NUMBER_SHIFT)), n(1))
    emit.set(FINISHED, n(0))
    emit.set(CALLER_SLEEPS, n(0))
    at.store(function, emit.word(JOB))
    at.store(context, emit.word(CONTEXT))
    open_ = at.or_(at.shl(number, n(NUMBER_SHIFT)), at.or_(at.shl(workers, n(MOST_SHIFT)), n(OPEN)))
    emit.set(STATE, open_)
    emit.add(BELL, 1)
    awake = at.sub(at.load(emit.word(WORKERS)), emit.get(SLEEPERS))
    lacking = at.sub(workers, awake)
    is_lacking = at.icmp_signed(">", lacking, n(0))
    at.cbranch(is_lacking, wake, work)

    at.position_at_end(wake)
    emit.futex(BELL, WAKE, lacking)
    at.branch(work)

    at.position_at_end(work)
    emit.call(function, context)
    closed = at.atomic_rmw("and", emit.word(STATE), n(~OPEN), "seq_cst")
    joined = at.and_(closed, n(JOINED))
    until = at.add(emit.now(), n(CALLER_SPIN))
    at.branch(wait)

    at.position_at_end(wait)
    at.cbranch(at.icmp_signed("==", emit.get(FINISHED), joined), over, turn)

    at.position_at_end(turn)
    emit.pause()
    at.cbranch(at.icmp_signed("<", emit.now(), until), wait, sleep)

    at.position_at_end(sleep)
    emit.set(CALLER_SLEEPS, n(1))
    finished = emit.get(FINISHED)
    at.cbranch(at.icmp_signed("==", finished, joined), over, rest)

    at.position_at_end(rest)
    emit.futex(FINISHED, WAIT, finished)
    at.branch(wait)

    at.position_at_end(over)
    spin = at.load_atomic(emit.word(SPIN), "monotonic", 8)
    longer = at.add(spin, n(LONGER))
    longer = at.select(at.icmp_signed("<", longer, n(LONGEST_SPIN)), longer, n(LONGEST_SPIN))
    # a worker that was awake and still did not join had lost its core to another process: it should spin less
    is_late = at.and_(at.icmp_signed("<", joined, workers), at.not_(is_lacking))
    next_spin = at.select(is_lacking, longer, at.select(is_late, at.lshr(spin, n(1)), spin))
    at.cbranch(at.icmp_signed("!=", next_spin, spin), adapt, leave)

    at.position_at_end(adapt)
    at.store_atomic(next_spin, emit.word(SPIN), "monotonic", 8)
    at.branch(leave)

    at.position_at_end(leave)
    emit.set(BUSY, n(0))
    at.ret_void()


def _emit_work(emit: _TeamEmitter) -> None:
    at, n = emit.at, emit.number
    seen = at.alloca(I64)  # number of the last job that this worker has joined
    at.store(n(0), seen)
    begin, look, idle, pause = (emit.block(name) for name in ("begin", "look", "idle", "pause"))
    doze, sleep, wake, join, work, tell, done = (
        emit.block(name) for name in ("doze", "sleep", "wake", "join", "work", "tell", "done")
    )

    def may_join(state: Value) -> Value:
        is_open = at.icmp_unsigned("!=", at.and_(state, n(OPEN)), n(0))
        is_new = at.icmp_unsigned("!=", at.lshr(state, n(NUMBER_SHIFT)), at.load(seen))
        most = at.and_(at.lshr(state, n(MOST_SHIFT)), n(0xFFFF))
        return at.and_(at.and_(is_open, is_new), at.icmp_unsigned("<", at.and_(state, n(JOINED)), most))

    at.branch(begin)
    at.position_at_end(begin)
    until = at.add(emit.now(), at.load_atomic(emit.word(SPIN), "monotonic", 8))
    at.branch(look)

    at.position_at_end(look)
    bell = emit.get(BELL)
    state = emit.get(STATE)
    at.cbranch(may_join(state), join, idle)

    at.position_at_end(idle)
    at.cbranch(at.icmp_unsigned("!=", emit.get(STOPPED), n(0)), done, pause)

    at.position_at_end(pause)
    emit.pause()
    at.cbranch(at.icmp_signed("<", emit.now(), until), look, doze)

    at.position_at_end(doze)
    emit.add(SLEEPERS, 1)
    stays = at.or_(may_join(emit.get(STATE)), at.icmp_unsigned("!=", emit.get(STOPPED), n(0)))
    at.cbranch(stays, wake, sleep)

    at.position_at_end(sleep)
    emit.futex(BELL, WAIT, bell)
    at.branch(wake)

    at.position_at_end(wake)
    emit.add(SLEEPERS, -1)
    at.branch(begin)

    at.position_at_end(join)
    at.cbranch(emit.swap(STATE, state, at.add(state, n(1))), work, look)

    at.position_at_end(work)
    at.store(at.lshr(state, n(NUMBER_SHIFT)), seen)
    emit.call(at.load(emit.word(JOB)), at.load(emit.word(CONTEXT)))
    emit.add(FINISHED, 1)
    at.cbranch(at.icmp_unsigned("!=", emit.get(CALLER_SLEEPS), n(0)), tell, begin)

    at.position_at_end(tell)
    emit.futex(FINISHED, WAKE, n(1))
    at.branch(begin)

    at.position_at_end(done)
    at.ret_void()
