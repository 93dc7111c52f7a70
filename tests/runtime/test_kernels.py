"""Products with records equal torch's own with the decoded weights, bit for bit, from any number of threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moetier.runtime.kernels import Kernels
from moetier.tiers.keys import BITS, Bits, RecordLayout
from moetier.tiers.quantize import decode, encode, layout_for

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def record_of(bits: Bits, dtype: str = "bfloat16", transposed: bool = False) -> tuple[RecordLayout, torch.Tensor]:
    shapes = {"up_proj": (160, 96), "down_proj": (96, 160)}
    layout = layout_for(
        {name: (shape[::-1] if transposed else shape, dtype) for name, shape in shapes.items()},
        bits=bits,
        transposed=transposed,
    )
    generator = torch.Generator().manual_seed(bits)
    tensors = {
        p.name: (torch.randn(p.shape, generator=generator) * 0.02).to(getattr(torch, dtype)) for p in layout.projections
    }
    out = np.empty(layout.record_bytes, np.uint8)
    encode(tensors, layout, out)
    return layout, torch.from_numpy(out)


def expected(x: torch.Tensor, record: torch.Tensor, layout: RecordLayout, name: str) -> torch.Tensor:
    p = next(p for p in layout.projections if p.name == name)
    weights = decode(record, layout, name, torch.empty(p.shape, dtype=x.dtype))
    return x @ weights if p.transposed else F.linear(x, weights)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 7])
def test_bit_for_bit(bits: Bits, stored: str, transposed: bool, dtype: torch.dtype, rows: int) -> None:
    layout, record = record_of(bits, stored, transposed)
    kernels = Kernels()
    for p in layout.projections:
        x = torch.randn(rows, p.columns, generator=torch.Generator().manual_seed(9)).to(dtype)
        y = kernels.project(x, record, layout, p.name)
        assert y.shape == (rows, p.rows)
        assert y.dtype == dtype
        assert torch.equal(y, expected(x, record, layout, p.name))


def test_sixteen_bits_of_the_same_type_are_multiplied_where_they_lie() -> None:
    layout, record = record_of(16)
    kernels = Kernels()
    kernels.project(torch.ones(1, 96, dtype=torch.bfloat16), record, layout, "up_proj")
    assert not hasattr(kernels._local, "memory")


def test_scratch_is_kept_and_grows_to_the_largest_only() -> None:
    layout, record = record_of(4)
    kernels = Kernels()
    places = set()
    for _ in range(3):
        for name, columns in (("up_proj", 96), ("down_proj", 160)):
            for dtype in TYPES:
                kernels.project(torch.ones(2, columns, dtype=dtype), record, layout, name)
                if dtype == torch.float32:
                    places.add((kernels._local.memory.data_ptr(), len(kernels._local.memory)))
    assert len(places) == 1
    assert places.pop()[1] == 160 * 96 * 4


def test_an_earlier_product_is_not_changed_by_the_next() -> None:
    layout, record = record_of(4)
    kernels = Kernels()
    x = torch.randn(3, 96)
    first = kernels.project(x, record, layout, "up_proj")
    kept = first.clone()
    kernels.project(torch.randn(3, 160), record, layout, "down_proj")
    assert torch.equal(first, kept)


def test_in_and_out_of_inference_mode() -> None:
    layout, record = record_of(3)
    kernels = Kernels()
    x = torch.randn(2, 96)
    with torch.inference_mode():
        inside = kernels.project(x, record, layout, "up_proj").clone()
    with torch.no_grad():
        assert torch.equal(kernels.project(x, record, layout, "up_proj"), inside)
    assert torch.equal(kernels.project(x, record, layout, "up_proj"), inside)


def test_several_threads_share_one_kernels() -> None:
    kernels = Kernels()
    records = [record_of(bits) for bits in (8, 4, 3, 2)]
    inputs = [torch.randn(5, 96, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    results = [expected(x, record, layout, "up_proj") for x, (layout, record) in zip(inputs, records, strict=True)]
    together = threading.Barrier(4, timeout=60)

    def work(i: int) -> bool:
        layout, record = records[i]
        together.wait()
        return all(torch.equal(kernels.project(inputs[i], record, layout, "up_proj"), results[i]) for _ in range(40))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
