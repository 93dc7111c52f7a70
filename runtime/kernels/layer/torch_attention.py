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
SEGMENT = 4096  # most keys of a call: torch packs a copy of them


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

    def attend_to(strip: Tensor, low: int, high: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the results of ``flash_attention`` with the keys from ``low`` to before ``high``."""
        return flash_attention(strip, some(key, low, high), some(value, low, high), mask=mask, scale=scaling)

    def mask_of(rows: Tensor, low: int, high: int) -> Tensor:
        """Return the mask of tokens at the positions ``rows`` [tokens, 1], for keys as ``some`` returns them."""
        columns = torch.arange(low, high + (low - high) % TILE)
        hidden = (columns > rows) | (columns <= rows - window)
        return torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, -torch.inf)

    for begin in range(0, tokens, STRIP):
        end = min(begin + STRIP, tokens)
        first, last = length - tokens + begin, length - tokens + end  # positions of the strip's tokens
        strip = query[:, :, begin:end]
        if missing := (begin - end) % TILE:
            strip = F.pad(strip, (0, 0, 0, missing))
        rows = torch.arange(first, first + strip.shape[2])[:, None]
        # all tokens see the keys from ``seen`` to before ``own``; a window hides some in the first segment
        seen, has_window = max(0, first - window + 1) // TILE * TILE, last > window
        own = seen if has_window and last - seen <= SEGMENT else first // TILE * TILE
        y, logs = attend_to(strip, own, last, mask_of(rows, own, last))
        for low, high in itertools.pairwise([*range(seen, own, SEGMENT), own]):
            mask = mask_of(rows, low, high) if has_window and low == seen else None
            other, other_logs = attend_to(strip, low, high, mask)
            total = torch.logaddexp(logs, other_logs)  # each has a share of the probabilities
            y = y * (logs - total).exp().unsqueeze(3) + other * (other_logs - total).exp().unsqueeze(3)
            logs = total
        if sinks is not None:  # a sink has a share, too, and no value
            y = y * torch.sigmoid(logs - sinks[:, None]).unsqueeze(3)
        out[:, begin:end] = y[:, :, : end - begin, :values].transpose(1, 2)
    return out
