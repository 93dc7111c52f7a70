"""Pages: parts of a memory of keys and values, in which the consecutive tokens of a sequence lie."""

from __future__ import annotations

from array import array
from typing import NamedTuple

import torch
from torch import Tensor

PAGE_TOKENS = 64  # tokens of a page; a power of two


class KeyPages(NamedTuple):
    """Pages that hold a sequence's keys and values, in the order of its tokens."""

    numbers: array[int]  # i64
    bits: int = PAGE_TOKENS.bit_length() - 1  # page n has the places from n << bits to before (n + 1) << bits

    def address(self, position: int) -> int:
        """Return the address of the number of the page that begins at a position of the sequence."""
        return self.numbers.buffer_info()[0] + self.numbers.itemsize * (position >> self.bits)

    def place(self, position: int) -> int:
        """Return the place of a position of the sequence, in tokens from the beginning of the memory of all pages."""
        return (self.numbers[position >> self.bits] << self.bits) + (position & ((1 << self.bits) - 1))

    def places(self, positions: Tensor) -> Tensor:
        """Return ``place`` of each of several positions of the sequence, both int64 [n]."""
        numbers = torch.frombuffer(self.numbers, dtype=torch.int64)
        return (numbers[positions >> self.bits] << self.bits) + (positions & ((1 << self.bits) - 1))


ONE_PAGE = KeyPages(array("q", [0]), 62)  # for tokens that lie next to one another from place 0 on
