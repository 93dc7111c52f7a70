"""Keys and values that grow in place, beside transformers' that are copied."""

from __future__ import annotations

import copy
import ctypes
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from moetier.runtime.generation.compat import CACHE
from moetier.runtime.kernels.layer.growing_cache import TOKENS, GrowingLayer, GrowingWindow
from moetier.runtime.model.load import load

Pair = tuple[Tensor, Tensor]


def pair(tokens: int, seed: int, batch: int = 2) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, tokens, 8, generator=generator), torch.randn(batch, 3, tokens, 4, generator=generator)


def same(layer: Any, other: Any) -> bool:
    return torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)


STEPS = st.one_of(
    st.tuples(st.just("update"), st.sampled_from([1, 1, 1, 2, 7, TOKENS - 1, TOKENS])),
    st.tuples(st.just("crop"), st.integers(1, 9)),
    st.tuples(st.just("reorder"), st.integers(0, 1)),
    st.tuples(st.just("fork"), st.booleans()),
    st.tuples(st.just("return"), st.just(0)),
)


WINDOWS = [None, 9, TOKENS + 5]


@pytest.mark.parametrize("window", WINDOWS)
@settings(max_examples=100, deadline=None)
@given(steps=st.lists(STEPS, max_size=14))
@torch.inference_mode()
def test_whatever_is_done_it_holds_what_a_copied_one_holds(window: int | None, steps: list[tuple[str, int]]) -> None:
    """Of the layers that were put aside as well: a fork that shares memory writes into none of them."""
    now: tuple[Any, Any] = GrowingLayer(), DynamicLayer()
    if window is not None:
        now = GrowingWindow(window), DynamicSlidingWindowLayer(window)
    aside: list[tuple[Any, Any]] = []
    for number, (step, count) in enumerate(steps):
        length = now[1].get_seq_length()
        if step == "update":
            results = [layer.update(*pair(count, number)) for layer in now]
            assert all(map(torch.equal, *results))
        elif step == "crop" and count < length and not (window and length >= window):
            for layer in now:
                layer.crop(-count)
        elif step == "reorder" and length:
            for layer in now:
                layer.reorder_cache(torch.tensor([count, 0]))
        elif step == "fork" and length:
            aside.append(now)
            now = (copy.deepcopy(now[0]) if count else copy.copy(now[0])), copy.deepcopy(now[1])
        elif step == "return" and aside:
            aside.append(now)
            now = aside.pop(0)
        assert now[0].get_seq_length() == now[1].get_seq_length()
        assert all(same(*layers) for layers in (now, *aside) if layers[1].get_seq_length())


@pytest.mark.parametrize("window", [9, TOKENS - 1, TOKENS + 1])
@torch.inference_mode()
def test_a_window_is_copied_seldom(window: int) -> None:
    layer, other, memories = GrowingWindow(window), DynamicSlidingWindowLayer(window), set()
    for number in range(3 * TOKENS):
        for one, two in zip(layer.update(*pair(1, number)), other.update(*pair(1, number)), strict=True):
            assert torch.equal(one, two)
        assert same(layer, other)
        memories.add(layer.keys.untyped_storage().data_ptr())
    assert layer.get_seq_length() == 3 * TOKENS
    assert len(memories) <= 7


@torch.inference_mode()
def test_what_is_written_into_a_windows_room_is_taken_over() -> None:
    layer, other = GrowingWindow(9), DynamicSlidingWindowLayer(9)
    for one in (layer, other):
        one.update(*pair(5, 0, batch=1))
    for number in range(TOKENS // 2):
        room, more = layer.memory(), pair(1, number, batch=1)
        assert room is not None
        last = layer.place.new
        assert last + 1 - layer.place.first == layer.length == min(other.get_seq_length() + 1, 9)
        for address, (_, head, position), new in zip(
            room.addresses, (room.strides[:3], room.strides[3:]), more, strict=True
        ):
            for number, row in enumerate(new[0, :, 0]):
                ctypes.memmove(address + 4 * (number * head + last * position), row.data_ptr(), 4 * len(row))
        layer.extend()
        other.update(*more)
        assert layer.get_mask_sizes(1) == other.get_mask_sizes(1)
        if number % 3 == 0:
            assert same(layer, other)


@torch.inference_mode()
def test_a_window_that_records_the_past_keeps_what_leaves_it() -> None:
    """A token that is taken back needs the token that has left the window for it."""
    layer, other = GrowingWindow(9), DynamicSlidingWindowLayer(9)
    for one in (layer, other):
        for number in range(2):
            one.update(*pair(8, number, batch=1))
        one.activate_past_recording()
    assert layer.memory() is None
    for one in (layer, other):
        one.update(*pair(1, 2, batch=1))
        one.crop(-1)
    assert same(layer, other)


@torch.inference_mode()
def test_a_token_is_put_behind_the_others() -> None:
    layer = GrowingLayer()
    layer.update(*pair(3, 0))
    place = layer.keys.data_ptr()
    for number in range(TOKENS - 3):
        layer.update(*pair(1, number))
        assert layer.keys.data_ptr() == place
    layer.update(*pair(1, 99))
    assert layer.keys.data_ptr() != place
    assert layer.keys.untyped_storage().nbytes() == 2 * TOKENS * 2 * 3 * 8 * 4


class SameMemory(TorchFunctionMode):
    """Lets new keys and values have the addresses of those before, as an allocator may."""

    def __init__(self) -> None:
        super().__init__()
        self._memory = {width: torch.empty(3 * 2 * TOKENS * width) for width in (8, 4)}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not Tensor.new_empty:
            return function(*args, **(kwargs or {}))
        _, shape = args
        return self._memory[shape[-1]][: math.prod(shape)].view(shape)


@torch.inference_mode()
def test_room_is_that_of_the_new_memory() -> None:
    layer = GrowingLayer()
    with SameMemory():
        layer.update(*pair(TOKENS + 1, 0, batch=1))
        before = layer.memory()
        layer.reorder_cache(torch.tensor([0]))
        layer.crop(-TOKENS)
        layer.update(*pair(1, 1, batch=1))
        after = layer.memory()
    assert before is not None
    assert after is not None
    assert before.addresses == after.addresses
    assert [before.strides[1], after.strides[1]] == [2 * TOKENS * 8, TOKENS * 8]


def test_what_was_made_in_inference_mode_grows_outside_of_it() -> None:
    layer, other = GrowingLayer(), DynamicLayer()
    with torch.inference_mode():
        layer.update(*pair(3, 0))
        other.update(*pair(3, 0))
    with torch.no_grad():
        layer.update(*pair(1, 1))
        other.update(*pair(1, 1))
    assert same(layer, other)


def test_with_gradients_it_is_copied() -> None:
    layer = GrowingLayer()
    keys, values = (tensor.requires_grad_() for tensor in pair(2, 0))
    layer.update(keys, values)
    found, _ = layer.update(*pair(1, 1))
    found.sum().backward()
    assert keys.grad is not None


@pytest.mark.parametrize("exact", [False, True])
def test_a_models_cache_grows_in_place(tinymix_4bit: Path, exact: bool) -> None:
    model, _ = load(tinymix_4bit, daemon=None, exact=exact, device="cpu")
    with model.tiers, torch.inference_mode():
        cache = DynamicCache(config=model.config)
        cache.layers[-1] = DynamicSlidingWindowLayer(sliding_window=4096)
        model(torch.tensor([[5, 6, 7]]), **{CACHE: cache}, use_cache=True)
        kinds = [type(layer) for layer in cache.layers]
        assert set(kinds[:-1]) == {DynamicLayer if exact else GrowingLayer}
        assert kinds[-1] is (DynamicSlidingWindowLayer if exact else GrowingWindow)
