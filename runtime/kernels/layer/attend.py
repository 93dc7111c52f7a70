"""Causal attention on a CPU: softmax(q @ K.T * scaling + mask) @ V, for one or many new tokens.

The compiled code divides its work into items, which threads take one by one. Few tokens' keys and values are read
once, for all the heads of queries that share them, and each piece of their positions can be another thread's.
"""

from __future__ import annotations

import struct
from array import array

import torch
from torch import Tensor

from moetier.runtime.kernels.jit.processor import this_processor
from moetier.runtime.kernels.jit.team import Scratch, threads_for
from moetier.runtime.kernels.products.api import CPU

from .attention_code import NO_WINDOW, STRIP_ROWS, AttentionKernel
from .attention_piece import PIECE
from .eight_bits import SCALE_BYTES
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
    pieces, strip = -(-end // PIECE), max(1, min(tokens, STRIP_ROWS // share))
    strips = batch * key_heads * -(-tokens // strip)
    threads = threads_for(batch * heads * tokens * length * (width + values))
    spans = pieces if tokens == 1 or strips < 2 * threads else 1
    items = strips * spans
    threads = min(items, threads)
    compiled = AttentionKernel.of(
        this_processor(),
        query.dtype,
        strip * share,
        (width, values),
        None if sinks is None else sinks.dtype,
        has_codes=has_codes,
    )
    own = threads * compiled.thread_bytes
    nbytes = own + (items * compiled.item_bytes if spans > 1 else 0)
    scratch = _scratch.take(nbytes, spare=nbytes // 4)  # spare memory, because the context grows with each token
    scale = struct.unpack("I", struct.pack("f", width**-0.5 if scaling is None else scaling))[0]
    places, skipped = (ONE_PAGE, first) if pages is None else (pages, 0)
    bases = [tensor.data_ptr() - skipped * tensor.stride(2) * tensor.itemsize for tensor in (key, value)]
    sinks = None if sinks is None else sinks.contiguous()
    context = (  # the fields of ``AttentionContext``, in their order
        *(0, 0, items, key_heads, share, tokens, strip, first, end, window, 0, width, values, spans),
        *(query.data_ptr(), *query.stride()[:3], *bases, places.address(begin), places.bits),
        *(key.stride(0), value.stride(0), *key.stride()[1:3], *value.stride()[1:3]),
        *((0, 0, 0) if mask is None else (mask.data_ptr(), *mask.stride()[:2])),
        *(out.data_ptr(), scratch, compiled.thread_bytes, scratch + own, compiled.item_bytes, scale),
        0 if sinks is None else sinks.data_ptr(),
    )
    compiled.kernel.run(array("q", (*context, *bytes(strips))), threads)
    return out
