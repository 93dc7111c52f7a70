"""Products of many rows with AVX-512 VNNI have the bits of products with AVX2, for every number of rows."""

from __future__ import annotations

import functools

import pytest
import torch
from quantised_records import quantised

from moetier.runtime.kernels.jit.processor import Dot, Processor, this_processor
from moetier.runtime.kernels.products.gemm_rows import HEIGHT, RowsTile
from moetier.runtime.kernels.products.packed import PackedKernels
from moetier.tiers.layout import Bits

VNNI = "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni"
LEAST, MOST = RowsTile.least, RowsTile.most
ROWS = (LEAST - 1, LEAST, LEAST + HEIGHT - 1, 3 * LEAST, MOST, MOST + 1, MOST + LEAST + 2, 2 * MOST)

pytestmark = pytest.mark.skipif(this_processor().dot is not Dot.AVX512_VNNI, reason="no AVX-512 VNNI here")


@functools.cache
def kernels_for(features: str) -> PackedKernels:
    return PackedKernels(Processor(features))


@pytest.mark.parametrize(
    ("bits", "group", "pairs"),
    [(8, 64, "bfloat16"), (4, 64, "bfloat16"), (4, 16, "uint8"), (3, 32, "bfloat16"), (2, 128, "float16_zeros")],
)
def test_the_bits_are_the_same(bits: Bits, group: int, pairs: str) -> None:
    """Two row tiles, the second not full, and spans of columns, the last not full."""
    layout, record = quantised(bits, 70, 640, group, pairs)
    full = record.clone()  # all codes are as large as they can be
    for section in layout.sections:
        if not section.name.endswith(("pairs", "pair_scales")):
            full[section.offset : section.offset + section.nbytes] = 255
    x = torch.randn(max(ROWS), 640, generator=torch.Generator().manual_seed(1))
    x[0] = 1.0  # all are rounded to 127
    x[1] = -1.0
    for edge in (record, full):
        expected = kernels_for("+avx2,+fma").project(x, edge, layout, "up_proj")
        for rows in ROWS:
            y = kernels_for(VNNI).project(x[:rows], edge, layout, "up_proj")
            assert torch.equal(y.view(torch.int32), expected[:rows].view(torch.int32)), rows


def test_not_numbers_stay_in_their_rows() -> None:
    layout, record = quantised(4, 70, 640, 64, "bfloat16")
    x = torch.randn(MOST, 640, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = kernels_for(VNNI).project(x, record, layout, "up_proj")
    x[MOST // 2, 300] = float("nan")
    y = kernels_for(VNNI).project(x, record, layout, "up_proj")
    assert y[MOST // 2].isnan().all()
    others = torch.arange(MOST) != MOST // 2
    assert torch.equal(y[others], expected[others])
