"""Products with codes of 4 bits in the place of CUDA's, where there is no CUDA device.

``CpuInt4`` are torch's own operators of a CPU. ``cuda_operators`` gives the CPU those of CUDA, in the order of codes
that torch's source describes (ATen/native/cuda/int4mm.cu), so that what calls them is what runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from moetier.tiers.quant.packing import from_kernel_order


class CpuInt4:
    def arrange(self, nibbles: Tensor, columns: int) -> Tensor:
        codes = from_kernel_order(nibbles, columns).to(torch.int32)
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return packed.view(-1)

    def multiply(self, x: Tensor, arranged: Tensor, group: int, pairs: Tensor) -> Tensor:
        assert x.dtype == pairs.dtype == torch.bfloat16
        assert x.is_contiguous()
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, arranged.view(pairs.shape[1], -1), group, pairs)
        return y


@contextlib.contextmanager
def cuda_operators() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    library.impl("_convert_weight_to_int4pack", _convert, "CPU")
    library.impl("_weight_int4pack_mm", _multiply, "CPU")
    try:
        yield
    finally:
        library._destroy()


def _places(rows: int, columns: int, tiles: int) -> tuple[Tensor, Tensor]:
    """(row, column) of each nibble of int32 [rows / 8, columns / (16 * tiles), 32, tiles / 2, 8 nibbles]."""
    n, k, thread, word, nibble = torch.meshgrid(
        *(torch.arange(count) for count in (rows // 8, columns // (16 * tiles), 32, tiles // 2, 8)), indexing="ij"
    )
    pair = 8 * (tiles * k + 2 * word) + thread % 4 + 4 * (nibble % 4)
    return 8 * n + thread // 4, 2 * pair + nibble // 4


def _convert(paired: Tensor, tiles: int) -> Tensor:
    assert paired.dtype == torch.uint8
    assert paired.is_contiguous()
    rows, columns = paired.shape[0], 2 * paired.shape[1]
    assert rows % 8 == columns % (16 * tiles) == 0
    codes = torch.stack((paired >> 4, paired & 15), 2).view(rows, columns).to(torch.int64)
    words = (codes[_places(rows, columns, tiles)] << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _multiply(x: Tensor, packed: Tensor, group: int, pairs: Tensor) -> Tensor:
    assert x.dtype == pairs.dtype == torch.bfloat16
    assert packed.dtype == torch.int32
    assert x.is_contiguous()
    assert packed.is_contiguous()
    assert packed.data_ptr() % 16 == 0, "it is read in vectors"
    rows, columns, tiles = 8 * packed.shape[0], x.shape[1], 2 * packed.shape[3]
    assert packed.shape == (rows // 8, columns // (16 * tiles), 32, tiles // 2)
    assert pairs.shape == (columns // group, rows, 2)
    codes = torch.empty(rows, columns)
    codes[_places(rows, columns, tiles)] = ((packed.unsqueeze(-1) >> (4 * torch.arange(8))) & 15).float()
    scale, offset = pairs.float().transpose(0, 1).unsqueeze(3).unbind(2)
    weights = ((codes.view(rows, -1, group) - 8) * scale + offset).bfloat16().float().view(rows, columns)
    return (x.float() @ weights.T).bfloat16()
