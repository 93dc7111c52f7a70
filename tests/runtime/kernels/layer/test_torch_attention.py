"""Attention of many tokens by torch, beside compiled code."""

from __future__ import annotations

import math
from array import array

import pytest
import torch
from torch import nn

from moetier.runtime.kernels.jit.processor import this_processor
from moetier.runtime.kernels.layer.attend import attend
from moetier.runtime.kernels.layer.attention import causal_attention
from moetier.runtime.kernels.layer.attention_code import NO_WINDOW
from moetier.runtime.kernels.layer.masks import Band, band_mask
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS, KeyPages
from moetier.runtime.kernels.layer.torch_attention import SEGMENT, STRIP, TILE, attend_with_torch

HEADS, KEY_HEADS, WIDTH = 4, 2, 32


def numbers(batch: int, tokens: int, length: int, values: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values, whose heads lie side by side as in a model."""
    torch.manual_seed(tokens + length)
    query = torch.randn(batch, tokens, HEADS, WIDTH).transpose(1, 2)
    return query, *(torch.randn(batch, length, KEY_HEADS, width).transpose(1, 2) for width in (WIDTH, values))


SIZES = [  # tokens, and the length of what they follow and themselves
    *((1, 1), (40, 40), (STRIP, STRIP), (300, 300)),
    *((2 * STRIP + 1, 2 * STRIP + 90), (33, 700), (260, 1500), (70, SEGMENT + 200)),
]
WINDOWS = [NO_WINDOW, 50, STRIP, 700]
SINKS = [None, -40.0, 2.0, 40.0]


@pytest.mark.parametrize(
    ("tokens", "length", "window", "sinks"),
    [
        (*size, window, SINKS[(at + number) % len(SINKS)])  # every two of sizes, windows and sinks
        for number, size in enumerate(SIZES)
        for at, window in enumerate(WINDOWS)
    ],
)
def test_it_is_what_compiled_code_says(tokens: int, length: int, window: int, sinks: float | None) -> None:
    query, key, value = numbers(2, tokens, length, 16 if window == 50 else WIDTH)
    given = None if sinks is None else torch.tensor([sinks, 0.0, 1.0, math.pi])
    with torch.inference_mode():
        ours = attend(query, key, value, scaling=0.3, sinks=given, window=window)
        theirs = attend_with_torch(query, key, value, length=length, window=window, scaling=0.3, sinks=given)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [SEGMENT - STRIP - TILE, SEGMENT, SEGMENT + 1, 5000, 8700])
def test_a_large_window_is_divided(window: int) -> None:
    """The first segment of keys has those that the window hides from some of the tokens only."""
    query, key, value = numbers(1, 2 * STRIP + 3, 9000, WIDTH)
    with torch.inference_mode():
        ours = attend(query, key, value, window=window)
        theirs = attend_with_torch(query, key, value, length=9000, window=window)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not this_processor().has_amx, reason="compiled code is faster on processors without AMX")
@pytest.mark.parametrize("same_bits", [False, True])
def test_prompts_use_it_unless_a_token_must_have_the_same_bits(same_bits: bool) -> None:
    """Also from pages, and after other tokens."""
    module = nn.Module()
    module.same_bits = same_bits
    length = 5 * PAGE_TOKENS
    query, key, value = (tensor.bfloat16() for tensor in numbers(1, TILE, length, WIDTH))
    pages = KeyPages(array("q", [3, 1, 4, 0, 2]))
    places = pages.places(torch.arange(length))
    in_pages = [torch.empty_like(tensor).index_copy_(2, places, tensor) for tensor in (key, value)]
    mask = band_mask(TILE, length, Band(0, NO_WINDOW, pages), query.device)
    with torch.inference_mode():
        computed, _ = causal_attention(module, query, *in_pages, mask)
        by_torch = attend_with_torch(query, *in_pages, length=length, window=NO_WINDOW, places=places)
        expected = attend(query, key, value) if same_bits else by_torch
        few, _ = causal_attention(module, query[:, :, -1:], key, value, None)
        alone = attend(query[:, :, -1:], key, value)
    assert torch.equal(computed, expected)
    assert torch.equal(few, alone), "compiled code computes single tokens"
