"""Keys and values that lie in pages are put in order by the mask's Band."""

from __future__ import annotations

import time
from array import array

import pytest
import torch

from moetier.runtime.kernels.layer.attention_code import NO_WINDOW
from moetier.runtime.kernels.layer.masks import Band, band_mask, in_order
from moetier.runtime.kernels.layer.pages import ONE_PAGE, PAGE_TOKENS, KeyPages

CPU = torch.device("cpu")


@pytest.mark.parametrize("first", [0, 1, 70, 128])
@pytest.mark.parametrize("pages", [KeyPages(array("q", [5, 0, 3])), ONE_PAGE], ids=["pages", "one"])
def test_keys_and_values_are_put_in_order(pages: KeyPages, first: int) -> None:
    key, value = (torch.randn(1, 2, 6 * PAGE_TOKENS, width) for width in (4, 3))
    length = 3 * PAGE_TOKENS - 7 - first
    mask = band_mask(2, length, Band(first, NO_WINDOW, pages), CPU)
    places = [pages.place(position) for position in range(first, first + length)]
    for memory, ordered in zip((key, value), in_order(key, value, mask), strict=True):
        assert torch.equal(ordered, memory[:, :, places])


def test_memory_that_is_in_order_is_not_copied() -> None:
    key, value = (torch.randn(1, 2, 9, 4) for _ in range(2))
    for mask in (None, band_mask(2, 9, Band(0, NO_WINDOW), CPU)):
        ordered = in_order(key, value, mask)
        assert ordered[0] is key
        assert ordered[1] is value


def test_a_long_context_is_put_in_order_without_a_step_for_each_position() -> None:
    count = 10_000
    key = value = torch.zeros(1, 1, count * PAGE_TOKENS, 1)
    mask = band_mask(2, count * PAGE_TOKENS, Band(0, NO_WINDOW, KeyPages(array("q", reversed(range(count))))), CPU)
    in_order(key, value, mask)
    begin = time.thread_time()
    in_order(key, value, mask)
    assert time.thread_time() - begin < 0.2
