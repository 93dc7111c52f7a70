"""Causal attention of many tokens by torch, which is faster than compiled code on processors with AMX."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moetier.runtime.kernels.products.api import CPU
from moetier.runtime.libraries.torch_internals import flash_attention

from .masks import causal

MIN_TOKENS = 32  # fewer are slower: torch multiplies whole tiles, and keys and values in pages are copied first
STRIP = 256  # tokens of a call: keys after a strip are left out, and its mask stays small


def attend_with_torch(
    query: Tensor, key: Tensor, value: Tensor, window: int, scaling: float | None, sinks: Tensor | None
) -> Tensor:
    """Compute causal attention of the last tokens of sequences, as ``attend`` does.

    A token's last bits may depend on the tokens beside it.

    Args:
        query: [batch, heads, tokens, width].
        key: [batch, key heads, length, width].
        value: [batch, key heads, length, values]; ``values`` are at most ``width``.
        window: most positions that a token attends to, its own included.
        scaling: factor of scores; None: width ** -0.5.
        sinks: [heads].

    Returns:
        [batch, tokens, heads, values].
    """
    batch, heads, tokens, width = query.shape
    before, values = key.shape[2] - tokens, value.shape[3]
    if values < width:  # flash attention needs values as wide as keys
        value = F.pad(value, (0, width - values))
    out = torch.empty((batch, tokens, heads, values), dtype=query.dtype, device=CPU)
    for begin in range(0, tokens, STRIP):
        end = min(begin + STRIP, tokens)
        first = max(0, before + begin - window + 1)  # key that the strip's first token attends to
        last = before + end
        mask = None
        if last - first > end - begin or window < last - first:
            shown = causal(end - begin, last - first, min(window, last - first), CPU)
            mask = torch.zeros(shown.shape, dtype=query.dtype, device=CPU).masked_fill_(~shown, -torch.inf)
        y, logs = flash_attention(
            query[:, :, begin:end], key[:, :, first:last], value[:, :, first:last], mask=mask, scale=scaling
        )
        if sinks is not None:  # a sink has a share of the probabilities, and no value
            y = y * torch.sigmoid(logs - sinks[:, None]).unsqueeze(3)
        out[:, begin:end] = y[..., :values].transpose(1, 2)
    return out
