"""RMS norms on a CPU in one call of compiled code.

With torch, a norm takes seven operations, and calling each of them costs more than its arithmetic. The norm is
y = x / sqrt(mean of x * x + eps) * weight (Zhang & Sennrich 2019, arXiv 1910.07467). Each number of y depends only on
its row of x and on the weight. Sums are fp32.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import inspect
import struct
from array import array
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor, nn

from moetier.runtime.kernels.jit.emitter import F32, I32, I64, LANES, POINTER, Emitter, Value, new_module, once, vector
from moetier.runtime.kernels.jit.processor import this_processor
from moetier.runtime.kernels.jit.team import Kernel, KernelTask, compile_kernel
from moetier.runtime.kernels.products.api import FLOATS, is_readable
from moetier.runtime.libraries.torch_internals import buffers_of, parameters_of, replace_parameters

NORM, NORM_STEP = "moetier_norm", "moetier_norm_step"  # names of the compiled functions
# Number of i64 fields in the context of NORM_STEP. In order: unused; pointers to x, more, the sum, the weight, and y;
# K; the bits of the fp32 eps, and of the fp32 factor
CONTEXT = 9
X, MORE, SUM, Y = 1, 2, 3, 5  # indices of addresses in a context
_EPS = ("variance_epsilon", "eps")  # names that modules give to eps
# by type: the least share of results that must be equal, and the tolerance for the others. Sums are in another order
# than torch's, so that one result in some hundreds is rounded differently
_EQUAL = {torch.float32: (0.0, 1e-5), torch.bfloat16: (0.98, 1e-2)}


class Scale(Enum):
    """Ways in which architectures multiply with the weight."""

    ROUNDED = "the normed number is rounded to the type of x, then multiplied"
    PLAIN = "all is multiplied in fp32, then rounded"
    BEYOND_ONE = "as PLAIN, with the weight + 1"


class QuickNorm:
    """Mixin for the class of an RMS norm. It comes first among the bases, so its ``forward`` is called first.

    If gradients are computed, or for inputs that ``rms_norm`` does not take, the module computes as before.
    """

    quick_scale: Scale
    quick_eps: str
    weight: Tensor

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Normalise x [tokens, columns], the only argument, in its type; it may have other leading dimensions."""
        y = None
        if len(arguments) == 1 and not named and not torch.is_grad_enabled():
            y = rms_norm(arguments[0], self.weight, getattr(self, self.quick_eps), self.quick_scale)
        return super().forward(*arguments, **named) if y is None else y  # type: ignore[misc]


def use_quick_norms(model: nn.Module) -> None:
    """Add QuickNorm to the class of each RMS norm whose results on trial inputs match ``rms_norm`` with a ``Scale``."""
    for module in model.modules():
        if "RMSNorm" in type(module).__name__ and (agreed := _trial(module)) is not None:
            module.__class__ = _quick(type(module), *agreed)  # type: ignore[arg-type] # classes have a hash


def is_quick_norm(module: Any) -> bool:
    """Return whether a module is a QuickNorm with its weight only. Another tensor might have no effect in the trial."""
    return (
        type(module).forward is QuickNorm.forward and [*parameters_of(module)] == ["weight"] and not buffers_of(module)
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, scale: Scale) -> Tensor | None:
    """Normalise x [tokens, columns] with weight [columns], both fp32 or both bf16; return None for other inputs.

    x may have other leading dimensions; the result has its shape.
    """
    if (
        not (is_readable(x) and is_readable(weight))
        or x.dtype != weight.dtype
        or x.dtype not in FLOATS
        or weight.shape != x.shape[-1:]
        or (columns := len(weight)) % LANES
    ):
        return None
    y = torch.empty_like(x)
    code = norm_kernel(x.dtype, scale)
    code(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // columns if columns else 0, columns, eps)
    return y


def norm_task(module: Any, *, adds: bool, factor: float = 1.0) -> KernelTask:
    """Return a task that computes a QuickNorm of one row; if ``adds``, of one row + ``factor`` * another.

    The caller has to write all addresses but the weight's into its context before a run.
    """
    weight, eps = module.weight, getattr(module, module.quick_eps)
    numbers = (0, 0, 0, 0, weight.data_ptr(), 0, weight.numel(), float_bits(eps), float_bits(factor))
    return KernelTask(norm_task_kernel(weight.dtype, module.quick_scale, adds), array("q", numbers), 1)


def float_bits(number: float) -> int:
    """Return the bits of a number as fp32."""
    (bits,) = struct.unpack("I", struct.pack("f", number))
    return int(bits)


def _trial(module: Any) -> tuple[Scale, str] | None:
    """Compare a module with ``rms_norm`` on a few numbers; return its scale and its name for eps if they agree.

    Numbers in bf16 are tried too, as modules differ in where they round.
    """
    if len(inspect.signature(type(module).forward).parameters) != 2:  # a norm with a gate is another function
        return None
    eps = next((name for name in _EPS if isinstance(getattr(module, name, None), float)), None)
    weight = parameters_of(module).get("weight")
    if (
        eps is None
        or weight is None
        or len(parameters_of(module)) != 1
        or weight.dtype not in _EQUAL
        or weight.dim() != 1
    ):
        return None
    random, twin, trials = torch.Generator().manual_seed(0), copy.copy(module), []
    x, factors = torch.randn(4, len(weight), generator=random), 0.5 + torch.rand(len(weight), generator=random)
    with torch.no_grad():
        for dtype in {weight.dtype, torch.bfloat16}:
            given = (x.to(dtype), factors.to(dtype), getattr(module, eps))
            replace_parameters(twin, {"weight": given[1]})
            try:
                trials.append((given, twin.forward(given[0])))
            except Exception:  # it needs other arguments: it stays as it is
                return None
        for scale in Scale:  # each of them has to be compiled
            if all(_agree(rms_norm(*given, scale), expected) for given, expected in trials):
                return scale, eps
    return None


def _agree(computed: Tensor | None, expected: Tensor) -> bool:
    if computed is None or computed.dtype != expected.dtype:
        return False
    share, near = _EQUAL[expected.dtype]
    is_near = torch.allclose(computed, expected, rtol=near, atol=near / 10)
    return is_near and bool((computed == expected).float().mean() >= share)


@functools.cache
def _quick(class_: type, scale: Scale, eps: str) -> type:
    own = {"quick_scale": scale, "quick_eps": eps, "__module__": class_.__module__}
    return type(class_.__name__, (QuickNorm, class_), own)


@once
def norm_kernel(dtype: torch.dtype, scale: Scale) -> Callable[..., None]:
    """Compile the function ``NORM(x, weight, y, rows, K, eps)``, which normalises x [rows, K] to y [rows, K].

    The weight is [K]. All are of ``dtype``; K is a multiple of LANES.
    """
    emit = Emitter(new_module(), NORM, [POINTER] * 3 + [I64] * 2 + [F32])
    at, n = emit.at, emit.number
    x, weight, y, rows, columns, eps = emit.function.args
    row_bytes = at.mul(columns, n(dtype.itemsize))
    squares = at.alloca(vector(F32, LANES))
    with emit.loop(n(0), rows) as row:
        first = at.mul(row, row_bytes)
        source, target = at.gep(x, [first]), at.gep(y, [first])
        emit_norm(emit, source, weight, target, columns=columns, eps=eps, squares=squares, dtype=dtype, scale=scale)
    arguments = (*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2, ctypes.c_float)
    return this_processor().function(emit.finish(), NORM, *arguments)


@once
def norm_task_kernel(dtype: torch.dtype, scale: Scale, adds: bool) -> Kernel:
    """Compile the function ``NORM_STEP(context)``, which normalises the row x [K] to y [K].

    If ``adds``, the row ``more`` [K], multiplied by the factor, is added to x before, and the sum [K] is written too.
    All are of ``dtype``, the product too; K is a multiple of LANES.
    """
    emit = Emitter(new_module(), NORM_STEP, [POINTER])
    at, n, size = emit.at, emit.number, dtype.itemsize
    squares = at.alloca(vector(F32, LANES))
    _, (*addresses, columns, eps, factor) = emit.fields(CONTEXT)
    x, more, total, weight, y = (at.inttoptr(address, POINTER) for address in addresses)
    if adds:
        factor = emit.spread(at.bitcast(at.trunc(factor, I32), F32), LANES)
        with emit.loop(n(0), at.mul(columns, n(size)), LANES * size) as offset:
            own, other = (emit.load_floats(part, offset, dtype, LANES) for part in (x, more))
            other = at.fmul(other, factor)
            if dtype == torch.bfloat16:
                other = emit.widen(emit.narrow(other, LANES), LANES)
            emit.store_floats(at.fadd(own, other), total, offset, dtype)
        x = total
    eps = at.bitcast(at.trunc(eps, I32), F32)
    emit_norm(emit, x, weight, y, columns=columns, eps=eps, squares=squares, dtype=dtype, scale=scale)
    return compile_kernel(this_processor(), emit.finish(), NORM_STEP)


def emit_norm(
    emit: Emitter,
    source: Value,
    weight: Value,
    target: Value,
    *,
    columns: Value,
    eps: Value,
    squares: Value,
    dtype: torch.dtype,
    scale: Scale,
) -> None:
    """Emit the norm of a row of ``columns`` numbers, which may be changed in place: ``target`` may be ``source``.

    ``squares`` points to memory for an fp32 vector of LANES numbers.
    """
    at, n = emit.at, emit.number
    chunk_bytes, row_bytes = LANES * dtype.itemsize, at.mul(columns, n(dtype.itemsize))
    one = emit.floats(1.0)
    at.store(emit.floats(0.0), squares)
    with emit.loop(n(0), row_bytes, chunk_bytes) as offset:
        given = emit.load_floats(source, offset, dtype, LANES)
        at.store(emit.multiply_add(given, given, at.load(squares)), squares)
    mean = at.fdiv(emit.reduce(at.load(squares), at.fadd), at.uitofp(columns, F32))
    root = emit.intrinsic("llvm.sqrt.f32", F32, at.fadd(mean, eps))
    inverse = emit.spread(at.fdiv(ir.Constant(F32, 1.0), root), LANES)
    with emit.loop(n(0), row_bytes, chunk_bytes) as offset:
        normed = at.fmul(emit.load_floats(source, offset, dtype, LANES), inverse)
        factor = emit.load_floats(weight, offset, dtype, LANES)
        if scale is Scale.ROUNDED and dtype == torch.bfloat16:
            normed = emit.widen(emit.narrow(normed, LANES), LANES)
        if scale is Scale.BEYOND_ONE:
            factor = at.fadd(factor, one)
        emit.store_floats(at.fmul(normed, factor), target, offset, dtype)
