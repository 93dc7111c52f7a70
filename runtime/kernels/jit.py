"""Just-in-time compiled kernels: an emitter of LLVM IR, the compiler for this processor, and the threads that run them.

LLVM (llvmlite) compiles a kernel in some hundredths of a second. ``executable.py`` loads the code where it can,
otherwise LLVM's own engine does. Kernels run on the OpenMP threads that torch uses itself: a second set of threads
would compete with them for the same cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import torch
from llvmlite import ir

from moetier.runtime.memory import mapped_files

from .executable import Executable, LinkError, can_become_executable

FLOATS = frozenset({torch.float32, torch.bfloat16})  # types that kernels read and write; they compute in fp32

_TRIAL_RESULT = 42
# A function of OpenMP 5.0, its argument omp_pause_hard, and a function that GNU's OpenMP lacks. In GNU's, the call ends
# the threads of the calling thread's team; in LLVM's and Intel's, it ends those of all teams.
_PAUSE, _HARD, _NOT_GNU = "omp_pause_resource_all", 2, "__kmpc_fork_call"
_TORCH = re.compile(r"/libtorch_cpu\.so[^/]*$")

# A fork waits for this lock: a child must not inherit LLVM's state, or llvmlite's own lock, in the middle of a step.
compile_lock = threading.RLock()
os.register_at_fork(
    before=compile_lock.acquire, after_in_parent=compile_lock.release, after_in_child=compile_lock.release
)

# -- code --------------------------------------------------------------------------------------------------------------

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
POINTER = I8.as_pointer()
LANES = 16  # fp32 numbers of a vector: a register of AVX-512

Value = Any  # llvmlite has no types


def vector(kind: Any, count: int) -> Any:
    """Return the type of a vector of ``count`` elements of type ``kind``."""
    return ir.VectorType(kind, count)


def new_module() -> ir.Module:
    """Return an empty module for this kind of machine."""
    module = ir.Module("moetier")
    with compile_lock:
        module.triple = llvm.get_process_triple()
    return module


class Emitter:
    """Emitter of one function, ``void name(pointer, ..., i64, ...)``: loops, and frequent operations on vectors.

    Values are of LLVM: they exist when the function runs, not when it is emitted.
    """

    def __init__(self, module: ir.Module, name: str, arguments: Sequence[Any]) -> None:
        self.module = module
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
        self.at = ir.IRBuilder(self.function.append_basic_block("entry"))

    def number(self, value: int) -> Value:
        """Return a constant of type i64."""
        return ir.Constant(I64, value)

    def all(self, kind: Any, value: float, count: int) -> Value:
        """Return a constant vector of ``count`` elements of type ``kind``, which all are ``value``."""
        return ir.Constant(vector(kind, count), [value] * count)

    def fields(self, count: int) -> tuple[Value, list[Value]]:
        """Return a pointer to the first of ``count`` i64 fields in the function's context, and the others' values."""
        (context,) = self.function.args
        places = [self.place(context, self.number(8 * i), I64) for i in range(count)]
        return places[0], [self.at.load(place) for place in places[1:]]

    @contextlib.contextmanager
    def loop(self, start: Value, stop: Value, step: int = 1) -> Iterator[Value]:
        """Emit a loop over indices from ``start`` to before ``stop``.

        Yields the index, i64; emit the body inside the context.
        """
        at, before = self.at, self.at.block
        head, body, end = (self.function.append_basic_block(name) for name in ("head", "body", "end"))
        at.branch(head)
        at.position_at_end(head)
        index = at.phi(I64)
        index.add_incoming(start, before)
        at.cbranch(at.icmp_signed("<", index, stop), body, end)
        at.position_at_end(body)
        yield index
        index.add_incoming(at.add(index, self.number(step)), at.block)
        at.branch(head)
        at.position_at_end(end)

    @contextlib.contextmanager
    def items(self, begun: Value, count: Value) -> Iterator[Value]:
        """Emit a loop over items that no other thread has taken, until ``count`` are taken. Yields the item's index.

        ``begun`` points to the number of items that are taken. Emit the body inside the context.
        """
        at = self.at
        next_, work, done = (self.function.append_basic_block(name) for name in ("next", "work", "done"))
        at.branch(next_)
        at.position_at_end(next_)
        item = at.atomic_rmw("add", begun, self.number(1), "monotonic")
        at.cbranch(at.icmp_signed("<", item, count), work, done)
        at.position_at_end(work)
        yield item
        at.branch(next_)
        at.position_at_end(done)

    def place(self, pointer: Value, offset: Value, kind: Any) -> Value:
        """Emit the address ``pointer`` + ``offset`` bytes, as a pointer to ``kind``."""
        return self.at.bitcast(self.at.gep(pointer, [offset]), kind.as_pointer())

    def load(self, pointer: Value, offset: Value, kind: Any) -> Value:
        """Emit a load of ``kind`` from ``pointer`` + ``offset`` bytes. The address need not be aligned."""
        return self.at.load(self.place(pointer, offset, kind), align=1)

    def store(self, value: Value, pointer: Value, offset: Value) -> None:
        """Emit a store of ``value`` at ``pointer`` + ``offset`` bytes. The address need not be aligned."""
        self.at.store(value, self.place(pointer, offset, value.type), align=1)

    def prefetch(self, pointer: Value, offset: Value, nbytes: int) -> None:
        """Emit prefetches of ``nbytes`` bytes from ``pointer`` + ``offset`` bytes on. The memory need not be mapped."""
        read, everywhere, data = (ir.Constant(I32, value) for value in (0, 3, 1))
        for line in range(0, nbytes, 64):
            place = self.at.gep(pointer, [self.at.add(offset, self.number(line))])
            self.intrinsic("llvm.prefetch.p0", ir.VoidType(), place, read, everywhere, data)

    def spread(self, value: Value, count: int) -> Value:
        """Emit a vector of ``count`` elements, which all are the scalar ``value``."""
        nothing = ir.Constant(vector(value.type, count), ir.Undefined)
        return self.pick(self.at.insert_element(nothing, value, ir.Constant(I32, 0)), nothing, [0] * count)

    def pick(self, first: Value, second: Value, indices: Sequence[int]) -> Value:
        """Emit a vector of the elements at ``indices`` of ``first`` and ``second``, numbered through both."""
        return self.at.shuffle_vector(first, second, ir.Constant(vector(I32, len(indices)), list(indices)))

    def widen(self, bf16: Value, count: int) -> Value:
        """Emit the conversion of ``count`` bf16 numbers, given as i16, to fp32."""
        at = self.at
        bits = at.shl(at.zext(bf16, vector(I32, count)), self.all(I32, 16, count))
        return at.bitcast(bits, vector(F32, count))

    def narrow(self, value: Value, count: int) -> Value:
        """Emit the conversion of ``count`` fp32 numbers to bf16, given as i16, rounded to the nearest, ties to even."""
        at, wide = self.at, vector(I32, count)
        bits = at.bitcast(value, wide)
        odd = at.and_(at.lshr(bits, self.all(I32, 16, count)), self.all(I32, 1, count))
        rounded = at.add(at.add(bits, self.all(I32, 0x7FFF, count)), odd)
        rounded = at.select(at.fcmp_unordered("uno", value, value), self.all(I32, 0x7FC00000, count), rounded)
        return at.trunc(at.lshr(rounded, self.all(I32, 16, count)), vector(I16, count))

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """Emit a * b + c of fp32 vectors."""
        return self.intrinsic(f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)

    def reduce(self, value: Value, unite: Callable[[Value, Value], Value]) -> Value:
        """Emit the reduction of a vector to one number, by applying ``unite`` to its halves again and again.

        So the order is always the same. The number of elements is a power of two.
        """
        count = value.type.count
        while count > 1:
            count //= 2
            value = unite(self.pick(value, value, range(count)), self.pick(value, value, range(count, 2 * count)))
        return self.at.extract_element(value, ir.Constant(I32, 0))

    def intrinsic(self, name: str, result: Any, *arguments: Value) -> Value:
        """Emit a call of LLVM's intrinsic function ``name``."""
        known = self.module.globals.get(name)
        if known is None:
            known = ir.Function(self.module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.at.call(known, arguments)

    def load_floats(self, pointer: Value, offset: Value, dtype: torch.dtype, count: int) -> Value:
        """Emit a load of ``count`` numbers of ``dtype`` from ``pointer`` + ``offset`` bytes, as an fp32 vector."""
        if dtype == torch.float32:
            return self.load(pointer, offset, vector(F32, count))
        return self.widen(self.load(pointer, offset, vector(I16, count)), count)

    def store_floats(self, value: Value, pointer: Value, offset: Value, dtype: torch.dtype) -> None:
        """Emit a store of an fp32 vector as numbers of ``dtype``, at ``pointer`` + ``offset`` bytes."""
        self.store(value if dtype == torch.float32 else self.narrow(value, value.type.count), pointer, offset)


# -- compiling ---------------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """A compiled function ``void f(context)``.

    Threads that run it at once share the work that the context describes.
    """

    address: int
    call: Callable[[int], None]  # releases the GIL
    call_locked: Callable[[int], None]  # keeps the GIL, because taking it again can take longer than a small product

    def run(self, context: int, threads: int, *, locked: bool = False) -> None:
        """Run the kernel in ``threads`` threads at once, and return when all are done.

        ``context`` is an address. With ``locked``, a single thread keeps the GIL.
        """
        if threads > 1 and (library := openmp()) is not None:
            library.GOMP_parallel(self.address, context, threads, 0)
        elif locked:
            self.call_locked(context)
        else:
            self.call(context)


class Processor:
    """A target of the compiler: this machine's processor, or the one that LLVM calls ``name`` (such as ``haswell``)."""

    def __init__(self, name: str | None = None) -> None:
        with compile_lock:
            llvm.initialize_native_target()
            llvm.initialize_native_asmprinter()
            features = llvm.get_host_cpu_features().flatten() if name is None else ""
            self._cpu = {"cpu": name or llvm.get_host_cpu_name(), "features": features}
        known = set(features.split(","))
        self.has_vnni = known >= {"+avx512vnni", "+avx512bw"}
        # Zen 4's hardware prefetchers load a long run of memory in time; software prefetches would cost 15 % there
        self.has_stream_prefetch = self._cpu["cpu"].startswith("znver")
        self.has_avx2 = "+avx2" in known or name == "haswell"
        self._owners: list[Any] = []  # objects that keep the compiled code in memory

    def kernel(self, module: ir.Module, name: str) -> Kernel:
        """Compile the function ``name`` of ``module``, which takes a context. Raises OSError as ``compile`` does."""
        with compile_lock:
            address = self.compile(module, name)
        call, call_locked = (kind(None, ctypes.c_void_p)(address) for kind in (ctypes.CFUNCTYPE, ctypes.PYFUNCTYPE))
        return Kernel(address, call, call_locked)

    def function(self, module: ir.Module, name: str, *arguments: Any) -> Callable[..., None]:
        """Compile the function ``name`` of ``module``, which takes ``arguments`` (types of ctypes). Raises OSError."""
        return ctypes.CFUNCTYPE(None, *arguments)(self.compile(module, name))

    def compile(self, module: ir.Module, name: str) -> int:
        """Compile a module; return the address of its function ``name``, which stays valid as long as this object.

        Raises OSError where no memory can be made executable.
        """
        with compile_lock:
            why = "the code is linked by LLVM"
            if llvm.Target.from_default_triple().name == "x86-64":
                try:
                    code, machine = self._optimised(module, reloc="pic", codemodel="small")
                    executable = Executable(machine.emit_object(code))
                except (LinkError, OSError) as error:
                    why = str(error)
                else:
                    self._owners.append(executable)
                    return executable.address(name)
            if not can_become_executable():  # LLVM would not notice, and its code would end the process
                raise OSError(f"memory that was written can't be made executable, and {why}")
            engine = llvm.create_mcjit_compiler(*self._optimised(module))
            engine.finalize_object()
            self._owners.append(engine)
            return int(engine.get_function_address(name))

    def _optimised(self, module: ir.Module, **options: str) -> tuple[Any, Any]:
        """Return ``module`` as an optimised module of LLVM, and its target machine."""
        code = llvm.parse_assembly(str(module))
        code.verify()
        machine = llvm.Target.from_default_triple().create_target_machine(**self._cpu, opt=3, **options)
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
        passes.getModulePassManager().run(code, passes)
        return code, machine


def this_processor() -> Processor:
    """Return the processor of this machine, the same one in all threads: it owns the code that it compiles."""
    with compile_lock:
        return _this_processor()


@functools.cache
def _this_processor() -> Processor:
    return Processor()


@functools.cache
def refusal() -> str:
    """Compile and call a small function; return why no code can be compiled and run here, or ""."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.IntType(32), []), "moetier_trial")
    ir.IRBuilder(function.append_basic_block()).ret(ir.Constant(ir.IntType(32), _TRIAL_RESULT))
    try:
        found = ctypes.CFUNCTYPE(ctypes.c_int32)(this_processor().compile(module, function.name))()
    except (RuntimeError, OSError) as error:
        return " ".join(str(error).split())
    return "" if found == _TRIAL_RESULT else f"compiled code gives {found} in place of {_TRIAL_RESULT}"


# -- threads -----------------------------------------------------------------------------------------------------------


def threads_for(weights: int) -> int:
    """Return the number of threads for a product with ``weights`` weights."""
    return 1 if is_small(weights) else torch.get_num_threads()


def is_small(weights: int) -> bool:
    """Return whether a product with ``weights`` weights takes only some microseconds."""
    return weights < 1 << 17


class Scratch(threading.local):
    """Scratch memory of a kernel. Each thread has its own."""

    _nbytes = _address = 0
    _memory: torch.Tensor | None = None

    def take(self, nbytes: int, *, spare: int = 0) -> int:
        """Return the address of ``nbytes`` bytes, valid until the thread calls this again.

        If memory has to be allocated for them, ``spare`` more bytes are allocated.
        """
        if self._nbytes < nbytes:
            self._nbytes, self._memory = 0, None  # free the old memory before allocating the new
            self._memory = torch.empty(nbytes + spare, dtype=torch.uint8)
            self._nbytes, self._address = nbytes + spare, self._memory.data_ptr()
        return self._address


@functools.cache
def openmp() -> ctypes.CDLL | None:
    """Return the OpenMP library that torch calls, if it has ``GOMP_parallel``; else None.

    LLVM's and Intel's have that function too. Other packages may have loaded other OpenMP libraries. The search is the
    dynamic linker's for torch: first libraries that are loaded for all others, then those that torch needs.
    """
    for name in (None, *sorted({path for _, path in mapped_files() if _TORCH.search(path)})):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            if hasattr(library, "GOMP_parallel"):
                library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
                library.GOMP_parallel.restype = None
                return library
    return None


def _end_team() -> None:
    """End the threads that GNU's OpenMP keeps for the calling thread; its next kernel starts new ones.

    Called before a fork. A forked child would inherit a record of these threads without the threads, and wait for them
    for ever. Other OpenMP libraries handle forks themselves.
    """
    library = openmp()
    if library is not None and hasattr(library, _PAUSE) and not hasattr(library, _NOT_GNU):
        getattr(library, _PAUSE)(_HARD)


os.register_at_fork(before=_end_team)
