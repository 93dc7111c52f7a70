"""Machine code for this processor, made while the program runs, and the threads that run it.

LLVM (llvmlite) compiles what ``emit.py`` describes, in some hundredths of a second. It is loaded by ``executable.py``,
else by LLVM's own engine, and runs on the OpenMP threads that
torch uses itself: a second set of threads would fight with the first for the same cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir

from .executable import Executable, LinkError, can_become_executable, link

_ANSWER = 42  # of the function that is tried
# ends the threads of the one that calls it, with HARD (OpenMP 5.0); LLVM's and Intel's ends those of all
_PAUSE, _HARD, _NOT_GNU = "omp_pause_resource_all", 2, "__kmpc_fork_call"
_TORCH = re.compile(r"/libtorch_cpu\.so[^/]*$")
# a fork waits for it: a child would find LLVM, and llvmlite's own lock, in the midst of something for ever
compiling = threading.RLock()
os.register_at_fork(before=compiling.acquire, after_in_parent=compiling.release, after_in_child=compiling.release)


class Processor:
    """What code is made for: this machine's processor, or one of LLVM's names (as ``haswell``)."""

    def __init__(self, name: str | None = None) -> None:
        with compiling:
            llvm.initialize_native_target()
            llvm.initialize_native_asmprinter()
            features = llvm.get_host_cpu_features().flatten() if name is None else ""
            self._cpu = {"cpu": name or llvm.get_host_cpu_name(), "features": features}
        self.has_vnni = name is None and _has(features, "avx512vnni", "avx512bw")
        # whether its own prefetchers bring a long run of memory in time: to ask for it too costs 15 % on AMD's Zen 4
        self.has_stream_prefetch = self._cpu["cpu"].startswith("znver")
        self.has_avx2 = _has(features, "avx2") if name is None else name == "haswell"
        self._owners: list[Any] = []  # of the code

    def compile(self, module: ir.Module, name: str) -> int:
        """The address of the function ``name`` of ``module``, which stays as long as this object. Raises OSError where
        no memory can be made executable."""
        with compiling:
            why = "the code is linked by LLVM"
            if llvm.Target.from_default_triple().name == "x86-64":
                try:
                    code, machine = self._made(module, reloc="pic", codemodel="small")
                    executable = Executable(link(machine.emit_object(code)))
                except (LinkError, OSError) as error:
                    why = str(error)
                else:
                    self._owners.append(executable)
                    return executable.address(name)
            if not can_become_executable():  # LLVM would not notice, and its code would end the process
                raise OSError(f"memory that was written can't be made executable, and {why}")
            engine = llvm.create_mcjit_compiler(*self._made(module))
            engine.finalize_object()
            self._owners.append(engine)
            return int(engine.get_function_address(name))

    def _made(self, module: ir.Module, **how: str) -> tuple[Any, Any]:
        """LLVM's own module, optimised, and the target machine that it is for."""
        code = llvm.parse_assembly(str(module))
        code.verify()
        machine = llvm.Target.from_default_triple().create_target_machine(**self._cpu, opt=3, **how)
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
        passes.getModulePassManager().run(code, passes)
        return code, machine


@functools.cache
def here() -> Processor:
    """This machine's."""
    return Processor()


@functools.cache
def refusal() -> str:
    """Why no code can be compiled and run here, in some words; "" where it can: a small function is, really."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.IntType(32), []), "moetier_trial")
    ir.IRBuilder(function.append_basic_block()).ret(ir.Constant(ir.IntType(32), _ANSWER))
    try:
        found = ctypes.CFUNCTYPE(ctypes.c_int32)(here().compile(module, function.name))()
    except (RuntimeError, OSError) as error:
        return " ".join(str(error).split())
    return "" if found == _ANSWER else f"compiled code gives {found} in place of {_ANSWER}"


def _has(features: str, *names: str) -> bool:
    return all(f"+{name}" in features.split(",") for name in names)


@functools.cache
def openmp() -> Callable[[int, int, int, int], None] | None:
    """``GOMP_parallel`` of the OpenMP that torch calls (LLVM's and Intel's have it too); None if there is none."""
    if (library := _openmp()) is None:
        return None
    parallel = library.GOMP_parallel
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    team: Callable[[int, int, int, int], None] = parallel
    return team


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """Several may be loaded, as other packages bring their own. Looked up as the dynamic linker does for torch: among
    what is there for all libraries, then among those that torch needs."""
    for name in (None, *sorted(_mapped(_TORCH))):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            if hasattr(library, "GOMP_parallel"):
                return library
    return None


def _end_team() -> None:
    """End the threads that GNU's OpenMP keeps for this one; the next product begins new ones.

    A forked child would have a record of them, but not the threads, and would wait for them for ever. Other OpenMPs
    look after their children themselves.
    """
    library = _openmp()
    if library is not None and hasattr(library, _PAUSE) and not hasattr(library, _NOT_GNU):
        getattr(library, _PAUSE)(_HARD)


os.register_at_fork(before=_end_team)


def _mapped(name: re.Pattern[str]) -> set[str]:
    """Paths of the files that this process has mapped whose end is ``name``."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return {line[line.index("/") :] for line in lines if name.search(line)}


def run(work: int, alone: Callable[[int], None], context: int, threads: int) -> None:
    """Calls ``work(context)`` in each of ``threads`` threads at once, and returns when all are done; ``alone`` is the
    same function, to be called by this thread, which says what becomes of Python's lock; threads have no use for it."""
    if threads > 1 and (team := openmp()) is not None:
        team(work, context, threads, 0)
    else:
        alone(context)


def threads_for(weights: int) -> int:
    """How many threads a product of so many weights is worth."""
    return 1 if is_small(weights) else torch.get_num_threads()


def is_small(weights: int) -> bool:
    """Whether a product of so many takes some microseconds."""
    return weights < 1 << 17
