"""The emitter: loops, conversions and functions of vectors do what Python and torch do."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moetier.runtime.kernels.jit.emitter import BF16, FP32, I16, LANES, POINTER, Emitter, new_module, vector
from moetier.runtime.kernels.jit.processor import refusal, this_processor
from moetier.runtime.kernels.jit.team import compile_kernel

pytestmark = pytest.mark.skipif(bool(refusal()), reason="no code can be compiled here")


def run(fields: list[int], emit_body: Callable[[Emitter, Any, list[Any]], None]) -> list[int]:
    """Compile and run a function with a context of ``fields``, after a first one that is 0. Return the fields."""
    emit = Emitter(new_module(), "f", [POINTER])
    first, others = emit.fields(len(fields) + 1)
    emit_body(emit, first, others)
    context = array("q", (0, *fields))
    compile_kernel(this_processor(), emit.finish(), "f").run(context, 1)
    return context.tolist()


def mapped(values: torch.Tensor, function: Callable[[Emitter, Any], Any]) -> torch.Tensor:
    """Return what the emitted ``function`` makes of LANES fp32 numbers at a time."""
    result = torch.empty_like(values)

    def body(emit: Emitter, _: Any, fields: list[Any]) -> None:
        source, target, nbytes = fields
        source, target = (emit.at.inttoptr(address, POINTER) for address in (source, target))
        with emit.loop(emit.number(0), nbytes, 4 * LANES) as offset:
            emit.store_floats(function(emit, emit.load_floats(source, offset, FP32, LANES)), target, offset, FP32)

    run([values.data_ptr(), result.data_ptr(), 4 * values.numel()], body)
    return result


@pytest.mark.parametrize(("start", "stop", "step"), [(0, 10, 1), (3, 10, 4), (5, 5, 1), (7, 2, 1)])
def test_a_loop_has_the_indices_of_range(start: int, stop: int, step: int) -> None:
    def body(emit: Emitter, first: Any, fields: list[Any]) -> None:
        with emit.loop(*fields, step) as index:
            emit.at.store(emit.at.add(emit.at.mul(emit.at.load(first), emit.number(16)), index), first)

    expected = 0
    for index in range(start, stop, step):
        expected = 16 * expected + index
    assert run([start, stop], body)[0] == expected


def test_a_while_loop_goes_on_from_its_head_and_can_be_left() -> None:
    def body(emit: Emitter, first: Any, fields: list[Any]) -> None:
        at = emit.at
        with emit.while_(lambda: at.icmp_signed("<", at.load(first), fields[0])) as loop:
            count = at.add(at.load(first), emit.number(1))
            at.store(count, first)
            with at.if_then(at.icmp_signed("!=", count, fields[1])):
                loop.continue_()
            loop.break_()

    assert run([100, 7], body)[0] == 7
    assert run([100, 200], body)[0] == 100


def test_each_item_is_taken_once_and_a_return_ends_the_function() -> None:
    taken = (ctypes.c_int64 * 5)()

    def body(emit: Emitter, first: Any, fields: list[Any]) -> None:
        at, (places, count, last) = emit.at, fields
        places = at.inttoptr(places, POINTER)
        with emit.items(first, count) as item:
            emit.store(at.add(item, emit.number(1)), places, at.mul(item, emit.number(8)))
            emit.return_if(at.icmp_signed("==", item, last))

    run([ctypes.addressof(taken), 5, 9], body)
    assert [*taken] == [1, 2, 3, 4, 5]
    ctypes.memset(taken, 0, 40)
    run([ctypes.addressof(taken), 5, 2], body)
    assert [*taken] == [1, 2, 3, 0, 0]


def test_16_bits_are_widened_and_narrowed_as_torch_does() -> None:
    """All bf16 and fp16 numbers, and fp32 numbers between bf16 numbers, among them ties."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype, widen in ((torch.bfloat16, Emitter.widen), (torch.float16, Emitter.widen_half)):
        wide = torch.empty(bits.numel())

        def body(emit: Emitter, _: Any, fields: list[Any], widen: Any = widen) -> None:
            at, (source, target, count) = emit.at, fields
            source, target = (at.inttoptr(address, POINTER) for address in (source, target))
            with emit.loop(emit.number(0), count, LANES) as i:
                half = emit.load(source, at.mul(i, emit.number(2)), vector(I16, LANES))
                emit.store(widen(emit, half, LANES), target, at.mul(i, emit.number(4)))

        run([bits.data_ptr(), wide.data_ptr(), bits.numel()], body)
        torch.testing.assert_close(wide, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    values = torch.randn(1 << 12, generator=torch.Generator().manual_seed(5))
    halfway = (values.bfloat16().float().view(torch.int32) | 0x8000).view(torch.float32)
    for numbers in (values, halfway):
        narrowed = mapped(numbers, lambda emit, x: emit.widen(emit.narrow(x, LANES), LANES))
        assert torch.equal(narrowed, numbers.bfloat16().float())


def test_functions_are_as_exact_as_they_say() -> None:
    x = -torch.rand(1 << 12, generator=torch.Generator().manual_seed(6)) * 80
    for function, exact, bound in (
        (Emitter.exp, torch.exp, (2 - x) * 1e-7),
        (Emitter.exp2, torch.exp2, 3e-7),
    ):
        expected = exact(x.double())
        assert bool(((mapped(x, function).double() - expected).abs() / expected < bound).all())
        assert not mapped(x - 200, function).any()
    both = torch.cat([x, -x, torch.tensor([-1e4, 1e4, 0.0, *[1.0] * 13])])
    sigmoids = mapped(both, lambda emit, u: emit.times_sigmoid(emit.floats(1.0), u))
    torch.testing.assert_close(sigmoids, torch.sigmoid(both), rtol=5e-6, atol=0)
    low, high = -8, 7
    integers = mapped(x / 4, lambda emit, value: emit.nearest(value, low, high)[1])
    assert torch.equal(integers, (x / 4).clamp(low, high).round())


def test_sums_of_a_vector_have_one_order() -> None:
    values = torch.randn(LANES, generator=torch.Generator().manual_seed(7))
    total = mapped(values, lambda emit, x: emit.spread(emit.reduce(x, emit.at.fadd), LANES))
    expected = values
    while expected.numel() > 1:
        expected = expected[: expected.numel() // 2] + expected[expected.numel() // 2 :]
    assert torch.equal(total, expected.expand(LANES))


def test_types_of_numbers_are_known_by_their_size() -> None:
    class Half:
        itemsize = 2

    assert (FP32.itemsize, BF16.itemsize) == (4, 2)
    assert type(FP32).of(Half()) == BF16
