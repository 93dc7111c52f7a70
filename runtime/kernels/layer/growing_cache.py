"""KV cache that grows in place.

transformers' DynamicLayer copies all keys and values for each new token (``torch.cat``), and its layer with a sliding
window those of the window. Here memory is allocated for more tokens than there are, and the keys and values of new
tokens are written into it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from moetier.runtime.kernels.products.api import is_readable

from .pages import ONE_PAGE

TOKENS = 256  # memory is allocated for a multiple of this many tokens


class GrowingBuffer:
    """Memory for keys or values [batch, heads, capacity, width], of which the first ``used`` tokens are filled.

    Filled memory is never written again. So several caches may share their first tokens. A cache that continues after
    fewer tokens than are filled gets a new buffer.
    """

    def __init__(self, seen: Tensor, more: Tensor, spare: int = 0) -> None:
        """Copy ``seen`` and append ``more``. Leave room for at least ``spare`` further tokens.

        ``seen`` is [batch, heads, length, width], or nothing [0]; ``more`` is [batch, heads, tokens, width].
        """
        before = seen.shape[-2] if seen.numel() else 0
        self.used = before + more.shape[-2]
        capacity = -(-(self.used + spare) // TOKENS) * TOKENS
        self.memory = more.new_empty((*more.shape[:-2], capacity, more.shape[-1]))
        if before:
            self.memory[..., :before, :] = seen
        self.memory[..., before : self.used, :] = more

    @property
    def view(self) -> Tensor:
        """The filled part [batch, heads, used, width]."""
        return self.memory.narrow(-2, 0, self.used)

    def takes(self, seen: Tensor, more: Tensor, begin: int = 0) -> bool:
        """Return whether ``append`` may append ``more`` [batch, heads, tokens, width] to ``seen``.

        It may if ``seen`` is a view of the filled part of this buffer from place ``begin`` on, and the buffer has room
        for ``more``.
        """
        memory = self.memory
        return (
            seen.dim() == memory.dim()
            and seen.data_ptr() == memory.data_ptr() + begin * memory.stride(-2) * memory.itemsize
            and seen.shape[-2] + begin == self.used <= memory.shape[-2] - more.shape[-2]
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


class CacheMemory(NamedTuple):
    """Memory of the keys and values of one sequence, which has room for more tokens, as compiled code needs it."""

    signature: tuple[torch.dtype, int, int, int]  # type, number of heads, width of keys, width of values
    addresses: tuple[int, int]  # of keys and values
    strides: tuple[int, ...]  # of keys, then of values: of sequences, heads and positions, in items


class TokenPlace(NamedTuple):
    """Places in a CacheMemory: of a new token's key and value, and of those that the token attends to."""

    pages: int  # address of page numbers; the first is that of the page in which a piece begins
    page_bits: int  # logarithm of the number of places of a page
    first: int  # place of the first token that is attended to, counted along these pages
    new: int  # place of the new token


class _InPlace(DynamicLayer):
    """Base class of layers that grow in place where no gradients are computed."""

    _buffers: tuple[GrowingBuffer, GrowingBuffer] | None = None
    _views: tuple[Tensor, Tensor] | None = None  # keys and values as they were set last
    _begin = _end = 0  # places in the buffers: of this layer's first token, and after its last
    _is_longer = False  # whether ``extend`` has added tokens since ``_views`` were made
    _room: CacheMemory | None = None  # what ``room`` has returned last

    # ``keys`` and ``values`` are views of the buffers, and are made only when they are read, because that takes long.
    # ``vars(self)`` has those that were made or set last.

    @property
    def keys(self) -> Tensor | None:
        """Keys of all tokens [batch, heads, length, width]; None at first."""
        return self._shown("keys")

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:  # [batch, heads, length, width]
        self._shown("keys")
        vars(self)["keys"] = keys

    @property
    def values(self) -> Tensor | None:
        """Values of all tokens [batch, heads, length, width]; None at first."""
        return self._shown("values")

    @values.setter
    def values(self, values: Tensor | None) -> None:  # [batch, heads, length, width]
        self._shown("values")
        vars(self)["values"] = values

    def _shown(self, name: str) -> Tensor | None:
        if self._is_longer:
            self._show()
        return vars(self).get(name)

    def _show(self) -> None:
        assert self._buffers is not None
        length = self._end - self._begin
        keys, values = (buffer.memory.narrow(-2, self._begin, length) for buffer in self._buffers)
        self._views = vars(self)["keys"], vars(self)["values"] = keys, values
        self._is_longer = False

    def _joins(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Return whether ``_append`` may join tokens [batch, heads, tokens, width] to those that the layer has.

        Those may be a user's. torch refuses others, or changes the type of all.
        """
        pairs = (self.keys, key_states), (self.values, value_states)
        return all(
            seen is None
            or not seen.numel()
            or (
                type(seen) is type(more)
                and (seen.dtype, seen.device) == (more.dtype, more.device)
                and (seen.shape[:-2], seen.shape[-1]) == (more.shape[:-2], more.shape[-1])
            )
            for seen, more in pairs
        )

    def _append(self, key_states: Tensor, value_states: Tensor, spare: int) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens [batch, heads, tokens, width]; return those of all tokens.

        If memory is allocated for them, it has room for at least ``spare`` further tokens.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        buffers, begin = self._buffers, self._begin
        if (
            buffers
            and buffers[0].takes(self.keys, key_states, begin)
            and buffers[1].takes(self.values, value_states, begin)
        ):
            buffers[0].append(key_states)
            buffers[1].append(value_states)
        else:
            # the old keys are freed as soon as they are copied, then the values
            buffers = self._buffers = self._views = self._room = None
            key_buffer = GrowingBuffer(self.keys, key_states, spare)
            self.keys = key_buffer.view
            buffers = self._buffers = key_buffer, GrowingBuffer(self.values, value_states, spare)
            begin = self._begin = 0
        self._end = buffers[0].used
        keys, values = (buffer.memory.narrow(-2, begin, self._end - begin) for buffer in buffers)
        self._advance()
        self._show()
        return keys, values

    def _advance(self) -> None:
        """Drop tokens that the layer does not keep."""

    def memory(self) -> CacheMemory | None:
        """Return the memory of keys and values of one sequence on a CPU, if another token fits into it.

        Return None otherwise, and if ``update`` has to copy keys or values because they are not all of the tokens in
        the buffers.
        """
        buffers, views, own = self._buffers, self._views, vars(self)
        if buffers is None or views is None or own["keys"] is not views[0] or own["values"] is not views[1]:
            return None
        keys, values = buffers
        if not keys.used == values.used == self._end < min(keys.memory.shape[-2], values.memory.shape[-2]):
            return None
        addresses = keys.memory.data_ptr(), values.memory.data_ptr()
        if (room := self._room) is None or room.addresses != addresses:
            room = self._room = memory_of(keys.memory, values.memory)
        return room

    @property
    def place(self) -> TokenPlace:
        """Places in ``room``: of the new token, and of those that it attends to."""
        return TokenPlace(ONE_PAGE.numbers.buffer_info()[0], ONE_PAGE.bits, self._begin, self._end)

    @property
    def length(self) -> int:
        """Number of tokens that a new one attends to, itself included."""
        return self._end - self._begin + 1

    @property
    def first_position(self) -> int:
        """Position of the first token that a new one attends to."""
        return 0

    def extend(self) -> None:
        """Count one more token. Its key and value are in the memory that ``room`` has returned."""
        assert self._buffers is not None
        self._end += 1
        self._is_longer = True
        for buffer in self._buffers:
            buffer.used += 1
        self._advance()


class GrowingLayer(_InPlace):
    """A DynamicLayer that grows in place where no gradients are computed."""

    def get_seq_length(self) -> int:
        """Return the number of tokens."""
        return self._end if self._is_longer else super().get_seq_length()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens [batch, heads, tokens, width]; return those of all tokens.

        These are [batch, heads, length + tokens, width].
        """
        if torch.is_grad_enabled() or not self._joins(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        return self._append(key_states, value_states, 0)


class GrowingWindow(_InPlace, DynamicSlidingWindowLayer):
    """A DynamicSlidingWindowLayer that grows in place where no gradients are computed.

    Tokens that have left the window stay in memory until it is full. Then those of the window are copied.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens [batch, heads, tokens, width].

        Returns all keys and values that the new tokens attend to: those still in the window, then the new ones.
        """
        is_usual = not self.record_past and key_states.shape[-2] <= TOKENS
        if torch.is_grad_enabled() or not is_usual or not self._joins(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length += key_states.shape[-2]
        return self._append(key_states, value_states, TOKENS // 2)

    def _advance(self) -> None:
        self._begin = max(self._begin, self._end - self.sliding_window + 1)

    @property
    def first_position(self) -> int:
        """Position of the first token that a new one attends to."""
        return int(self.cumulative_length) - (self._end - self._begin)

    def memory(self) -> CacheMemory | None:
        """Return the memory as ``_InPlace.memory`` does; None if tokens that leave the window have to be kept."""
        return None if self.record_past else super().memory()

    def extend(self) -> None:
        """Count one more token. Its key and value are in the memory that ``room`` has returned."""
        super().extend()
        self.cumulative_length += 1


_GROWING: dict[Any, Any] = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: GrowingWindow}


def memory_of(keys: Tensor, values: Tensor) -> CacheMemory | None:
    """Return the memory of keys and values [1, heads, capacity, width]; None if compiled code can't read them."""
    if keys.shape[:2] != values.shape[:2] or keys.shape[0] != 1 or keys.dtype != values.dtype:
        return None
    if not is_readable(keys) or not is_readable(values):
        return None
    signature = (keys.dtype, keys.shape[1], keys.shape[3], values.shape[3])
    return CacheMemory(signature, (keys.data_ptr(), values.data_ptr()), (*keys.stride()[:3], *values.stride()[:3]))


def grow(cache: Any) -> None:
    """Turn the layers of a cache into layers that grow in place, if they are DynamicLayers or sliding windows."""
    for layer in getattr(cache, "layers", ()):
        if (class_ := _GROWING.get(type(layer))) is not None:
            layer.__class__ = class_


def use_growing_layers(model: PreTrainedModel) -> None:
    """Let every cache that the model is called with grow in place (``grow``)."""
    model.base_model.register_forward_pre_hook(_grow, with_kwargs=True)


def _grow(module: Any, positional: Any, named: dict[str, Any]) -> None:
    grow(named.get("cache") if named.get("cache") is not None else named.get("past_key_values"))
