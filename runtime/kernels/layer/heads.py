"""Heads of one new token: norms of queries and keys, their rotation, and the place of keys and values in a cache.

The rotation is that of Su et al. 2021 (arXiv 2104.09864), with the numbers of a pair half of the rotated width apart.
Results have the same bits as those of transformers' code with the norms of ``norm.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moetier.runtime.kernels.jit.emitter import F32, I32, LANES, POINTER, Emitter, Value, new_module, once, vector
from moetier.runtime.kernels.jit.processor import this_processor
from moetier.runtime.kernels.jit.team import Kernel, compile_kernel

from .eight_bits import emit_codes
from .norm import Scale, emit_norm

HEADS = "moetier_heads"  # name of the compiled function


class HeadsContext(NamedTuple):
    """The i64 fields in the context of the compiled function. Strides are in bytes."""

    unused: int = 0
    heads: int = 0  # number of query heads
    key_heads: int = 0
    key_width: int = 0  # D, of a query or key
    value_width: int = 0  # V
    rotated: int = 0  # R, the rotated numbers in each head
    q: int = 0  # address of q [heads, D]
    k: int = 0  # address of k [key heads, D]
    v: int = 0  # address of v [key heads, V]
    q_weight: int = 0  # address of the weights [q_columns] of the norm of q; 0 without norms
    k_weight: int = 0  # address of the weights [k_columns] of the norm of k; 0 without norms
    cos: int = 0  # address of cos, [R], or [R / 2] where pairs share it
    sin: int = 0  # address of sin, as cos
    q_columns: int = 0  # numbers of q that one norm covers
    k_columns: int = 0  # numbers of k that one norm covers
    eps: int = 0  # bits of the fp32 eps of the norms
    key_place: int = 0  # address of the token's key in the cache's first head
    value_place: int = 0  # address of the token's value there
    key_stride: int = 0  # between the cache's heads of keys
    value_stride: int = 0  # between the cache's heads of values
    apart: int = 0  # how far apart cos and sin of a pair's two numbers are: R / 2, or 0 if they share theirs


PLACE = {name: place for place, name in enumerate(HeadsContext.__annotations__)}  # index of a field


@once
def heads_kernel(dtype: torch.dtype, scale: Scale | None, *, has_codes: bool) -> Kernel:
    """Compile the function ``HEADS(context)``.

    q [heads, D], k [key heads, D], v [key heads, V], the norms' weights, cos [R] and sin [R] are of ``dtype``. Where
    pairs share cos and sin, these are [R / 2]. q is changed in place; k, which is changed too, and v are copied to the
    cache, as ``in_codes`` of them if ``has_codes``. Without ``scale`` there are no norms. D, V and R / 2 are multiples
    of LANES, and so are the numbers that a norm takes together.
    """
    emit = Emitter(new_module(), HEADS, [POINTER])
    at, n, size = emit.at, emit.number, dtype.itemsize
    squares = at.alloca(vector(F32, LANES))
    _, fields = emit.fields(len(PLACE))
    _, heads, key_heads, width, values, rotated, *addresses = given = HeadsContext(n(0), *fields)
    q, k, v, q_weight, k_weight, cos, sin = (at.inttoptr(address, POINTER) for address in addresses[:7])
    to_keys, to_values = (at.inttoptr(address, POINTER) for address in (given.key_place, given.value_place))
    half, eps = at.udiv(rotated, n(2)), given.eps

    if scale is not None:
        eps = at.bitcast(at.trunc(eps, I32), F32)
        for row, weight, count, columns in (
            (q, q_weight, heads, given.q_columns),
            (k, k_weight, key_heads, given.k_columns),
        ):
            with emit.loop(n(0), at.udiv(at.mul(count, width), columns)) as i:
                place = at.gep(row, [at.mul(at.mul(i, columns), n(size))])
                emit_norm(
                    emit, place, weight, place, columns=columns, eps=eps, squares=squares, dtype=dtype, scale=scale
                )

    def numbers(pointer: Value, index: Value) -> Value:
        return emit.load_floats(pointer, at.mul(index, n(size)), dtype, LANES)

    def rotate(head: Value) -> None:
        with emit.loop(n(0), half, LANES) as i:
            j = at.add(i, half)
            left, right = numbers(head, i), numbers(head, j)
            for place, angle, own, other, unite in (
                (i, i, left, right, at.fsub),
                (j, at.add(i, given.apart), right, left, at.fadd),
            ):
                parts = [at.fmul(own, numbers(cos, angle)), at.fmul(other, numbers(sin, angle))]
                if dtype == torch.bfloat16:  # torch rounds here too
                    parts = [emit.widen(emit.narrow(part, LANES), LANES) for part in parts]
                emit.store_floats(unite(*parts), head, at.mul(place, n(size)), dtype)

    def copy(source: Value, target: Value, count: Value) -> None:
        if has_codes:
            emit_codes(emit, lambda i: numbers(source, i), target, count, squares)
            return
        with emit.loop(n(0), count, LANES) as i:
            emit.store_floats(numbers(source, i), target, at.mul(i, n(size)), dtype)

    with emit.loop(n(0), heads) as head:
        rotate(at.gep(q, [at.mul(at.mul(head, width), n(size))]))
    with emit.loop(n(0), key_heads) as head:
        key = at.gep(k, [at.mul(at.mul(head, width), n(size))])
        rotate(key)
        copy(key, at.gep(to_keys, [at.mul(head, given.key_stride)]), width)
        value = at.gep(v, [at.mul(at.mul(head, values), n(size))])
        copy(value, at.gep(to_values, [at.mul(head, given.value_stride)]), values)
    return compile_kernel(this_processor(), emit.finish(), HEADS)
