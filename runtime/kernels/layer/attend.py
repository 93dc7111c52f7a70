"""Causal attention on a CPU: softmax(q @ K.T * scaling + mask) @ V, for one or many new tokens.

The compiled code divides its work into items, which threads take one by one. Few tokens' keys and values are read
once, for all the heads of queries that share them, and each piece of their positions can be another thread's.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from moetier.runtime.kernels.jit.processor import this_processor
from moetier.runtime.kernels.jit.team import Scratch, threads_for
from moetier.runtime.kernels.products.api import CPU

from .attention_code import NO_WINDOW, STRIP_ROWS, AttentionContext, AttentionKernel
from .attention_piece import PIECE
from .eight_bits import SCALE_BYTES
from .norm import float_bits
from .pages import ONE_PAGE, KeyPages

_scratch = Scratch()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sinks: Tensor | None = None,
    window: int = NO_WINDOW,
    first: int = 0,
    pages: KeyPages | None = None,
    length: int | None = None,
) -> Tensor:
    """Compute causal attention of the last tokens of sequences.

    A token's result depends on its own query and on the keys and values that it attends to: neither on the other tokens
    and sequences nor on the number of threads. Types and sizes must be those that ``attention_module`` takes.

    Args:
        query: [batch, heads, tokens, width].
        key: [batch, key heads, length, width], or ``in_codes`` of these.
        value: [batch, key heads, length, values], or ``in_codes`` of these.
        mask: fp32 [batch, tokens, ``first`` % PIECE + length, rounded up to a multiple of STEP], added to scores.
        scaling: factor of scores; None: width ** -0.5.
        sinks: [heads].
        window: most positions that a token attends to, its own included.
        first: position of the first key in its sequence.
        pages: in which keys and values of a single sequence lie in ``key`` and ``value``; None: ``key`` and ``value``
            have the keys and values from ``first`` on, one after the other.
        length: number of keys from ``first`` on; None: that of ``key``.

    Returns:
        [batch, tokens, heads, values].
    """
    batch, heads, tokens, width = query.shape
    key_heads, has_codes = key.shape[1], key.dtype == torch.int8
    length = key.shape[2] if length is None else length
    values = value.shape[3] - SCALE_BYTES * has_codes
    # nothing is before the first key, so that positions are counted from the beginning of its piece
    share, begin, first = heads // key_heads, first - first % PIECE, first % PIECE
    end = first + length
    out = torch.empty((batch, tokens, heads, values), dtype=query.dtype, device=CPU)
    threads = threads_for(batch * heads * tokens * length * (width + values))
    strip, strips, spans = _division(batch * key_heads, share, tokens, end, threads)
    items = strips * spans
    threads = min(items, threads)
    sink_dtype, sinks = (None, None) if sinks is None else (sinks.dtype, sinks.contiguous())
    compiled = AttentionKernel.of(
        this_processor(), query.dtype, strip * share, (width, values), sink_dtype, has_codes=has_codes
    )
    own = threads * compiled.thread_bytes
    nbytes = own + (items * compiled.item_bytes if spans > 1 else 0)
    scratch = _scratch.take(nbytes, spare=nbytes // 4)  # spare memory, because the context grows with each token
    places, skipped = (ONE_PAGE, first * key.itemsize) if pages is None else (pages, 0)
    of_queries, of_keys, of_values = query.stride(), key.stride(), value.stride()  # strides, in numbers
    of_mask = (0, 0) if mask is None else mask.stride()
    context = AttentionContext(
        items=items, key_heads=key_heads, share=share, tokens=tokens, strip=strip, spans=spans,
        first=first, end=end, window=window, key_width=width, value_width=values,
        queries=query.data_ptr(), keys=key.data_ptr() - skipped * of_keys[2],
        values=value.data_ptr() - skipped * of_values[2], pages=places.address(begin), page_bits=places.bits,
        query_sequence=of_queries[0], query_head=of_queries[1], query_token=of_queries[2],
        key_sequence=of_keys[0], key_head=of_keys[1], key_position=of_keys[2],
        value_sequence=of_values[0], value_head=of_values[1], value_position=of_values[2],
        mask=0 if mask is None else mask.data_ptr(), mask_sequence=of_mask[0], mask_token=of_mask[1],
        out=out.data_ptr(), scratch=scratch, thread_bytes=compiled.thread_bytes,
        results=scratch + own, item_bytes=compiled.item_bytes,
        scaling=float_bits(width**-0.5 if scaling is None else scaling),
        sinks=0 if sinks is None else sinks.data_ptr(),
    )  # fmt: skip
    compiled.kernel.run(array("q", (*context, *bytes(strips))), threads)
    return out


def _division(groups: int, share: int, tokens: int, end: int, threads: int) -> tuple[int, int, int]:
    """Divide the work of ``groups`` query groups, whose keys end before position ``end``, among threads.

    Returns the number of tokens of a strip, the number of strips, and the number of items of a strip.
    """
    strip = max(1, min(tokens, STRIP_ROWS // share))
    strips = groups * -(-tokens // strip)
    return strip, strips, -(-end // PIECE) if tokens == 1 or strips < 2 * threads else 1
