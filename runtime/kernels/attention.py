"""Attention of one new token on a CPU: softmax(q @ K.T * scale + mask) @ V, in fp32.

torch's scaled_dot_product_attention takes many times as long as it takes to read keys and values, and compiles its
matrix products anew for each length of a context (docs/benchmarks.md, Attention).

The compiled code divides its work into items, which threads take one by one. An item is one head of keys and values
with all the heads of queries that share it, so that keys and values are read once. The result of an item does not
depend on the other items or on the number of threads.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import struct
import sys
from array import array
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from llvmlite import ir
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .emitter import F32, FLOATS, I32, LANES, POINTER, Emitter, Value, new_module, vector
from .jit import this_processor
from .team import Kernel, Scratch, compile_kernel, threads_for

_ASKS = re.compile(r'_attn_implementation\s*(?:==|!=|in|not in)\s[^\n]*"sdpa"')
NAME = "moetier_sdpa"  # among transformers' attention functions
ATTEND = "moetier_attend"  # name of the compiled function
HEADS, POSITIONS = 4, 4  # heads for which scores are computed together, positions whose values are added together
# Number of i64 fields in the context of the compiled function. In order: items that threads have taken, all items, key
# heads, query heads per key head; L (positions), D (width of a key), V (width of a value); pointers to q, K, V, the
# mask (0 if there is none), the output and the scratch memory; strides of K, then of V, over sequences, heads and
# positions, in elements; the bits of the fp32 scale
CONTEXT = 20
_scratch = Scratch()


def use_decode_attention(model: PreTrainedModel) -> None:
    """Replace SDPA by ``decode_attention``, if the whole model uses SDPA and none of its code checks for it."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if all(part.config._attn_implementation == "sdpa" for part in parts) and not any(map(_asks_for_sdpa, parts)):
        AttentionInterface.register(NAME, decode_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def _asks_for_sdpa(model: PreTrainedModel) -> bool:
    """Return whether the code of a model's class, or of a base class, depends on the attention function being SDPA."""
    classes = [
        kind for kind in type(model).__mro__ if issubclass(kind, PreTrainedModel) and kind is not PreTrainedModel
    ]
    try:
        return any(_ASKS.search(inspect.getsource(sys.modules[kind.__module__])) for kind in classes)
    except (OSError, TypeError):  # the source can't be read, so it might
        return True


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention of a single new token, in fp32. Other inputs go to transformers' function for SDPA.

    A sequence's result depends only on that sequence and its padding.

    Args:
        query: [batch, heads, tokens, width].
        key: [batch, key heads, length, width].
        value: [batch, key heads, length, values].
        attention_mask: [batch, 1, tokens, length], bool (True: attend) or numbers to be added.

    Returns:
        [batch, tokens, heads, values], and None in place of the attention weights.
    """
    is_plain = dropout == 0.0 and position_bias is None and kwargs.get("softcap") is None
    if not is_plain or torch.is_grad_enabled() or not _fits(query, key, value, attention_mask):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            position_bias=position_bias,
            **kwargs,
        )
    batch, heads, _, width = query.shape
    key_heads, length, values = key.shape[1], key.shape[2], value.shape[3]
    query = query.contiguous()
    out = torch.empty((batch, 1, heads, values), dtype=query.dtype)
    mask = None if attention_mask is None else _added(attention_mask, batch)
    share = heads // key_heads
    items = batch * key_heads
    nbytes = 4 * items * scratch_numbers(share, length, width, values)
    scratch = _scratch.take(nbytes, spare=nbytes // 4)  # spare memory, because the context grows with each token
    scale = struct.unpack("I", struct.pack("f", width**-0.5 if scaling is None else scaling))[0]
    shape = (0, items, key_heads, share, length, width, values)
    places = (query.data_ptr(), key.data_ptr(), value.data_ptr(), 0 if mask is None else mask.data_ptr())
    context = array("q", (*shape, *places, out.data_ptr(), scratch, *key.stride()[:3], *value.stride()[:3], scale))
    threads = min(items, threads_for(items * share * length * (width + values)))
    _kernel(query.dtype).run(context, threads)
    return out, None


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    return (
        query.shape[2] == 1
        and query.shape[3] == key.shape[3]
        and key.shape[1:3] == value.shape[1:3]
        and query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
        and query.dtype in FLOATS
        and query.shape[3] % LANES == value.shape[3] % LANES == 0
        and query.shape[1] % key.shape[1] == 0
        and query.shape[0] == key.shape[0] == value.shape[0]
        and key.stride(3) == value.stride(3) == 1
        and key.shape[2] > 0
        and (mask is None or (mask.dim() == 4 and mask.shape[1:] == (1, 1, key.shape[2])))
    )


def _added(mask: Tensor, batch: int) -> Tensor:
    """Convert a mask to fp32 [batch, length rounded up to LANES], to be added to scores."""
    found = mask[:, 0, 0]
    if mask.dtype == torch.bool:
        found = torch.zeros(found.shape).masked_fill_(~found, torch.finfo(torch.float32).min)
    found = F.pad(found.float(), (0, -found.shape[1] % LANES))
    return found.expand(batch, -1).contiguous()


@functools.cache
def _kernel(dtype: torch.dtype) -> Kernel:
    return compile_kernel(this_processor(), attention_module(dtype), ATTEND)


def scratch_numbers(heads: int, positions: int, width: int, values: int) -> int:
    """Return the size of an item's scratch memory in fp32 numbers: queries, rows of keys or values, scores, sums."""
    padded = -(-positions // LANES) * LANES
    return heads * (width + padded + values) + POSITIONS * max(width, values)


def attention_module(dtype: torch.dtype) -> ir.Module:
    """Emit the function ``ATTEND(context)``, which computes items until none is left.

    q [items, heads, D], keys, values and out [items, heads, V] are of ``dtype``; heads are those of queries that share
    a key head. The mask is fp32 [B, L rounded up to LANES]. D and V are multiples of LANES.
    """
    return _Attention(new_module(), dtype).module


class _Attention(Emitter):
    def __init__(self, module: ir.Module, dtype: torch.dtype) -> None:
        super().__init__(module, ATTEND, [POINTER])
        self._dtype = dtype
        at, n = self.at, self.number
        begun, fields = self.fields(CONTEXT)
        items, key_heads, self._heads, self._length, self._width, self._values = fields[:6]
        q, k, v, mask, out, scratch = fields[6:12]
        k_strides, v_strides = fields[12:15], fields[15:18]
        scale = at.bitcast(at.trunc(fields[18], I32), F32)
        self._padded = at.mul(at.udiv(at.add(self._length, n(LANES - 1)), n(LANES)), n(LANES))
        self._accumulators = [at.alloca(vector(F32, LANES)) for _ in range(HEADS)]
        wide = at.select(at.icmp_signed(">", self._width, self._values), self._width, self._values)
        numbers = at.mul(self._heads, at.add(self._width, at.add(self._padded, self._values)))
        numbers = at.add(numbers, at.mul(n(POSITIONS), wide))
        with self.items(begun, items) as item:
            sequence, head = at.udiv(item, key_heads), at.urem(item, key_heads)
            self._queries = at.inttoptr(at.add(scratch, at.mul(item, at.mul(numbers, n(4)))), POINTER)
            self._rows = at.gep(self._queries, [at.mul(at.mul(self._heads, self._width), n(4))])
            self._scores = at.gep(self._rows, [at.mul(wide, n(4 * POSITIONS))])
            self._sums = at.gep(self._scores, [at.mul(at.mul(self._heads, self._padded), n(4))])

            queries = at.mul(self._heads, self._width)
            self._take(self._address(q, at.mul(item, queries)), self._queries, queries, scale)
            self._score(self._begin(k, k_strides, sequence, head), k_strides[2])
            self._soften(mask, at.mul(sequence, self._padded))
            self._unite(self._begin(v, v_strides, sequence, head), v_strides[2])
            result = self._address(out, at.mul(item, at.mul(self._heads, self._values)))
            with self.loop(n(0), at.mul(self._heads, self._values), LANES) as i:
                self.store_floats(self._floats(self._sums, i), result, at.mul(i, n(dtype.itemsize)), dtype)
        at.ret_void()

    def _address(self, base: Value, elements: Value) -> Value:
        return self.at.inttoptr(self.at.add(base, self.at.mul(elements, self.number(self._dtype.itemsize))), POINTER)

    def _begin(self, base: Value, strides: list[Value], sequence: Value, head: Value) -> Value:
        at = self.at
        return self._address(base, at.add(at.mul(sequence, strides[0]), at.mul(head, strides[1])))

    def _floats(self, pointer: Value, index: Value) -> Value:
        return self.load(pointer, self.at.mul(index, self.number(4)), vector(F32, LANES))

    def _keep(self, value: Value, pointer: Value, index: Value) -> None:
        self.store(value, pointer, self.at.mul(index, self.number(4)))

    def _take(self, source: Value, target: Value, count: Value, scale: Value | None = None) -> None:
        """Emit a copy of ``count`` numbers to ``target`` as fp32, multiplied by ``scale`` if there is one."""
        at, n = self.at, self.number
        with self.loop(n(0), count, LANES) as i:
            value = self.load_floats(source, at.mul(i, n(self._dtype.itemsize)), self._dtype, LANES)
            if scale is not None:
                value = at.fmul(value, self.spread(scale, LANES))
            self._keep(value, target, i)

    def _some(self, count: Value, together: int, body: Callable[[int, Value], None]) -> None:
        """Emit a loop over ``count`` indices, ``together`` at a time, and one over the rest, one at a time.

        They call ``body(number of indices, first index)``.
        """
        at, n = self.at, self.number
        whole = at.mul(at.udiv(count, n(together)), n(together))
        with self.loop(n(0), whole, together) as first:
            body(together, first)
        with self.loop(whole, count) as first:
            body(1, first)

    def _score(self, keys: Value, stride: Value) -> None:
        """Emit the scores of all positions, with -inf in the padding after them."""
        at, n = self.at, self.number
        nothing = self.all(F32, -math.inf, LANES)
        with self.loop(n(0), self._heads) as head:
            self._keep(nothing, self._scores, at.sub(at.mul(at.add(head, n(1)), self._padded), n(LANES)))
        with self.loop(n(0), self._length) as position:
            key = at.gep(keys, [at.mul(at.mul(position, stride), n(self._dtype.itemsize))])
            self._take(key, self._rows, self._width)

            def dots(count: int, head: Value, position: Value = position) -> None:
                heads = [at.add(head, n(i)) for i in range(count)]
                for place in self._accumulators[:count]:
                    at.store(self.all(F32, 0.0, LANES), place)
                with self.loop(n(0), self._width, LANES) as i:
                    row = self._floats(self._rows, i)
                    for h, place in zip(heads, self._accumulators, strict=False):
                        query = self._floats(self._queries, at.add(at.mul(h, self._width), i))
                        at.store(self.multiply_add(query, row, at.load(place)), place)
                for h, place in zip(heads, self._accumulators, strict=False):
                    total = self.reduce(at.load(place), at.fadd)
                    self.store(total, self._scores, at.mul(at.add(at.mul(h, self._padded), position), n(4)))

            self._some(self._heads, HEADS, dots)

    def _soften(self, mask: Value, first: Value) -> None:
        """Emit the softmax of the scores, to which the mask is added first if there is one.

        ``first``: index in the mask of the sequence's first number.
        """
        at, n = self.at, self.number
        largest, total = self._accumulators[:2]
        rest, masked = self.function.append_basic_block("plain"), self.function.append_basic_block("masked")
        at.cbranch(at.icmp_signed("==", mask, n(0)), rest, masked)
        at.position_at_end(masked)
        added = at.inttoptr(at.add(mask, at.mul(first, n(4))), POINTER)
        with self.loop(n(0), self._heads) as head, self.loop(n(0), self._padded, LANES) as i:
            place = at.add(at.mul(head, self._padded), i)
            self._keep(at.fadd(self._floats(self._scores, place), self._floats(added, i)), self._scores, place)
        at.branch(rest)
        at.position_at_end(rest)
        with self.loop(n(0), self._heads) as head:
            begin = at.mul(head, self._padded)
            at.store(self.all(F32, -math.inf, LANES), largest)
            with self.loop(n(0), self._padded, LANES) as i:
                at.store(self._larger(self._floats(self._scores, at.add(begin, i)), at.load(largest)), largest)
            top = self.spread(self.reduce(at.load(largest), self._larger), LANES)
            at.store(self.all(F32, 0.0, LANES), total)
            with self.loop(n(0), self._padded, LANES) as i:
                share = self.exp(at.fsub(self._floats(self._scores, at.add(begin, i)), top))
                self._keep(share, self._scores, at.add(begin, i))
                at.store(at.fadd(at.load(total), share), total)
            inverse = at.fdiv(ir.Constant(F32, 1.0), self.reduce(at.load(total), at.fadd))
            with self.loop(n(0), self._padded, LANES) as i:
                place = at.add(begin, i)
                self._keep(at.fmul(self._floats(self._scores, place), self.spread(inverse, LANES)), self._scores, place)

    def _unite(self, values: Value, stride: Value) -> None:
        """Emit the sum of all values, weighted by the scores."""
        at, n = self.at, self.number
        with self.loop(n(0), at.mul(self._heads, self._values), LANES) as i:
            self._keep(self.all(F32, 0.0, LANES), self._sums, i)

        def add(count: int, position: Value) -> None:
            positions = [at.add(position, n(i)) for i in range(count)]
            rows = [at.gep(self._rows, [at.mul(self._values, n(4 * i))]) for i in range(count)]
            for p, row in zip(positions, rows, strict=True):
                self._take(at.gep(values, [at.mul(at.mul(p, stride), n(self._dtype.itemsize))]), row, self._values)
            with self.loop(n(0), self._heads) as head:
                begin = at.mul(head, self._padded)
                shares = [
                    self.spread(self.load(self._scores, at.mul(at.add(begin, p), n(4)), F32), LANES) for p in positions
                ]
                with self.loop(n(0), self._values, LANES) as i:
                    place = at.add(at.mul(head, self._values), i)
                    value = self._floats(self._sums, place)
                    for share, row in zip(shares, rows, strict=True):
                        value = self.multiply_add(share, self._floats(row, i), value)
                    self._keep(value, self._sums, place)

        self._some(self._length, POSITIONS, add)

    def _larger(self, a: Value, b: Value) -> Value:
        return self.at.select(self.at.fcmp_ordered(">", a, b), a, b)
