"""Causal attention on a CPU: softmax(q @ K.T * scaling + mask) @ V, for one or many new tokens.

The compiled code divides its work into items, which threads take one by one. Few tokens' keys and values are read
once, for all the heads of queries that share them, and each piece of their positions can be another thread's.
"""

from __future__ import annotations

import itertools
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

    Returns:
        [batch, tokens, heads, values].
    """
    batch, heads, tokens, width = query.shape
    key_heads, length, has_codes = key.shape[1], key.shape[2], key.dtype == torch.int8
    values = value.shape[3] - SCALE_BYTES * has_codes
    share, first = heads // key_heads, first % PIECE  # nothing is before the first key
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
    tables = [_table(tensor, first, pieces) for tensor in (key, value)]
    sinks = None if sinks is None else sinks.contiguous()
    context = (
        *(0, 0, items, key_heads, share, tokens, strip, first, end, window, 0, width, values, pieces, spans),
        *(query.data_ptr(), *query.stride()[:3], *(table.buffer_info()[0] for table in tables)),
        *(*key.stride()[1:3], *value.stride()[1:3]),
        *((0, 0, 0) if mask is None else (mask.data_ptr(), *mask.stride()[:2])),
        *(out.data_ptr(), scratch, compiled.thread_bytes, scratch + own, compiled.item_bytes, scale),
        0 if sinks is None else sinks.data_ptr(),
    )
    compiled.kernel.run(array("q", (*context, *bytes(strips))), threads)
    return out


def _table(tensor: Tensor, first: int, pieces: int) -> array[int]:
    """Return the addresses of the pieces of keys or values [batch, heads, length, width]: [batch, pieces]."""
    of_sequence, _, of_position, _ = (tensor.itemsize * stride for stride in tensor.stride())
    begin = tensor.data_ptr() - first * of_position
    numbers = itertools.product(range(len(tensor)), range(pieces))
    return array("q", (begin + sequence * of_sequence + piece * PIECE * of_position for sequence, piece in numbers))
