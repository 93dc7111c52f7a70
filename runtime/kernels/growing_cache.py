"""KV cache that grows in place.

transformers' DynamicLayer copies all keys and values for each new token (``torch.cat``). Here memory is allocated for
more tokens than there are, and the keys and values of new tokens are written into it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

TOKENS = 256  # memory is allocated for a multiple of this many tokens


class GrowingBuffer:
    """Memory for keys or values [batch, heads, capacity, width], of which the first ``used`` tokens are filled.

    Filled memory is never written again. So several caches may share their first tokens. A cache that continues after
    fewer tokens than are filled gets a new buffer.
    """

    def __init__(self, seen: Tensor, more: Tensor) -> None:
        """Copy ``seen`` and append ``more``.

        ``seen`` is [batch, heads, length, width], or nothing [0]; ``more`` is [batch, heads, tokens, width].
        """
        before = seen.shape[-2] if seen.numel() else 0
        self.used = before + more.shape[-2]
        capacity = -(-self.used // TOKENS) * TOKENS
        self._memory = more.new_empty((*more.shape[:-2], capacity, more.shape[-1]))
        if before:
            self._memory[..., :before, :] = seen
        self._memory[..., before : self.used, :] = more

    @property
    def view(self) -> Tensor:
        """The filled part [batch, heads, used, width]."""
        return self._memory[..., : self.used, :]

    def takes(self, seen: Tensor, more: Tensor) -> bool:
        """Return whether ``append`` may append ``more`` [batch, heads, tokens, width] to ``seen``.

        It may if ``seen`` is a view of the whole filled part of this buffer, and the buffer has room for ``more``.
        """
        memory = self._memory
        return (
            seen.data_ptr() == memory.data_ptr()
            and seen.dim() == memory.dim()
            and seen.shape[-2] == self.used <= memory.shape[-2] - more.shape[-2]
            and seen.stride() == memory.stride()
            and seen.shape[:-2] == more.shape[:-2] == memory.shape[:-2]
            and seen.shape[-1] == more.shape[-1] == memory.shape[-1]
            and more.dtype == memory.dtype
            and (torch.is_inference_mode_enabled() or not memory.is_inference())
        )

    def append(self, more: Tensor) -> None:
        """Append ``more`` [batch, heads, tokens, width], which ``takes`` has accepted."""
        before, self.used = self.used, self.used + more.shape[-2]
        self._memory[..., before : self.used, :] = more


class GrowingLayer(DynamicLayer):
    """A DynamicLayer that grows in place where no gradients are computed."""

    _buffers: tuple[GrowingBuffer, GrowingBuffer] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens [batch, heads, tokens, width]; return those of all tokens.

        These are [batch, heads, length + tokens, width].
        """
        if torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        buffers = self._buffers
        if buffers and buffers[0].takes(self.keys, key_states) and buffers[1].takes(self.values, value_states):
            buffers[0].append(key_states)
            buffers[1].append(value_states)
        else:
            buffers = self._buffers = None  # the old keys are freed as soon as they are copied, then the values
            keys = GrowingBuffer(self.keys, key_states)
            self.keys = keys.view
            buffers = self._buffers = keys, GrowingBuffer(self.values, value_states)
        self.keys, self.values = buffers[0].view, buffers[1].view
        return self.keys, self.values


def use_growing_layers(model: PreTrainedModel) -> None:
    """Turn the DynamicLayers of every cache that the model is called with into GrowingLayers."""
    model.base_model.register_forward_pre_hook(_grow, with_kwargs=True)


def _grow(module: Any, positional: Any, named: dict[str, Any]) -> None:
    cache = named.get("cache") if named.get("cache") is not None else named.get("past_key_values")
    for layer in getattr(cache, "layers", ()):
        if type(layer) is DynamicLayer:
            layer.__class__ = GrowingLayer
