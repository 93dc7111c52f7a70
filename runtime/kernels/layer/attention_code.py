"""Emit the compiled code of attention, for one or many new tokens. ``attention.py`` runs it.

A *query group* is one head of keys and values of a sequence, with all the heads of queries that share it. A *strip* is
a query group's rows for some tokens next to one another. Its pieces (``attention_piece.py``) are merged in their order
(Milakov & Gimelshein 2018, arXiv 1805.02867). Pieces begin at fixed positions, so that a row's result depends on what
it attends to only: neither on the tokens that are computed with it nor on the number of threads.

An item of work is a strip with one of the pieces, or with all of them. In the former case the thread that computes the
last item of a strip merges its pieces.

A *sink* is a score of a head of queries that belongs to no position: it takes part in the softmax, but has no value
(Xiao et al. 2023, arXiv 2309.17453).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from llvmlite import ir

from moetier.runtime.kernels.jit.emitter import F32, I32, I64, LANES, POINTER, Dtype, Value, once
from moetier.runtime.kernels.jit.processor import Processor
from moetier.runtime.kernels.jit.team import Kernel, compile_kernel
from moetier.runtime.kernels.products.words import has_pairs

from .attention_piece import LOG2_E, PIECE, ROWS, KeyPiece, PieceEmitter, Sight, held_numbers, result_numbers

ATTEND = "moetier_attend"  # name of the compiled function
STRIP_ROWS = 10 * ROWS  # most rows of a strip; more would need more memory than the processor's caches have
NO_WINDOW = 1 << 40  # positions


class AttentionContext(NamedTuple):
    """The i64 fields in the context of the compiled function.

    After the fields: one i64 for each strip of query rows, its finished work items. Strides are in numbers. Positions
    are counted from the beginning of piece 0, where a page begins too.
    """

    begun: int = 0  # items that threads have taken
    threads: int = 0  # threads that have begun
    items: int = 0  # number of all items
    key_heads: int = 0
    share: int = 0  # heads of queries that share a head of keys
    tokens: int = 0  # new tokens of a sequence
    strip: int = 0  # tokens of a strip
    first: int = 0  # position of the first key
    end: int = 0  # position after the last key
    window: int = 0  # most positions that a token attends to up to its own
    after: int = 0  # most positions after its own that a token attends to
    key_width: int = 0  # D, of a query or key; a multiple of LANES
    value_width: int = 0  # V; a multiple of LANES
    spans: int = 0  # items of a strip: 1, or as many as pieces
    queries: int = 0  # address of q [sequences, heads, tokens, D]
    query_sequence: int = 0  # strides of q
    query_head: int = 0
    query_token: int = 0
    keys: int = 0  # address of place 0 of the keys' memory [sequences, key heads, places, D]
    values: int = 0  # address of place 0 of the values' memory [sequences, key heads, places, V]
    pages: int = 0  # address of the numbers of the pages [pages], i64, in which the positions lie
    page_bits: int = 0  # a page has 1 << page_bits positions. In memory, those of page n begin at place n << page_bits
    key_sequence: int = 0  # strides of both memories
    value_sequence: int = 0
    key_head: int = 0
    key_position: int = 0
    value_head: int = 0
    value_position: int = 0
    mask: int = 0  # address of the fp32 mask [sequences, tokens, positions]; 0 if there is none
    mask_sequence: int = 0  # strides of the mask
    mask_token: int = 0
    out: int = 0  # address of the output [sequences, tokens, heads, V], without gaps
    scratch: int = 0  # address of the memory of all threads
    thread_bytes: int = 0  # size of one thread's memory
    # if a strip has several items, address of their results, fp32 [items, rows of a strip, V + LANES]: the outputs of a
    # row, and a vector with its m and z
    results: int = 0
    item_bytes: int = 0  # size of one item's results
    scaling: int = 0  # bits of the fp32 factor of scores
    sinks: int = 0  # address of the sinks [heads]; 0 if there are none


STRIDES = (  # of numbers of the kernel's type; the mask has others
    *("query_sequence", "query_head", "query_token"),
    *("key_sequence", "value_sequence", "key_head", "key_position", "value_head", "value_position"),
)
PLACE = {name: place for place, name in enumerate(AttentionContext.__annotations__)}  # index of a field
CONTEXT = len(PLACE)


class AttentionKernel(NamedTuple):
    """The compiled function ``ATTEND(context)`` for strips of a number of rows, and the memory that it needs."""

    kernel: Kernel
    thread_bytes: int  # of a thread's memory
    item_bytes: int  # of the results of an item

    @classmethod
    @functools.cache
    def of(
        cls,
        processor: Processor,
        dtype: torch.dtype,
        rows: int,
        widths: tuple[int, int],
        sink_dtype: torch.dtype | None = None,
        *,
        has_codes: bool = False,
    ) -> AttentionKernel:
        """Return the function for strips of ``rows`` rows.

        ``widths``: of queries and keys, and of values. ``sink_dtype``: type of the sinks; None: the same.
        ``has_codes``: whether keys and values are in 8 bits.
        """
        pairs = has_pairs(processor, dtype, widths[0])
        kernel = attention_kernel(processor, dtype, pairs, rows <= ROWS, sink_dtype or dtype, has_codes)
        item_bytes = 4 * rows * result_numbers(widths[1])
        return cls(kernel, 4 * held_numbers(rows, *widths) + 2 * item_bytes, item_bytes)


@once
def attention_kernel(
    processor: Processor,
    dtype: torch.dtype,
    has_pairs: bool,
    has_few_rows: bool,
    sink_dtype: torch.dtype,
    has_codes: bool,
) -> Kernel:
    """Compile ``attention_module``, once for these types and for few and for many rows."""
    module = attention_module(processor, dtype, has_pairs, has_few_rows, sink_dtype, has_codes)
    return compile_kernel(processor, module, ATTEND, unroll=False)


def attention_module(
    processor: Processor,
    dtype: Dtype,
    has_pairs: bool,
    has_few_rows: bool,
    sink_dtype: Dtype,
    has_codes: bool,
) -> ir.Module:
    """Emit the function ``ATTEND(context)``, which computes items until none is left.

    q [sequences, heads, tokens, D], keys, values and out [sequences, tokens, heads, V] are of ``dtype``, and sinks
    [heads] of ``sink_dtype``. The mask is fp32 [sequences, tokens, positions rounded up to a multiple of STEP]. A strip
    has at most ROWS rows if ``has_few_rows``. Keys and values are those of ``in_codes`` if ``has_codes``.
    """
    variant = {"has_pairs": has_pairs, "has_few_rows": has_few_rows, "has_codes": has_codes}
    return _AttentionEmitter(dtype, processor, sink_dtype, **variant).finish()


class _Strip(NamedTuple):
    """The strip of an item, all i64."""

    sequence: Value
    head: Value  # of keys and values
    token: Value  # the first
    tokens: Value  # number of tokens
    rows: Value  # number of rows
    sight: Sight  # positions that any of its tokens attends to


class _AttentionEmitter(PieceEmitter):
    _strip: _Strip  # of the present item
    _base: Value  # first position of the present piece

    def __init__(self, dtype: Dtype, processor: Processor, sink_dtype: Dtype, **variant: bool) -> None:
        self._sink_dtype = sink_dtype
        super().__init__(ATTEND, dtype, processor, **variant)
        at, n = self.at, self.number
        (context,) = self.function.args
        begun, fields = self.fields(CONTEXT)
        given = AttentionContext(begun, *fields)
        sizes = {name: dtype.itemsize if name.startswith("query") else self.itemsize for name in STRIDES}
        strides = {name: at.mul(getattr(given, name), n(size)) for name, size in sizes.items()}
        self._given = given = given._replace(**strides)
        self.key_width, self.value_width = given.key_width, given.value_width
        self.key_stride, self.value_stride = given.key_position, given.value_position
        self.pages, self.page_bits = at.inttoptr(given.pages, POINTER), given.page_bits
        scaling = at.bitcast(at.trunc(given.scaling, I32), F32)
        self._scaling = self.spread(at.fmul(scaling, ir.Constant(F32, LOG2_E)), LANES)
        thread = at.atomic_rmw("add", self.pointer_at(context, n(8), I64), n(1), "monotonic")
        memory = at.inttoptr(at.add(given.scratch, at.mul(thread, given.thread_bytes)), POINTER)
        self._state = self.hold(memory, at.mul(given.strip, given.share))  # of the pieces before
        self._result = at.gep(self._state, [given.item_bytes])
        with self.items(begun, given.items) as item:
            self._compute_item(context, item)

    def _compute_item(self, context: Value, item: Value) -> None:
        at, n, given = self.at, self.number, self._given
        is_split = at.icmp_signed(">", given.spans, n(1))
        number, span = at.udiv(item, given.spans), at.urem(item, given.spans)
        self._strip = strip = self._strip_of(number)
        begin, end = at.udiv(strip.sight.low, n(PIECE)), at.udiv(at.add(strip.sight.high, n(PIECE - 1)), n(PIECE))
        results = at.inttoptr(at.add(given.results, at.mul(at.sub(item, span), given.item_bytes)), POINTER)
        self._take_queries()
        self._begin()
        first = at.select(is_split, self.most(span, begin), begin)
        last = at.select(is_split, self.least(at.add(span, n(1)), end), end)
        with self.loop(first, last) as index:
            self._base = at.mul(index, n(PIECE))
            piece = self._piece(index)
            self.arrange(piece)
            result = at.select(is_split, at.gep(results, [at.mul(index, given.item_bytes)]), self._result)
            with self.loop(n(0), strip.rows, ROWS) as row:
                count = self.least(at.sub(strip.rows, row), n(ROWS))
                sight = self._sight(row, at.sub(at.add(row, count), n(1)))
                self.compute(piece, row, count, self._inside(sight), result)
                with at.if_then(at.not_(is_split)):
                    self._merge(row, count, result)
        finished = self.pointer_at(context, at.mul(at.add(n(CONTEXT), number), n(8)), I64)
        others = at.atomic_rmw("add", finished, n(1), "acq_rel")  # the last thread sees what the others wrote
        with at.if_then(at.icmp_signed("==", at.add(others, n(1)), given.spans)):
            with at.if_then(is_split), self.loop(begin, end) as index:
                self._merge(n(0), strip.rows, at.gep(results, [at.mul(index, given.item_bytes)]))
            self._end()

    def _strip_of(self, number: Value) -> _Strip:
        """Emit the strip with a number. A group's last tokens come first, because they attend to the most positions."""
        at, n, given = self.at, self.number, self._given
        strips = at.udiv(at.add(given.tokens, at.sub(given.strip, n(1))), given.strip)
        group, later = at.udiv(number, strips), at.urem(number, strips)
        token = at.mul(at.sub(at.sub(strips, n(1)), later), given.strip)
        tokens = self.least(given.strip, at.sub(given.tokens, token))
        sequence, head = at.udiv(group, given.key_heads), at.urem(group, given.key_heads)
        low, high = self._sight_of(token).low, self._sight_of(at.sub(at.add(token, tokens), n(1))).high
        return _Strip(sequence, head, token, tokens, at.mul(tokens, given.share), Sight(low, high))

    def _sight_of(self, token: Value) -> Sight:
        """Emit what a token attends to, in positions of the sequence."""
        at, given = self.at, self._given
        last = at.add(at.sub(given.end, given.tokens), at.add(token, self.number(1)))
        return Sight(
            self.most(given.first, at.sub(last, given.window)), self.least(given.end, at.add(last, given.after))
        )

    def _sight(self, first: Value, last: Value) -> Sight:
        """Emit what any of the rows ``first`` .. ``last`` of the strip attends to, in positions of the sequence."""
        at, strip, share = self.at, self._strip, self._given.share
        one, other = (self._sight_of(at.add(strip.token, at.udiv(row, share))) for row in (first, last))
        return Sight(one.low, other.high)

    def _inside(self, sight: Sight) -> Sight:
        """Emit the part of a sight that is in the present piece, in its positions."""
        at, n = self.at, self.number
        low, high = (self.least(self.most(at.sub(end, self._base), n(0)), n(PIECE)) for end in sight)
        return Sight(low, high)

    def sight_of(self, row: Value) -> Sight:
        """Emit what a row attends to in the present piece."""
        return self._inside(self._sight(row, row))

    def _piece(self, index: Value) -> KeyPiece:
        at, given, strip = self.at, self._given, self._strip

        def address(base: Value, of_sequence: Value, of_head: Value) -> Value:
            return at.add(base, at.add(at.mul(strip.sequence, of_sequence), at.mul(strip.head, of_head)))

        keys = address(given.keys, given.key_sequence, given.key_head)
        values = address(given.values, given.value_sequence, given.value_head)
        return KeyPiece(keys, values, at.mul(index, self.number(PIECE)), self._inside(strip.sight))

    @contextlib.contextmanager
    def _heads(self) -> Iterator[tuple[Value, Value, Value]]:
        """Emit a loop over the strip's rows. Yields the row, its token, and its head of queries."""
        at, n, given, strip = self.at, self.number, self._given, self._strip
        with self.loop(n(0), strip.rows) as row:
            token = at.add(strip.token, at.udiv(row, given.share))
            yield row, token, at.add(at.mul(strip.head, given.share), at.urem(row, given.share))

    def _take_queries(self) -> None:
        at, given, strip = self.at, self._given, self._strip
        start = at.add(given.queries, at.mul(strip.sequence, given.query_sequence))
        with self._heads() as (row, token, head):
            offset = at.add(at.mul(head, given.query_head), at.mul(token, given.query_token))
            self.copy_query(at.inttoptr(at.add(start, offset), POINTER), row)

    def scaled(self, scores: Value) -> Value:
        """Emit a vector of scores times the scaling and LOG2_E."""
        return self.at.fmul(scores, self._scaling)

    def add_mask(self, scores: Value, row: Value, begin: Value, end: Value) -> None:
        """Emit the addition of the mask, if there is one, to a row's scores."""
        at, n, given, strip = self.at, self.number, self._given, self._strip
        with at.if_then(at.icmp_signed("!=", given.mask, n(0))):
            token = at.add(strip.token, at.udiv(row, given.share))
            start = at.add(at.mul(strip.sequence, given.mask_sequence), at.mul(token, given.mask_token))
            start = at.mul(start, n(4))
            mask = at.inttoptr(at.add(at.add(given.mask, start), at.mul(self._base, n(4))), POINTER)
            with self.loop(begin, end, LANES) as i:
                added = at.fmul(self.floats_at(mask, i), self.floats(LOG2_E))
                self.keep(at.fadd(self.floats_at(scores, i), added), scores, i)

    # -- pieces together

    def _begin(self) -> None:
        """Emit the state of the rows before the first piece: s = 0, and m and z of a sink, or of nothing."""
        at, n, given = self.at, self.number, self._given
        has_sinks = at.icmp_signed("!=", given.sinks, n(0))
        m, z = self.registers
        with self._heads() as (row, _, head):
            state = self.result_of(self._state, row)
            with self.loop(n(0), self.value_width, LANES) as i:
                self.keep(self.floats(0.0), state, i)
            at.store(self.lowest(), m)
            at.store(self.floats(0.0), z)
            with at.if_then(has_sinks):
                sinks = at.inttoptr(given.sinks, POINTER)
                sink = self.load_floats(sinks, at.mul(head, n(self._sink_dtype.itemsize)), self._sink_dtype, 1)
                sink = at.fmul(self.pick(sink, sink, [0] * LANES), self.floats(LOG2_E))
                at.store(self.larger(sink, self.lowest()), m)
                at.store(self.exp2(at.fsub(sink, at.load(m))), z)
            self._keep_sums(state, at.load(m), at.load(z))

    def _merge(self, row: Value, count: Value, results: Value) -> None:
        """Emit the merging of a piece's results of ``count`` rows, from row ``row`` on, into their state."""
        at, n = self.at, self.number
        with self.loop(row, at.add(row, count)) as r:
            state, new = self.result_of(self._state, r), self.result_of(results, r)
            m, m_new = (self._number(numbers, self.value_width) for numbers in (state, new))
            top = self.larger(m_new, m)
            old_share, new_share = self.exp2(at.fsub(m, top)), self.exp2(at.fsub(m_new, top))

            def merged(old: Value, added: Value) -> Value:
                return self.multiply_add(new_share, added, at.fmul(old_share, old))

            z = merged(*(self._number(numbers, at.add(self.value_width, n(1))) for numbers in (state, new)))
            self._keep_sums(state, top, z)
            with self.loop(n(0), self.value_width, LANES) as i:
                self.keep(merged(self.floats_at(state, i), self.floats_at(new, i)), state, i)

    def _keep_sums(self, state: Value, m: Value, z: Value) -> None:
        mixed = self.pick(m, z, [0, LANES])
        self.keep(mixed, state, self.value_width)

    def _end(self) -> None:
        """Emit the outputs of the strip: s / z."""
        at, n, given, strip = self.at, self.number, self._given, self._strip
        heads = at.mul(given.key_heads, given.share)
        with self._heads() as (row, token, head):
            state = self.result_of(self._state, row)
            z = self._number(state, at.add(self.value_width, n(1)))
            nothing = at.fcmp_ordered("==", z, self.floats(0.0))  # a token that attends to nothing gives 0
            inverse = at.select(nothing, self.floats(0.0), at.fdiv(self.floats(1.0), z))
            number = at.add(at.mul(at.add(at.mul(strip.sequence, given.tokens), token), heads), head)
            start = at.mul(at.mul(number, self.value_width), n(self.dtype.itemsize))
            out = at.inttoptr(at.add(given.out, start), POINTER)
            with self.loop(n(0), self.value_width, LANES) as i:
                value = at.fmul(self.floats_at(state, i), inverse)
                self.store_floats(value, out, at.mul(i, n(self.dtype.itemsize)), self.dtype)

    def _number(self, pointer: Value, index: Value) -> Value:
        """Emit a vector whose elements all are the fp32 number at an index."""
        return self.spread(self.load(pointer, self.at.mul(index, self.number(4)), F32), LANES)
