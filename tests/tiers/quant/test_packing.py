"""Codes lie where the format says and where torch's AVX-512 int4 kernel expects them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moetier.tiers.quant import packing as planes
from moetier.tiers.quant.packing import fold, from_kernel_order, unfold

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def codes_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)


def to_kernel_order(codes: torch.Tensor) -> torch.Tensor:
    """Pack uint8 [N, K] into uint8 [N * K / 2]."""
    rows, columns = codes.shape
    out = torch.empty(rows * columns // 2, dtype=torch.uint8)
    planes.to_kernel_order(codes.view(-1, 64, columns).transpose(1, 2), out)
    return out


@pytest.mark.skipif(not AVX512, reason="torch packs for the CPU that it runs on")
@pytest.mark.parametrize(("rows", "columns"), [(64, 32), (192, 96), (320, 64)])
def test_kernel_order_is_torchs(rows: int, columns: int) -> None:
    codes = codes_of(rows, columns)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    assert torch.equal(to_kernel_order(codes), packed.view(-1))


def test_kernel_order_byte_by_byte() -> None:
    rows, columns = 128, 5
    codes, stored = codes_of(rows, columns), to_kernel_order(codes_of(rows, columns)).tolist()
    for row in range(rows):
        for column in range(columns):
            block, place = divmod(row, 64)
            byte = stored[(block * columns + column) * 32 + place % 32]
            assert (byte & 15 if place < 32 else byte >> 4) == codes[row, column]


@given(st.integers(1, 4), st.integers(1, 70), st.integers(0, 2**31))
def test_kernel_order_is_undone(blocks: int, columns: int, seed: int) -> None:
    codes = codes_of(64 * blocks, columns, seed)
    assert torch.equal(from_kernel_order(to_kernel_order(codes), columns), codes)


def test_folding_in_half_is_the_formats_formula() -> None:
    nibbles = to_kernel_order(codes_of(64, 6))
    folded = torch.empty(len(nibbles) // 2, dtype=torch.uint8)
    fold(nibbles, 2, folded)
    first, second = nibbles.chunk(2)
    assert torch.equal(folded, (first & 0x33) | ((second & 0x33) << 2))


@pytest.mark.parametrize(("parts", "mask"), [(1, 0xFF), (2, 0x33), (4, 0x11)])
@given(data=st.data())
def test_any_range_unfolds(parts: int, mask: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 50)) * parts
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    nibbles = torch.randint(0, 256, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(length))
    folded = torch.full((length // parts,), 0xFF, dtype=torch.uint8)  # what was there before does not matter
    fold(nibbles, parts, folded)
    assert torch.equal(unfold(folded, parts, start, stop), nibbles[start:stop] & mask)
