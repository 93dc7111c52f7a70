"""Keys and values that grow where they lie.

transformers' DynamicLayer copies all that it has for each token that comes (``torch.cat``). Here memory is taken for
some tokens beyond those that are there, and what comes is put behind them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

TOKENS = 256  # memory is for a multiple of so many


class Room:
    """Memory for keys or values [B, heads, capacity, D], of which the first ``used`` tokens are there.

    Who has a shorter view of it, or a view of the same and comes second, gets a room of its own: what is there is never
    written again.
    """

    def __init__(self, seen: Tensor, more: Tensor) -> None:
        """Of ``seen`` [B, heads, L, D], or of nothing [0], with ``more`` [B, heads, T, D] behind it."""
        before = seen.shape[-2] if seen.numel() else 0
        self.used = before + more.shape[-2]
        capacity = -(-self.used // TOKENS) * TOKENS
        self._memory = more.new_empty((*more.shape[:-2], capacity, more.shape[-1]))
        if before:
            self._memory[..., :before, :] = seen
        self._memory[..., before : self.used, :] = more

    @property
    def view(self) -> Tensor:
        """[B, heads, used, D]."""
        return self._memory[..., : self.used, :]

    def takes(self, seen: Tensor, more: Tensor) -> bool:
        """Whether ``seen`` is all that is there, and ``more`` may be put behind it."""
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
        before, self.used = self.used, self.used + more.shape[-2]
        self._memory[..., before : self.used, :] = more


class GrowingLayer(DynamicLayer):
    """As a DynamicLayer, for who computes without gradients."""

    _rooms: tuple[Room, Room] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[B, heads, T, D] of new tokens -> those of all, [B, heads, L + T, D]."""
        if torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        rooms = self._rooms
        if rooms and rooms[0].takes(self.keys, key_states) and rooms[1].takes(self.values, value_states):
            rooms[0].append(key_states)
            rooms[1].append(value_states)
        else:
            rooms = self._rooms = None  # what was there goes as soon as it is copied
            keys = Room(self.keys, key_states)
            self.keys = keys.view
            rooms = self._rooms = keys, Room(self.values, value_states)
        self.keys, self.values = rooms[0].view, rooms[1].view
        return self.keys, self.values


def use_growing_layers(model: PreTrainedModel) -> None:
    """In each cache that the model is called with, from then on."""
    model.base_model.register_forward_pre_hook(_grow, with_kwargs=True)


def _grow(module: Any, positional: Any, named: dict[str, Any]) -> None:
    cache = named.get("cache") if named.get("cache") is not None else named.get("past_key_values")
    for layer in getattr(cache, "layers", ()):
        if type(layer) is DynamicLayer:
            layer.__class__ = GrowingLayer
