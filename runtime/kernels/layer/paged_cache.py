"""KV cache in pages: transformers' Cache of one sequence. Its keys and values lie in memory of several sequences.

A page holds the keys and values of PAGE_TOKENS consecutive tokens of a sequence, in all layers. Pages with consecutive
numbers lie next to one another, as the tokens of one tensor. The compiled layers of one token, and attention in packed
steps, read any pages where they are. ``PagedLayer.update`` returns one tensor: it copies pages that are not
consecutive.

Layers with a state of constant size (linear attention, Mamba, convolutions) are transformers' own, which keep it for
one sequence. ``state`` and ``set_state`` copy it, and a PageMemory holds such copies, as bytes, in pages.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from .attention_piece import PIECE
from .eight_bits import in_codes
from .growing_cache import CacheMemory, TokenPlace, memory_of
from .pages import PAGE_TOKENS, KeyPages

INDEX = 1 << 16  # added to a layer's number: the keys of its index, in the same pages; their values have no numbers


class LayerShape(NamedTuple):
    """Keys and values of a layer: its number, their type, and heads and widths of both."""

    layer: int
    dtype: str
    key_heads: int
    key_width: int
    value_heads: int
    value_width: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type. Raises AttributeError if torch has none of that name."""
        return getattr(torch, self.dtype)

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Heads and width of keys, and of values."""
        return (self.key_heads, self.key_width), (self.value_heads, self.value_width)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values."""
        return self.torch_dtype.itemsize * sum(heads * width for heads, width in self.parts)


class PageMemory:
    """Memory of keys and values, by layers and by numbers of pages.

    With 8 bits, keys and values are quantised when they are written. Attention reads the quantised ones, even for the
    token that was just written.
    """

    def __init__(self, pages: int, *, bits: int = 16) -> None:
        """``bits``: 8, or 16 for keys and values of any type as they are."""
        self._pages = pages
        self._has_codes = bits == 8
        # keys and values [1, heads, pages * PAGE_TOKENS, width] of a layer. The kernel gives memory at the first write
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, pages: list[int], begin: int, keys: Tensor, values: Tensor) -> None:
        """Write keys and values [1, heads, tokens, width] of the tokens from ``begin`` on into a sequence's pages."""
        if self._has_codes:
            keys, values = in_codes(keys), in_codes(values)
        if layer not in self.layers:
            self._allocate(layer, keys, values)
        at, end = begin, begin + keys.shape[2]
        while at < end:
            count = min(PAGE_TOKENS - at % PAGE_TOKENS, end - at)
            place = PAGE_TOKENS * pages[at // PAGE_TOKENS] + at % PAGE_TOKENS
            for memory, part in zip(self.layers[layer], (keys, values), strict=True):
                memory[:, :, place : place + count] = part[:, :, at - begin : at - begin + count]
            at += count

    def read(self, layer: int, pages: list[int], begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [1, heads, end - begin, width] of a sequence's tokens from ``begin`` to ``end``.

        In 8 bits they are ``in_codes``.
        """
        first = begin // PAGE_TOKENS
        used = pages[first : -(-end // PAGE_TOKENS)]
        keys, values = self.layers[layer]
        if are_consecutive(used):
            place = PAGE_TOKENS * used[0] + begin % PAGE_TOKENS
            return keys.narrow(2, place, end - begin), values.narrow(2, place, end - begin)
        parts = (
            torch.cat([part.narrow(2, PAGE_TOKENS * page, PAGE_TOKENS) for page in used], 2) for part in (keys, values)
        )
        keys, values = (part.narrow(2, begin % PAGE_TOKENS, end - begin) for part in parts)
        return keys, values

    def copy_page(self, source: int, target: int, tokens: int) -> None:
        """Copy the keys and values of the first ``tokens`` tokens of a page to another page."""
        for layer in self.layers.values():
            for memory in layer:
                memory.narrow(2, PAGE_TOKENS * target, tokens).copy_(memory.narrow(2, PAGE_TOKENS * source, tokens))

    @property
    def layout(self) -> list[LayerShape]:
        """The parts of a page, in the order in which ``save_page`` writes them."""
        return [
            LayerShape(layer, str(keys.dtype).removeprefix("torch."), *keys.shape[1::2], *values.shape[1::2])
            for layer, (keys, values) in sorted(self.layers.items())
        ]

    def save_page(self, page: int, tokens: int, data: memoryview) -> None:
        """Write the keys and values of the first ``tokens`` tokens of a page into ``data``, layer after layer.

        May be called on any thread. If another thread writes the page meanwhile, the result is of no use.
        """
        at = 0
        for _, layer in sorted(self.layers.items()):
            for memory in layer:
                part = _bytes_of(memory, page, tokens)
                np.copyto(np.frombuffer(data, np.uint8, part.size, at).reshape(part.shape), part)
                at += part.size

    def restore_page(self, page: int, tokens: int, layout: Any, data: memoryview) -> bool:
        """Write into a page what ``save_page`` has written. Return False if that does not fit this memory.

        ``layout`` is what JSON has kept of the ``layout`` of the memory from which the page was saved.
        """
        try:
            shapes = [LayerShape(*given) for given in layout]
            if len(data) != tokens * sum(shape.token_bytes for shape in shapes):
                return False
        except (TypeError, AttributeError):
            return False
        if not {*self.layout} <= {*shapes}:
            return False
        at = 0
        for shape in shapes:
            if shape.layer not in self.layers:
                self._allocate(shape.layer, *(torch.empty(1, n, 0, w, dtype=shape.torch_dtype) for n, w in shape.parts))
            for memory in self.layers[shape.layer]:
                part = _bytes_of(memory, page, tokens)
                np.copyto(part, np.frombuffer(data, np.uint8, part.size, at).reshape(part.shape))
                at += part.size
        return True

    def _allocate(self, layer: int, *like: Tensor) -> None:
        """Allocate the memory of a layer, for keys and values that are like the given ones, [1, heads, any, width]."""
        size = self._pages * PAGE_TOKENS
        self.layers[layer] = tuple(  # type: ignore[assignment] # two tensors
            part.new_empty((1, part.shape[1], size, part.shape[3])) for part in like
        )

    def layer_memory(self, layer: int) -> CacheMemory | None:
        """Return the memory of all pages in a layer, as compiled code needs it; None if it can't be read so."""
        return memory_of(*self.layers[layer]) if layer in self.layers else None

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in all layers that have been written."""
        return sum(part.nbytes for part in self._bytes_of(0))

    def save(self, pages: list[int], numbers: Tensor) -> None:
        """Write bytes, uint8 [size], into pages, in place of keys and values."""
        for part, piece in self._pieces(pages, numbers.numel()):
            if (missing := part.numel() - len(numbers[piece])) > 0:
                part.copy_(torch.nn.functional.pad(numbers[piece], (0, missing)).view(part.shape))
            else:
                part.copy_(numbers[piece].view(part.shape))

    def load(self, pages: list[int], size: int) -> Tensor:
        """Return the first ``size`` bytes that ``save`` has written into pages, uint8 [size]."""
        numbers = torch.empty(size, dtype=torch.uint8)
        for part, piece in self._pieces(pages, size):
            target = numbers[piece]
            target.copy_(part.flatten()[: len(target)])
        return numbers

    def _pieces(self, pages: list[int], size: int) -> Iterator[tuple[Tensor, slice]]:
        """Yield the memory of pages, uint8 [heads, PAGE_TOKENS, bytes], and which of ``size`` bytes lie there."""
        at = 0
        for page in pages:
            for part in self._bytes_of(page):
                if at < size:
                    yield part, slice(at, min(at + part.numel(), size))
                at += part.numel()

    def _bytes_of(self, page: int) -> Iterator[Tensor]:
        for _, layer in sorted(self.layers.items()):
            for memory in layer:
                yield memory[0].narrow(1, PAGE_TOKENS * page, PAGE_TOKENS).view(torch.uint8)


def _bytes_of(memory: Tensor, page: int, tokens: int) -> Any:
    """Return an array u8 [heads, tokens, bytes] on the first tokens of a page.

    numpy copies it on the calling thread alone; torch might start a team of threads for it.
    """
    return memory[0].view(torch.uint8).numpy()[:, PAGE_TOKENS * page : PAGE_TOKENS * page + tokens]


def are_consecutive(pages: list[int]) -> bool:
    """Return whether each page is followed by the one with the next number."""
    return not pages or pages == [*range(pages[0], pages[0] + len(pages))]


class PagedCache(Cache):
    """Cache of the sequence that is computed: ``move`` says which. Nothing but its layers has to be updated."""

    def __init__(self, memory: PageMemory, layers: Sequence[Any]) -> None:
        """``layers``: transformers' layers of a cache without tokens. Those with keys and values are replaced."""
        self.pages: list[int] = []
        self.key_pages = KeyPages(array("q"))
        replaced = [_paged(self, memory, *layer) for layer in enumerate(layers)]
        self._paged = [layer for layer in replaced if isinstance(layer, PagedLayer)]
        super().__init__(layers=replaced)

    def resume_at(self, pages: list[int], computed: int) -> None:
        """Continue the sequence that has these pages after its first ``computed`` tokens."""
        self.pages, self.key_pages = pages, KeyPages(array("q", pages))
        for layer in self._paged:
            layer.resume_at(computed)

    def state(self) -> dict[StatePart, Tensor]:
        """Return the state besides keys and values: the tensors that the layers keep, of any shapes [1, ...]."""
        return {
            StatePart(place, number, is_recurrent): part
            for place, layer in enumerate(self.layers)
            if isinstance(layer, LinearAttentionCacheLayerMixin)
            for number in range(layer.number_of_states)
            for is_recurrent, part in enumerate((layer.conv_states[number], layer.recurrent_states[number]))
            if part is not None
        }

    def set_state(self, state: dict[StatePart, Tensor]) -> None:
        """Let the layers of a cache without tokens continue from a state, tensors [1, ...]."""
        for (place, number, is_recurrent), part in state.items():
            update = self.update_recurrent_state if is_recurrent else self.update_conv_state
            update(part, place, number)


class StatePart(NamedTuple):
    """Place of a tensor in the state of a sequence."""

    layer: int
    number: int  # of several such tensors in the layer
    is_recurrent: int  # 1: a recurrent state; 0: the last inputs of a convolution


class PagedLayer(DynamicLayer):
    """Layer of a PagedCache."""

    def __init__(self, cache: PagedCache, memory: PageMemory, number: int, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = window is not None
        self.end = 0  # number of tokens
        self._cache, self._memory, self._number, self._window = cache, memory, number, window
        self._room: CacheMemory | None = None  # what ``room`` has returned last

    def resume_at(self, computed: int) -> None:
        """Continue a sequence after its first ``computed`` tokens."""
        self.end, self.is_initialized = computed, computed > 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens [1, heads, tokens, width]; return those of all that they attend to."""
        first, begin = self.first_position, self.end
        self._memory.write(self._number, self._cache.pages, begin, key_states, value_states)
        self.end, self.is_initialized = begin + key_states.shape[2], True
        return self._memory.read(self._number, self._cache.pages, first, self.end)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens new ones attend to, with themselves, and the position of the first of these."""
        return self.end - self.first_position + query_length, self.first_position

    def get_seq_length(self) -> int:
        """Return the number of tokens."""
        return self.end

    def memory(self) -> CacheMemory | None:
        """Return the memory of all pages. The pages of this sequence have room for its next token."""
        if self._room is None:
            self._room = self._memory.layer_memory(self._number)
        return self._room

    @property
    def place(self) -> TokenPlace:
        """Places in ``room``: of the new token, and of those that it attends to."""
        pages, first = self._cache.key_pages, self.first_position % PIECE
        begin = self.first_position - first
        return TokenPlace(pages.address(begin), pages.bits, first, pages.place(self.end))

    @property
    def length(self) -> int:
        """Number of tokens that a new one attends to, itself included."""
        return self.end - self.first_position + 1

    @property
    def first_position(self) -> int:
        """Position of the first token that a new one attends to."""
        return 0 if self._window is None else max(0, self.end - self._window + 1)

    def extend(self) -> None:
        """Count one more token. Its key and value are in the memory that ``room`` has returned."""
        self.end += 1


class PagedStateLayer(LinearAttentionLayer, PagedLayer):  # type: ignore[misc, override] # as transformers' own are
    """Layer of a PagedCache that has a state besides keys and values."""

    is_compileable = False

    def __init__(self, *given: Any, number_of_states: int) -> None:
        """Make a layer without tokens; ``given`` are the arguments of PagedLayer."""
        PagedLayer.__init__(self, *given)
        LinearAttentionLayer.__init__(self, number_of_states)


class PagedIndexedLayer(PagedLayer):
    """Layer of a PagedCache with the keys of an index besides, by which attention chooses positions."""

    def __init__(self, *given: Any) -> None:
        """Make a layer without tokens; ``given`` are the arguments of PagedLayer."""
        super().__init__(*given)
        self.index_end = 0  # number of tokens that the index has

    def resume_at(self, computed: int) -> None:
        """Continue a sequence after its first ``computed`` tokens."""
        super().resume_at(computed)
        self.index_end = computed

    @property
    def indexer_position_ids(self) -> Tensor | None:
        """Positions of the tokens [3, 1, tokens]. qwen4_exp alone asks for them, and its first such layer only."""
        if not self.end:
            return None
        device = self._memory.layers[self._number][0].device
        return torch.arange(self.end, device=device).expand(3, 1, -1)

    @indexer_position_ids.setter
    def indexer_position_ids(self, extended: Tensor) -> None:
        """Keep none of the positions [3, 1, tokens]: they follow from the number of tokens once these are appended."""

    def update(self, key_states: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [1, heads, tokens, width]. ``keys`` then says how many tokens there are."""
        found = super().update(key_states, *others, **named)
        self.keys = key_states.new_empty(1, 1, self.end, 0)  # glm5_next asks for its shape
        return found

    def update_indexer(self, keys: Tensor) -> Tensor:
        """Append the index's keys of new tokens [1, tokens, width]; return those of all tokens."""
        layer, pages, begin = INDEX + self._number, self._cache.pages, self.index_end
        self.index_end = begin + keys.shape[1]
        self._memory.write(layer, pages, begin, keys[:, None], keys[:, None, :, :0])
        return self._memory.read(layer, pages, 0, self.index_end)[0][:, 0]


def _paged(cache: PagedCache, memory: PageMemory, number: int, layer: Any) -> Any:
    """Return the paged layer in place of transformers' cache layer, or the latter if it holds no keys and values."""
    has_keys, has_states = (isinstance(layer, base) for base in (DynamicLayer, LinearAttentionCacheLayerMixin))
    if not has_keys:
        return layer
    given = cache, memory, number, getattr(layer, "sliding_window", None)
    if has_states:
        return PagedStateLayer(*given, number_of_states=layer.number_of_states)
    return (PagedIndexedLayer if isinstance(layer, DynamicIndexedLayer) else PagedLayer)(*given)
