"""A model computes with keys and values in pages what it computes with transformers' own cache."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from architectures import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, DynamicSlidingWindowLayer

from moetier.runtime.engine.model_runner import cache_layers
from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.layer.attention import use_causal_attention
from moetier.runtime.kernels.layer.paged_cache import PagedCache, PageMemory
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS

PAGES = 6
CONSECUTIVE, SCATTERED = [2, 3, 4], [4, 0, 2]
PARTS = (100, 1, 1, 30, 1)  # tokens that are computed together


@pytest.mark.parametrize("pages", [CONSECUTIVE, SCATTERED], ids=["consecutive", "scattered"])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3", "gemma4"])
def test_pages_hold_what_a_cache_holds(model_type: str, pages: list[int]) -> None:
    """Full and latent attention, sinks, and windows of 16 tokens."""
    model = tiny_model(model_type, torch.float32)
    use_causal_attention(model)
    text = model.config.get_text_config(decoder=True)
    own: Any = DynamicCache(config=text)
    paged = PagedCache(PageMemory(PAGES), cache_layers(model))
    ids, at = torch.randint(2, 250, (1, sum(PARTS)), generator=torch.Generator().manual_seed(0)), 0
    with torch.no_grad():
        for part in PARTS:
            given = ids[:, at : at + part]
            paged.resume_at(pages, at)
            wanted, found = (model(input_ids=given, **{CACHE: cache}).logits for cache in (own, paged))
            assert torch.equal(wanted, found) or torch.allclose(wanted, found, rtol=1e-5, atol=1e-5)
            at += part
            assert paged.get_seq_length() == at


def test_a_page_is_copied_up_to_a_token() -> None:
    memory, keys = PageMemory(3), torch.arange(2.0 * 20 * 4).reshape(1, 2, 20, 4)
    memory.write(0, [0], 0, keys, 2 * keys)
    memory.write(0, [2], 0, torch.zeros_like(keys), torch.zeros_like(keys))
    memory.copy_page(0, 2, 7)
    copied, values = memory.read(0, [2], 0, 20)
    assert torch.equal(copied[:, :, :7], keys[:, :, :7])
    assert not copied[:, :, 7:].any()
    assert torch.equal(values, 2 * copied)


@pytest.mark.parametrize("pages", [CONSECUTIVE, SCATTERED])
def test_compiled_layers_get_the_places_of_a_token(pages: list[int]) -> None:
    memory = PageMemory(PAGES)
    cache = PagedCache(memory, [DynamicLayer(), DynamicSlidingWindowLayer(16)])
    keys = torch.randn(1, 2, 100, 16)
    cache.resume_at(pages, 0)
    for number, layer in enumerate(cache.layers):
        assert layer.memory() is None, "there is no memory yet"
        cache.update(keys, keys, number)
        assert layer.memory() is not None
    own = [(layer.place.first, layer.place.new, layer.length) for layer in cache.layers]
    new = PAGE_TOKENS * pages[1] + 100 - PAGE_TOKENS
    assert own == [(0, new, 101), (85, new, 16)]
    for layer in cache.layers:
        layer.extend()
        assert layer.get_seq_length() == 101


class Operations(TorchDispatchMode):
    """Notes torch's operations while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.names = list[str]()

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        self.names.append(str(function))
        return function(*given, **(named or {}))


def test_positions_of_an_index_are_made_when_asked_for_and_on_the_device_of_its_keys() -> None:
    cache, keys = PagedCache(PageMemory(1), [DynamicIndexedLayer()]), torch.randn(1, 2, 20, 16, device="meta")
    (layer,) = cache.layers
    cache.resume_at([0], 0)
    assert layer.indexer_position_ids is None
    cache.update(keys, keys, 0)
    with Operations() as operations:
        cache.resume_at([0], 20)
    assert not operations.names, "most models don't ask for positions"
    positions = layer.indexer_position_ids
    assert (positions.shape, positions.device.type) == ((3, 1, 20), "meta")


def filled(heads: int = 2, width: int = 4, dtype: torch.dtype = torch.bfloat16) -> PageMemory:
    memory = PageMemory(3)
    for layer in (0, 2):
        keys = torch.randn(1, heads, 100, width).to(dtype)
        memory.write(layer, [2, 0], 0, keys, torch.cat([keys, keys], 3))
    return memory


def saved(memory: PageMemory, page: int, tokens: int) -> tuple[Any, memoryview]:
    data = memoryview(bytearray(tokens * sum(layer.token_bytes for layer in memory.layout)))
    memory.save_page(page, tokens, data)
    return json.loads(json.dumps(memory.layout)), data


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [PAGE_TOKENS, 30])
def test_a_saved_page_has_the_same_bits_in_another_memory(dtype: torch.dtype, tokens: int) -> None:
    """In one that holds nothing yet, too."""
    memory = filled(dtype=dtype)
    layout, data = saved(memory, 2, tokens)
    for other in (PageMemory(5), filled(dtype=dtype)):
        assert other.restore_page(1, tokens, layout, data)
        for layer in (0, 2):
            pairs = zip(memory.read(layer, [2], 0, tokens), other.read(layer, [1], 0, tokens), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize(
    "layout", [None, 5, [], [[0]], [[0, "load", 2, 4, 2, 8]], [[0, "bfloat16", 2, 4, 2, 8]], ["x"]]
)
def test_what_is_no_page_of_this_memory_is_not_restored(layout: Any) -> None:
    memory = filled()
    data = saved(memory, 2, 10)[1]
    assert not memory.restore_page(1, 10, layout, data)


def test_a_page_of_other_shapes_is_not_restored() -> None:
    memory = filled()
    for other in (filled(heads=4, width=2), filled(width=8), filled(dtype=torch.float32), filled(dtype=torch.float16)):
        assert not memory.restore_page(1, 10, *saved(other, 2, 10))
    layout, data = saved(memory, 2, 10)
    assert not memory.restore_page(1, 11, layout, data)
