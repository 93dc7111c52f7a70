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
        self.memory = more.new_empty((*more.shape[:-2], capacity, more.shape[-1]))
        if before:
            self.memory[..., :before, :] = seen
        self.memory[..., before : self.used, :] = more

    @property
    def view(self) -> Tensor:
        """The filled part [batch, heads, used, width]."""
        return self.memory.narrow(-2, 0, self.used)

    def takes(self, seen: Tensor, more: Tensor) -> bool:
        """Return whether ``append`` may append ``more`` [batch, heads, tokens, width] to ``seen``.

        It may if ``seen`` is a view of the whole filled part of this buffer, and the buffer has room for ``more``.
        """
        memory = self.memory
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
        self.memory[..., before : self.used, :] = more


class GrowingLayer(DynamicLayer):
    """A DynamicLayer that grows in place where no gradients are computed."""

    _buffers: tuple[GrowingBuffer, GrowingBuffer] | None = None
    _views: tuple[Tensor, Tensor] | None = None  # keys and values as they were set last

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
            # the old keys are freed as soon as they are copied, then the values
            buffers = self._buffers = self._views = None
            keys = GrowingBuffer(self.keys, key_states)
            self.keys = keys.view
            buffers = self._buffers = keys, GrowingBuffer(self.values, value_states)
        return self._show(buffers)

    def _show(self, buffers: tuple[GrowingBuffer, GrowingBuffer]) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._views = buffers[0].view, buffers[1].view
        return self._views

    def room(self) -> tuple[Tensor, Tensor] | None:
        """Return the memory of keys and values, [batch, heads, capacity, width] each, if a token fits after them.

        None if keys or values are not all that is filled, so that ``update`` has to copy them.
        """
        buffers, views = self._buffers, self._views
        if buffers is None or views is None or self.keys is not views[0] or self.values is not views[1]:
            return None
        if any(
            b.used != view.shape[-2] or b.used >= b.memory.shape[-2] for b, view in zip(buffers, views, strict=True)
        ):
            return None
        return buffers[0].memory, buffers[1].memory

    def extend(self) -> None:
        """Take over a token whose key and value were written into the memory that ``room`` has returned."""
        assert self._buffers is not None
        for buffer in self._buffers:
            buffer.used += 1
        self._show(self._buffers)


def use_growing_layers(model: PreTrainedModel) -> None:
    """Turn the DynamicLayers of every cache that the model is called with into GrowingLayers."""
    model.base_model.register_forward_pre_hook(_grow, with_kwargs=True)


def _grow(module: Any, positional: Any, named: dict[str, Any]) -> None:
    cache = named.get("cache") if named.get("cache") is not None else named.get("past_key_values")
    for layer in getattr(cache, "layers", ()):
        if type(layer) is DynamicLayer:
            layer.__class__ = GrowingLayer
