"""Causal attention of many tokens by torch, which is faster than compiled code on processors with AMX.

torch compiles a product for each number of rows and columns, and keeps it. So tokens and keys are given to it in
multiples of TILE, which is also the size of a page of keys and values.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from moetier.runtime.kernels.products.api import CPU
from moetier.runtime.libraries.torch_internals import flash_attention

TILE = 64  # tokens or keys
STRIP = 256  # tokens that are computed together; keys after a strip are left out
SEGMENT = 4096  # keys of a call, more only with a larger window: torch packs a copy of them


def attend_with_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    length: int,
    window: int,
    scaling: float | None = None,
    sinks: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Compute causal attention of the last tokens of sequences, as ``attend`` does.

    A token's last bits may depend on the tokens beside it.

    Args:
        query: [batch, heads, tokens, width].
        key: [batch, key heads, places, width].
        value: [batch, key heads, places, values]; ``values`` are at most ``width``.
        length: number of keys.
        window: most positions that a token attends to, its own included.
        scaling: factor of scores; None: width ** -0.5.
        sinks: [heads].
        places: int64 [length], in which keys and values lie; None: one after the other from place 0 on.

    Returns:
        [batch, tokens, heads, values].
    """
    batch, heads, tokens, width = query.shape
    values = value.shape[3]
    out = torch.empty((batch, tokens, heads, values), dtype=query.dtype, device=CPU)

    def some(numbers: Tensor, first: int, last: int) -> Tensor:
        """Return the keys or values from ``first`` to before ``last``, as wide as keys, and more up to whole tiles."""
        part = numbers[:, :, first:last] if places is None else numbers.index_select(2, places[first:last])
        missing = (width - part.shape[3], (first - last) % TILE)
        return F.pad(part, (0, missing[0], 0, missing[1])) if any(missing) else part

    for begin in range(0, tokens, STRIP):
        end = min(begin + STRIP, tokens)
        first, last = length - tokens + begin, length - tokens + end  # positions of the strip's tokens
        strip = query[:, :, begin:end]
        if missing := (begin - end) % TILE:
            strip = F.pad(strip, (0, 0, 0, missing))
        # all tokens see the keys before ``own``, unless there is a window
        seen = max(0, first - window + 1) // TILE * TILE
        own = first // TILE * TILE if last <= window else seen
        bounds = [*range(seen, own, SEGMENT), own]
        parts = [
            flash_attention(strip, some(key, a, b), some(value, a, b), mask=None, scale=scaling)
            for a, b in itertools.pairwise(bounds)
        ]
        keys, rows = some(key, own, last), torch.arange(first, first + strip.shape[2])[:, None]
        columns = torch.arange(own, own + keys.shape[2])
        hidden = (columns > rows) | (columns <= rows - window)
        mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, -torch.inf)
        y, logs = flash_attention(strip, keys, some(value, own, last), mask=mask, scale=scaling)
        for other, other_logs in parts:  # each has a share of the probabilities
            total = torch.logaddexp(logs, other_logs)
            y = y * (logs - total).exp().unsqueeze(3) + other * (other_logs - total).exp().unsqueeze(3)
            logs = total
        if sinks is not None:  # a sink has a share, too, and no value
            y = y * torch.sigmoid(logs - sinks[:, None]).unsqueeze(3)
        out[:, begin:end] = y[:, :, : end - begin, :values].transpose(1, 2)
    return out
