"""Attention of one new token on a CPU: softmax(q @ K.T * scale + mask) @ V, in fp32.

torch's scaled_dot_product_attention takes many times as long as it takes to read keys and values, and compiles its
matrix products anew for each length of a context (docs/benchmarks.md, Attention).

The compiled code divides its work into items, which threads take one by one. An item is at most PIECE positions of one
head of keys and values with all the heads of queries that share it, so that keys and values are read once, and a few
heads can use many threads. The result does not depend on other sequences or on the number of threads.
"""

from __future__ import annotations

import inspect
import re
import struct
import sys
from array import array
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .attention_code import PIECE, attention_kernel, scratch_numbers
from .emitter import FLOATS, LANES
from .team import Scratch, threads_for

_ASKS = re.compile(r'_attn_implementation\s*(?:==|!=|in|not in)\s[^\n]*"sdpa"')
NAME = "moetier_sdpa"  # among transformers' attention functions
_scratch = Scratch()


def use_decode_attention(model: PreTrainedModel) -> None:
    """Replace SDPA by ``decode_attention``, if the whole model uses SDPA and its code does not depend on that."""
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
    share, groups, pieces = heads // key_heads, batch * key_heads, -(-length // PIECE)
    items = groups * pieces
    threads = min(items, threads_for(batch * heads * length * (width + values)))
    of_thread, of_item = scratch_numbers(share, width, values)
    nbytes = 4 * (threads * of_thread + items * of_item)
    scratch = _scratch.take(nbytes, spare=nbytes // 4)  # spare memory, because the context grows with each token
    scale = struct.unpack("I", struct.pack("f", width**-0.5 if scaling is None else scaling))[0]
    shape = (0, 0, items, key_heads, share, length, width, values, pieces)
    places = (query.data_ptr(), key.data_ptr(), value.data_ptr(), 0 if mask is None else mask.data_ptr())
    memory = (out.data_ptr(), scratch, scratch + 4 * threads * of_thread)
    strides = (*key.stride()[:3], *value.stride()[:3])
    context = array("q", (*shape, *places, *memory, *strides, scale, *bytes(groups)))
    attention_kernel(query.dtype).run(context, threads)
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
