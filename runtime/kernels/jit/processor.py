"""The just-in-time compiler of kernels, for this processor.

LLVM (llvmlite) compiles a kernel in some hundredths of a second. ``object_cache.py`` keeps the result on disk, and
``executable.py`` loads it, if it can. Otherwise LLVM's own engine compiles and loads the code.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir

from .emitter import compile_lock, once
from .executable import Executable, LinkError, can_become_executable
from .object_cache import cached_object

_TRIAL_RESULT = 42
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # numbers of a system call on x86-64, and its arguments


class Dot(Enum):
    """Instructions that multiply codes of weights with rounded activations and add the products up."""

    AVX512_VNNI = "AVX-512 VNNI"
    AVX_VNNI = "AVX-VNNI"
    AVX2 = "AVX2"
    I8MM = "Arm I8MM"
    DOTPROD = "Arm DotProd"
    PLAIN = "any processor"

    @property
    def takes_bytes(self) -> bool:
        """Whether codes of 8 bits are multiplied whole; otherwise in halves, as sums of 16 bits would overflow."""
        return self in (Dot.AVX512_VNNI, Dot.AVX_VNNI, Dot.I8MM)


# LLVM's names of the features of a processor that each needs, the fastest first
_NEEDED = {
    Dot.AVX512_VNNI: {"+avx512vnni", "+avx512bw"},
    Dot.AVX_VNNI: {"+avxvnni"},
    Dot.AVX2: {"+avx2"},
    Dot.I8MM: {"+i8mm"},
    Dot.DOTPROD: {"+dotprod"},
}
_AMX = {"+amx-tile", "+amx-int8"}
_ARM_FEATURES = {"asimddp": "+dotprod", "i8mm": "+i8mm"}  # by their names in /proc/cpuinfo


class Processor:
    """A target of the compiler: this machine's processor, or another one.

    Args:
        features: LLVM's names of the features of another processor, such as ``+avx2,+fma``.
        triple: LLVM's name of another processor family, whose code can't be run here, such as ``aarch64-linux-gnu``.
    """

    def __init__(self, features: str | None = None, triple: str | None = None) -> None:
        with compile_lock:
            if triple is None:
                llvm.initialize_native_target()
                llvm.initialize_native_asmprinter()
                self._target = llvm.Target.from_default_triple()
            else:
                llvm.initialize_all_targets()
                llvm.initialize_all_asmprinters()
                self._target = llvm.Target.from_triple(triple)
            if features is None:
                self._cpu = {"cpu": llvm.get_host_cpu_name(), "features": _host_features()}
            else:
                self._cpu = {"cpu": "", "features": features}
        self.features = flags = frozenset(self._cpu["features"].split(","))  # LLVM's names, such as ``+avx2``
        self.dot = next((dot for dot, needed in _NEEDED.items() if needed <= flags), Dot.PLAIN)
        self.has_wide_registers = "+avx512f" in flags  # of LANES fp32 numbers, 32 of them
        self.multiplies_pairs = self.has_wide_registers and "+avx512bf16" in flags  # of bf16 numbers
        self.has_amx = self.dot is Dot.AVX512_VNNI and flags >= _AMX  # for products with many rows
        # Zen 4's hardware prefetchers load a long run of memory in time; software prefetches would cost 15 % there. On
        # Zen 3 they gain 14 to 21 %.
        self.has_stream_prefetch = self._cpu["cpu"] in ("znver4", "znver5")
        self._owners: list[Any] = []  # objects that keep the compiled code in memory

    def __str__(self) -> str:
        """LLVM's name of the processor, and those of its features."""
        return f"{self._cpu['cpu']} {self._cpu['features']}"

    def function(self, module: ir.Module, name: str, *arguments: Any) -> Callable[..., None]:
        """Compile the function ``name`` of ``module`` as ``compile`` does, and return a Python function that calls it.

        ``arguments``: types of its arguments, from ctypes.
        """
        return ctypes.CFUNCTYPE(None, *arguments)(self.compile(module, name))

    def compile(self, module: ir.Module, name: str, *, unroll: bool = True) -> int:
        """Compile a module, and return the address of its function ``name``. It is valid as long as this object lives.

        With ``unroll``, LLVM may unroll loops. Raises OSError if no memory can be made executable.
        """
        (address,) = self.compile_all(module, [name], unroll=unroll)
        return address

    def compile_all(self, module: ir.Module, names: Sequence[str], *, unroll: bool = True) -> list[int]:
        """Compile a module as ``compile`` does; return the addresses of several of its functions."""
        with compile_lock:
            why = "the code is linked by LLVM"
            if self._target.name == "x86-64":
                try:
                    executable = Executable(self._object_file(module, unroll))
                except (LinkError, OSError) as error:
                    why = str(error)
                else:
                    self._owners.append(executable)
                    return [executable.address(name) for name in names]
            if not can_become_executable():  # LLVM would not notice, and its code would end the process
                raise OSError(f"memory that was written can't be made executable, and {why}")
            engine = llvm.create_mcjit_compiler(*self.optimised(module, unroll))
            engine.finalize_object()
            self._owners.append(engine)
            return [int(engine.get_function_address(name)) for name in names]

    def _object_file(self, module: ir.Module, unroll: bool) -> bytes:
        def compile_object() -> bytes:
            code, machine = self.optimised(module, unroll, reloc="pic", codemodel="small")
            return bytes(machine.emit_object(code))

        try:
            code = Path(__file__).read_bytes()
        except OSError:  # only compiled modules are installed
            return compile_object()
        how = code, llvmlite.__version__, llvm.llvm_version_info, self._cpu, unroll
        return cached_object(f"{how} {module}", compile_object)

    def optimised(self, module: ir.Module, unroll: bool = True, **options: str) -> tuple[Any, Any]:
        """Return ``module`` as an optimised module of LLVM, and the target machine. ``options``: of the machine."""
        code = llvm.parse_assembly(str(module))
        code.verify()
        machine = self._target.create_target_machine(**self._cpu, opt=3, **options)
        code.triple = machine.triple
        tuning = llvm.create_pipeline_tuning_options(speed_level=3)
        tuning.loop_unrolling = unroll
        passes = llvm.create_pass_builder(machine, tuning)
        passes.getModulePassManager().run(code, passes)
        return code, machine


def arm_features(cpuinfo: str) -> list[str]:
    """Return the features of a processor that LLVM does not look for on AArch64, from the text of /proc/cpuinfo."""
    available = next((line.split() for line in cpuinfo.splitlines() if line.startswith("Features")), [])
    return [feature for name, feature in _ARM_FEATURES.items() if name in available]


def _permits_amx() -> bool:
    """Ask the system to let this process use AMX, whose registers need memory in every thread.

    Threads that exist already may use it, too, and so may forked children.
    """
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


def _host_features() -> str:
    features = llvm.get_host_cpu_features()
    if features.get("amx-int8") and not _permits_amx():
        features["amx-int8"] = False
    names = [features.flatten()]
    if platform.machine() == "aarch64":
        names += arm_features(Path("/proc/cpuinfo").read_text())
    return ",".join(names)


@once
def this_processor() -> Processor:
    """Return the processor of this machine: the same object in all threads, which owns the code that it compiles."""
    return Processor()


@functools.cache
def refusal() -> str:
    """Compile and call a small function. Return why no code can be compiled and run here; "" if it can."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.IntType(32), []), "moetier_trial")
    ir.IRBuilder(function.append_basic_block()).ret(ir.Constant(ir.IntType(32), _TRIAL_RESULT))
    try:
        result = ctypes.CFUNCTYPE(ctypes.c_int32)(this_processor().compile(module, function.name))()
    except (RuntimeError, OSError) as error:
        return " ".join(str(error).split())
    return "" if result == _TRIAL_RESULT else f"compiled code gives {result} in place of {_TRIAL_RESULT}"
