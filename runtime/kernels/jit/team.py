"""Team of threads that run kernels. The calling thread waits only for workers that have begun.

The work of a kernel is a number of items, which threads take one by one. With OpenMP all threads meet at the end: if
another process keeps one of them from running, all others wait for it. Here the calling thread takes items too. When
none is left, it waits only for workers that have *joined*, which means that they have begun to take items. A worker
that is late finds the job closed and is left out.

The word STATE of the team's memory has the number of the job, the most workers that may join, whether the job is open
and how many workers have joined. A worker joins by a compare-and-swap of the whole word, and reads the job only after
that. So it never reads a job that is over, because the caller closes the job before it waits for those that joined.

torch computes many tokens with OpenMP's threads, which are ended before a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import re
import signal
import sys
import threading
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from llvmlite import ir

from moetier.runtime.machine.memory import mapped_files
from moetier.runtime.machine.threads import usable_cpus
from moetier.tiers.errors import ExhaustedError
from moetier.tiers.threads import start_thread

from .emitter import once
from .processor import Processor, this_processor
from .team_code import (
    CLOCK,
    FIRST_SPIN,
    FUTEX,
    LINE,
    MAX_WORKERS,
    OPENED,
    RUN_ALL,
    SPIN,
    STOPPED,
    SYSCALL,
    WAKE,
    WORDS,
    WORK,
    WORKERS,
    team_module,
)

# signals that a fault in the thread itself causes, which faulthandler reports
_FATAL = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT}
# A function of OpenMP 5.0, its argument omp_pause_hard, and the name of a function that all libraries but GNU's have.
# In GNU's library, the call of the first ends the threads of the calling thread's team; in LLVM's and Intel's, it ends
# the threads of all teams.
_PAUSE, _HARD, _NOT_GNU = "omp_pause_resource_all", 2, "__kmpc_fork_call"
_TORCH = re.compile(r"/libtorch_cpu\.so[^/]*$")
_cpus = functools.cache(usable_cpus)


class Kernel(NamedTuple):
    """A compiled function ``void f(context)``.

    Threads that run it at once share the work that the context describes.
    """

    address: int
    call: Callable[[int], None]  # releases the GIL
    call_locked: Callable[[int], None]  # keeps the GIL, because taking it again can take longer than a small product

    def run(self, context: array[int], most: int, *, locked: bool = False) -> None:
        """Run the kernel in up to ``most`` threads at once, and return when all its work is done.

        With ``locked``, the GIL is kept if ``most`` is 1.
        """
        if most > 1:
            run_all([KernelTask(self, context, most)])
        else:
            (self.call_locked if locked else self.call)(context.buffer_info()[0])


def compile_kernel(processor: Processor, module: ir.Module, name: str, *, unroll: bool = True) -> Kernel:
    """Compile the function ``name`` of ``module``, which takes a context. Raises OSError as ``compile`` does."""
    address = processor.compile(module, name, unroll=unroll)
    call, call_locked = (
        prototype(None, ctypes.c_void_p)(address) for prototype in (ctypes.CFUNCTYPE, ctypes.PYFUNCTYPE)
    )
    return Kernel(address, call, call_locked)


class KernelTask(NamedTuple):
    """A kernel to be run, its context, and the most threads to run it in."""

    kernel: Kernel
    context: array[int]
    threads: int
    kept: object = None  # further memory that the context points to, to be kept until the task has run


class Program:
    """Tasks that are run one after the other, as often as wanted, in one call.

    One thread may run it at a time. Between two runs numbers in the tasks' contexts may be changed.
    """

    def __init__(self, tasks: Sequence[KernelTask], *, locked: bool = False) -> None:
        """``locked``: keep the GIL, because taking it again can take longer than some small tasks."""
        self._tasks = tasks
        self._locked = locked
        self._words = array("q")
        self._address = 0  # of ``_words``
        self._team: Team | None = None

    def run(self) -> None:
        """Run the tasks. The first number of each context is set to 0 before."""
        if (team := the_team()) is not self._team:
            workers = team.prepare(max((task.threads for task in self._tasks), default=1) - 1)
            self._words = array("q")
            for kernel, context, threads, _ in self._tasks:
                self._words.extend((kernel.address, context.buffer_info()[0], min(threads - 1, workers)))
            self._address = self._words.buffer_info()[0]
            self._team = team
        (team.run_locked if self._locked else team.run)(team.address, self._address, len(self._tasks))


def run_all(tasks: Sequence[KernelTask]) -> None:
    """Run tasks one after the other, without taking the GIL in between."""
    Program(tasks).run()


def threads_for(weights: int) -> int:
    """Return the number of threads for a product with ``weights`` weights."""
    return 1 if is_small(weights) else thread_count()


def thread_count() -> int:
    """Return the number of threads to compute with: torch's; in a process without torch, the CPUs that it may use."""
    torch = sys.modules.get("torch")
    return _cpus() if torch is None else torch.get_num_threads()


def is_small(weights: int) -> bool:
    """Return whether a product with ``weights`` weights takes only some microseconds."""
    return weights < 1 << 17


class Memory:
    """Scratch memory of a kernel, for one thread at a time. It grows as needed."""

    _nbytes = _address = 0
    _memory: object = None

    def take(self, nbytes: int, *, spare: int = 0) -> int:
        """Return the address of ``nbytes`` bytes, valid until the next call.

        If memory has to be allocated for them, ``spare`` more bytes are allocated.
        """
        if self._nbytes < nbytes:
            self._nbytes, self._memory = 0, None  # free the old memory before allocating the new
            memory = np.empty(nbytes + spare + LINE, np.uint8)
            self._nbytes, self._address = nbytes + spare, -(-memory.ctypes.data // LINE) * LINE
            self._memory = memory
        return self._address


class Scratch(Memory, threading.local):
    """Scratch memory of a kernel. Each thread has its own."""


class Team:
    """Threads that run kernels together with the thread that calls ``run``.

    Any thread may call ``run``. While another thread's kernel is in progress, the calling thread computes alone. On
    machines for which the number of the system call futex is not known here, it always computes alone.
    """

    def __init__(self) -> None:
        self._memory = (ctypes.c_int64 * (WORDS + LINE // 8))()
        self.address = -(-ctypes.addressof(self._memory) // LINE) * LINE
        self._words = (ctypes.c_int64 * WORDS).from_address(self.address)
        self._library = ctypes.CDLL(None)
        for word, function in ((SYSCALL, self._library.syscall), (CLOCK, self._library.clock_gettime)):
            self._words[word] = ctypes.cast(function, ctypes.c_void_p).value or 0
        self._words[SPIN] = FIRST_SPIN
        # RUN_ALL(address of the team, address of the tasks, number of tasks), without and with the GIL: see ``Program``
        self.run, self.run_locked, self._work = compiled(this_processor())
        self._workers: list[threading.Thread] = []
        self._most = MAX_WORKERS if FUTEX is not None else 0
        self._starting = threading.Lock()  # guards: changes of ``_workers`` and ``_most``

    def prepare(self, workers: int) -> int:
        """Start threads until there are ``workers``, or as many as the system gives. Return how many there are."""
        if min(workers, self._most) > len(self._workers):
            self._start(min(workers, self._most))
        return len(self._workers)

    def _start(self, workers: int) -> None:
        # a new thread inherits the signal mask: workers block signals, which Python expects in its other threads
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        with self._starting:
            try:
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FATAL)
                while len(self._workers) < workers:
                    self._workers.append(start_thread(f"moetier-kernels-{len(self._workers) + 1}", self._serve))
            except ExhaustedError:  # the system gives no more threads
                self._most = len(self._workers)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                self._words[WORKERS] = len(self._workers)

    def _serve(self) -> None:
        self._work(self.address)

    def stop(self) -> None:
        """End the workers. A job in progress is finished, and later ones are computed by their callers alone."""
        self._words[STOPPED] = 1
        for thread in self._workers:
            while thread.is_alive():
                opened = ctypes.c_void_p(self.address + 8 * OPENED)
                self._library.syscall(FUTEX, opened, WAKE, len(self._workers), None, None, 0)
                thread.join(0.01)


@once
def compiled(processor: Processor) -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
    """Compile ``team_module``. Return its functions RUN_ALL, without and with the GIL, and WORK, without it."""
    run_all_, work = processor.compile_all(team_module(), [RUN_ALL, WORK])
    arguments = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    run, run_locked = (prototype(None, *arguments)(run_all_) for prototype in (ctypes.CFUNCTYPE, ctypes.PYFUNCTYPE))
    return run, run_locked, ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)


_team: Team | None = None
_making = threading.Lock()  # guards: changes of ``_team``; in a forked child ``_forget`` does not take it


def the_team() -> Team:
    """Return the team of this process. The first call makes it."""
    global _team
    if _team is None:
        with _making:
            if _team is None:
                _team = Team()
                atexit.register(_team.stop)  # before the compiled code is unmapped
    return _team


def _forget() -> None:
    """Discard the team in a forked child, which has none of its threads. The next kernel makes a new team."""
    global _team, _making
    _team, _making = None, threading.Lock()


@functools.cache
def openmp() -> ctypes.CDLL | None:
    """Return the OpenMP library that torch calls; None if there is none.

    Other packages may have loaded other OpenMP libraries. So search in the order in which the dynamic linker searches
    for torch: first the libraries whose symbols are visible to all others, then those that torch needs.
    """
    for name in (None, *sorted({path for _, path in mapped_files() if _TORCH.search(path)})):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            if hasattr(library, "omp_get_max_threads"):
                return library
    return None


def end_threads() -> None:
    """End the threads that GNU's OpenMP keeps for the calling thread; its next parallel operation starts new ones.

    Call this before a fork. Otherwise the forked child would inherit the list of these threads without the threads, and
    wait for them for ever. Other OpenMP libraries handle forks themselves.
    """
    if (library := openmp()) is not None and hasattr(library, _PAUSE) and not hasattr(library, _NOT_GNU):
        getattr(library, _PAUSE)(_HARD)


os.register_at_fork(before=end_threads, after_in_child=_forget)
