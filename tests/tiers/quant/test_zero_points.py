"""Records of what hqq, AWQ and GPTQ have quantised: the package's own weights, bit for bit, and the format's page."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_records import levels_at_random, with_zero_points

from moetier.tiers.fields import Fields
from moetier.tiers.layout import ZERO_POINT_GROUPS, Bits, RecordLayout
from moetier.tiers.quant.codec import decode, sections
from moetier.tiers.quant.zero_points import Levels

WIDTHS: list[Bits] = [8, 4, 3, 2]
TYPES = [torch.float16, torch.bfloat16, torch.float32]


def decoded(record: torch.Tensor, layout: RecordLayout, dtype: torch.dtype) -> torch.Tensor:
    p = layout.projections[0]
    return decode(record, layout, p.name, torch.empty(p.shape, dtype=dtype))


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("group", [16, 64, 128])
def test_what_hqq_has_quantised(bits: Bits, dtype: torch.dtype, group: int) -> None:
    from hqq.core.quantize import Quantizer

    w = torch.randn(70, 256, generator=torch.Generator().manual_seed(group)) * 0.02
    packed, meta = Quantizer.quantize(w, nbits=bits, axis=1, group_size=group, device="cpu")
    meta |= {"compute_dtype": dtype, "scale": meta["scale"].to(dtype), "zero": meta["zero"].to(dtype)}
    codes = Quantizer.unpack[meta["packing"]](packed)[: 70 * 256 // group].view(70, 256)
    layout, record = with_zero_points(Levels(codes, meta["scale"].view(70, -1), meta["zero"].view(70, -1)), bits)
    ideal = Quantizer.dequantize(packed, meta)
    assert ideal.dtype == dtype
    assert torch.equal(bits_of(decoded(record, layout, dtype)), bits_of(ideal))
    for wanted in TYPES:  # rounded once more
        assert torch.equal(decoded(record, layout, wanted), ideal.to(wanted))


def read_weight(record: bytes, layout: RecordLayout, row: int, column: int) -> float:
    """Decode one weight by docs/format.md; only the sections' offsets come from the code under test."""
    p = layout.projections[0]
    at = {s.name.removeprefix(f"{p.name}."): s.offset for s in layout.sections}
    nibbles = p.padded_rows * p.columns // 2  # bytes in kernel order
    byte = (row // 64 * p.columns + column) * 32 + row % 32
    up = 4 if row % 64 >= 32 else 0
    if p.bits == 8:
        high, low = ((record[at[plane] + byte] >> up) & 15 for plane in ("high", "low"))
        code = high * 16 + low
    elif p.bits == 4:
        code = (record[at["codes"] + byte] >> up) & 15
    else:
        half, place = divmod(byte, nibbles // 2)
        code = (record[at["codes"] + place] >> (up + 2 * half)) & 3
        if p.bits == 3:
            quarter, place = divmod(byte, nibbles // 4)
            code |= ((record[at["plane"] + place] >> (up + quarter)) & 1) << 2
    kind: torch.dtype = getattr(torch, p.pairs.removesuffix("_zeros"))
    place = at["pairs"] + 2 * kind.itemsize * (column // p.group * p.padded_rows + row)
    pair = np.frombuffer(record[place : place + 2 * kind.itemsize], np.uint8).copy()
    s, z = torch.from_numpy(pair).view(kind).float().numpy()
    difference = torch.tensor(np.float32(code) - z).to(kind).float().numpy()
    return float(torch.tensor(difference * s).to(kind))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(TYPES),
    group=st.sampled_from(ZERO_POINT_GROUPS),
    groups=st.integers(1, 3),
    rows=st.integers(1, 200),
    seed=st.integers(0, 2**31),
)
def test_decode_reads_what_the_format_says(
    bits: Bits, dtype: torch.dtype, group: int, groups: int, rows: int, seed: int
) -> None:
    levels = levels_at_random(bits, rows, group * groups, group, dtype)
    layout, record = with_zero_points(levels, bits)
    assert RecordLayout.from_json(Fields(layout.to_json(), "layout")) == layout
    read = decoded(record, layout, dtype)
    assert torch.equal(bits_of(read), bits_of(levels.weights()))
    stored, generator = record.numpy().tobytes(), np.random.default_rng(seed)
    for row, column in zip(generator.integers(0, rows, 40), generator.integers(0, group * groups, 40), strict=True):
        assert float(read[row, column]) == read_weight(stored, layout, int(row), int(column))
    covered = torch.zeros(len(record), dtype=torch.bool)
    for section in layout.sections:
        covered[section.offset : section.offset + section.nbytes] = True
    assert not record[~covered].any()
    assert not sections(record, layout)["up_proj.pairs"][:, rows:].any()
