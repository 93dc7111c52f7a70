"""Records compared with a second implementation of the format and with torch's int4 kernel; bad weights."""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetier.tiers.errors import CheckpointError, ConfigError
from moetier.tiers.fields import Fields
from moetier.tiers.layout import GROUPS, Bits, Projection, RecordLayout
from moetier.tiers.quant import codec as quantize
from moetier.tiers.quant import packing as bands
from moetier.tiers.quant.codec import WeightDeviation, decode, encode, expand, layout_for, sections
from moetier.tiers.quant.packing import load_pairs

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
QUANTISED: tuple[Bits, ...] = (8, 4, 3, 2)


def layout_of(
    rows: int, columns: int, dtype: str = "bfloat16", transposed: bool = False, **settings: Any
) -> RecordLayout:
    """Make a layout with one projection w and its bias."""
    shape = (columns, rows) if transposed else (rows, columns)
    return layout_for({"w": (shape, dtype), "w_bias": ((rows,), dtype)}, transposed=transposed, **settings)


def weights_for(layout: RecordLayout, std: float = 0.02, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p = layout.projections[0]
    dtype = getattr(torch, p.dtype)
    return {
        "w": (torch.randn(p.shape, generator=generator) * std).to(dtype),
        "w_bias": torch.randn(p.rows, generator=generator).to(dtype),
    }


def encoded(tensors: dict[str, torch.Tensor], layout: RecordLayout, *, fast: bool = False) -> torch.Tensor:
    out = np.full(layout.record_bytes, 0xA5, np.uint8)  # what was there before must not show
    encode(tensors, layout, memoryview(out), fast=fast)
    return torch.from_numpy(out)


def decoded(record: torch.Tensor, layout: RecordLayout, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return decode(record, layout, "w", torch.empty(layout.projections[0].shape, dtype=dtype))


def bf16(two: bytes) -> float:
    return float(struct.unpack("<f", b"\0\0" + two)[0])


def read_weight(record: bytes, layout: RecordLayout, row: int, column: int) -> float:
    """Decode one weight by docs/format.md; only the sections' offsets come from the code under test."""
    p = layout.projections[0]
    at = {s.name: s.offset for s in layout.sections}
    nibbles = p.padded_rows * p.columns // 2  # bytes in kernel order
    byte = (row // 64 * p.columns + column) * 32 + row % 32
    up = 4 if row % 64 >= 32 else 0
    if p.bits == 8:
        high, low = ((record[at[f"w.{plane}"] + byte] >> up) & 15 for plane in ("high", "low"))
        code = high * 16 + low - 128
    elif p.bits == 4:
        code = ((record[at["w.codes"] + byte] >> up) & 15) - 8
    else:
        half, place = divmod(byte, nibbles // 2)
        code = (record[at["w.codes"] + place] >> (up + 2 * half)) & 3
        if p.bits == 3:
            quarter, place = divmod(byte, nibbles // 4)
            code |= ((record[at["w.plane"] + place] >> (up + quarter)) & 1) << 2
        code -= 2 ** (p.bits - 1)
    group = column // p.group * p.padded_rows + row
    pair = []
    for which in (0, 1):
        if p.pairs == "bfloat16":
            place = at["w.pairs"] + 4 * group + 2 * which
            pair.append(bf16(record[place : place + 2]))
        else:
            place = at["w.pair_scales"] + group // 128 * 8 + 4 * which
            scale, minimum = bf16(record[place : place + 2]), bf16(record[place + 2 : place + 4])
            value = np.float32(record[at["w.pairs"] + 2 * group + which]) * np.float32(scale) + np.float32(minimum)
            pair.append(float(torch.tensor(value).bfloat16()))
    return float(np.float32(code) * np.float32(pair[0]) + np.float32(pair[1]))


SHAPES = {
    "bits": st.sampled_from(QUANTISED),
    "group": st.sampled_from(GROUPS["uint8"]),
    "pairs": st.sampled_from(["bfloat16", "uint8"]),
    "rows": st.integers(1, 200),
    "columns": st.sampled_from([32, 48, 64, 96, 128, 160, 192, 256]),
    "transposed": st.booleans(),
    "dtype": st.sampled_from(["bfloat16", "float16", "float32"]),
    "fast": st.booleans(),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=60, deadline=None)
@given(**SHAPES)
def test_decode_reads_what_the_format_says(
    bits: Bits, group: int, pairs: str, rows: int, columns: int, transposed: bool, dtype: str, fast: bool, seed: int
) -> None:
    group = max(group, min(GROUPS[pairs]))
    layout = layout_of(rows, columns, dtype, transposed, bits=bits, group=group, pairs=pairs)
    p, tensors = layout.projections[0], weights_for(layout, seed=seed)
    record = encoded(tensors, layout, fast=fast)
    read = decoded(record, layout)
    assert torch.equal(
        sections(record, layout)["w_bias"], tensors["w_bias"].to(sections(record, layout)["w_bias"].dtype)
    )
    if p.bits == 16:
        assert columns % 32
        expected = tensors["w"].bfloat16() if dtype == "float32" else tensors["w"]
        assert torch.equal(read, expected.float())
        return
    assert columns % p.group == 0
    by_rows, stored = (read.T if transposed else read), record.numpy().tobytes()
    original = tensors["w"].float()
    low, high = (original.T if transposed else original).reshape(-1, p.group).aminmax(dim=1)
    largest_step = float((high - low).max()) / (2**bits - 1)
    assert float((read - original).abs().mean()) < 0.6 * largest_step  # a quarter, were every group that wide
    generator = np.random.default_rng(seed)
    for row, column in zip(generator.integers(0, rows, 40), generator.integers(0, columns, 40), strict=True):
        assert by_rows[row, column] == read_weight(stored, layout, int(row), int(column))


@settings(max_examples=30, deadline=None)
@given(**SHAPES)
def test_bytes_that_are_no_weights_are_zero(
    bits: Bits, group: int, pairs: str, rows: int, columns: int, transposed: bool, dtype: str, fast: bool, seed: int
) -> None:
    group = max(group, min(GROUPS[pairs]))
    layout = layout_of(rows, columns, dtype, transposed, bits=bits, group=group, pairs=pairs)
    record = encoded(weights_for(layout, seed=seed), layout, fast=fast)
    covered = torch.zeros(len(record), dtype=torch.bool)
    for section in layout.sections:
        covered[section.offset : section.offset + section.nbytes] = True
    assert not record[~covered].any()
    p = layout.projections[0]
    if p.bits != 16:
        views = sections(record, layout)
        assert not views["w.pairs"][:, rows:].any()
        if p.bits in (8, 4):
            for name in ("w.high", "w.low") if p.bits == 8 else ("w.codes",):
                nibbles = views[name].view(-1, p.columns, 32)[-1]  # the last 64 rows
                rest = rows % 64 or 64
                assert not (nibbles[:, min(rest, 32) :] & 15).any()
                assert not (nibbles[:, max(rest - 32, 0) :] >> 4).any()


@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("pairs", ["bfloat16", "uint8"])
def test_bytes_and_weights_do_not_depend_on_threads_or_tiles(
    bits: Bits, pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(300, 128, bits=bits, pairs=pairs)
    tensors = weights_for(layout)
    record, read = encoded(tensors, layout), decoded(encoded(tensors, layout), layout, torch.bfloat16)
    torch.set_num_threads(2)
    assert torch.equal(encoded(tensors, layout), record)
    monkeypatch.setattr(bands, "BAND_WEIGHTS", 2**14)  # two blocks of rows
    assert torch.equal(encoded(tensors, layout), record)
    monkeypatch.setattr(quantize, "TILE_WEIGHTS", 1)
    assert torch.equal(decoded(record, layout, torch.bfloat16), read)


def digest() -> str:
    """Hash records of every width, with small and with large weights."""
    state = hashlib.sha256()
    for bits, pairs, std in itertools.product(QUANTISED, ("bfloat16", "uint8"), (0.02, 3.0)):
        layout = layout_of(64, 256, "float32", bits=bits, pairs=pairs)
        weights = np.random.default_rng(bits).normal(scale=std, size=(64, 256)).astype(np.float32)
        state.update(encoded({"w": torch.from_numpy(weights), "w_bias": torch.zeros(64)}, layout).numpy())
    return state.hexdigest()


@pytest.mark.parametrize("capability", ["default", pytest.param("avx2", marks=pytest.mark.slow)])
def test_bytes_do_not_depend_on_the_processor(capability: str) -> None:
    """A variable tells torch to use other instructions; it is read when torch is imported."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_codec as t; print(t.digest())"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == digest()


@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("pairs", ["bfloat16", "uint8"])
def test_a_transposed_module_has_the_same_codes(bits: Bits, pairs: str) -> None:
    layout, turned = (
        layout_of(96, 128, bits=bits, pairs=pairs),
        layout_of(96, 128, transposed=True, bits=bits, pairs=pairs),
    )
    tensors = weights_for(layout)
    record = encoded(tensors, layout)
    assert torch.equal(record, encoded(tensors | {"w": tensors["w"].T.contiguous()}, turned))
    assert torch.equal(decoded(record, turned), decoded(record, layout).T)


@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_rounds_once(bits: Bits, dtype: torch.dtype) -> None:
    layout = layout_of(64, 128, bits=bits)
    record = encoded(weights_for(layout), layout)
    assert torch.equal(decoded(record, layout, dtype), decoded(record, layout).to(dtype))


@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("pairs", ["bfloat16", "uint8"])
def test_errors_are_those_of_what_is_read_back_and_hqq_beats_plain_rounding(bits: Bits, pairs: str) -> None:
    layout = layout_of(192, 256, "float32", bits=bits, pairs=pairs)
    tensors = weights_for(layout)
    errors, absolute = {}, {}
    for fast in (False, True):
        out = np.empty(layout.record_bytes, np.uint8)
        error = encode(tensors, layout, out, fast=fast)["w"]
        difference = decoded(torch.from_numpy(out), layout) - tensors["w"]
        assert error.squared == pytest.approx(float(difference.square().sum()), rel=1e-4)
        absolute[fast] = float(difference.abs().sum())
        assert error.relative == pytest.approx(float(difference.norm() / tensors["w"].norm()), rel=1e-4)
        errors[fast] = error
    assert absolute[False] < absolute[True]  # which HQQ watches
    assert errors[False].relative < errors[True].relative


def test_errors_add_up_and_exact_weights_have_none() -> None:
    assert (WeightDeviation(1, 4) + WeightDeviation(0, 5)).relative == pytest.approx((1 / 9) ** 0.5)
    assert WeightDeviation().relative == 0
    layout = layout_of(70, 40, bits=16)
    errors = encode(weights_for(layout), layout, np.empty(layout.record_bytes, np.uint8))
    assert [e.squared for e in errors.values()] == [0, 0]
    assert all(e.squared_norm > 0 for e in errors.values())


@pytest.mark.parametrize("bits", [16, *QUANTISED])
@pytest.mark.parametrize("pairs", ["bfloat16", "uint8"])
def test_an_expert_of_zeros_reads_back_as_zeros(bits: Bits, pairs: str) -> None:
    layout = layout_of(70, 96, bits=bits, pairs=pairs)
    tensors = {name: torch.zeros_like(t) for name, t in weights_for(layout).items()}
    read = decoded(encoded(tensors, layout), layout)
    assert torch.equal(read, torch.zeros_like(read))


@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("pairs", ["bfloat16", "uint8"])
@pytest.mark.parametrize("value", [1.0, -0.03125, 1e-38, 1e-40, 3e38])
def test_constant_and_nearly_constant_weights(bits: Bits, pairs: str, value: float) -> None:
    layout = layout_of(70, 96, "float32", bits=bits, pairs=pairs)
    tensors = weights_for(layout)
    tensors["w"].fill_(value)
    constant = torch.tensor(value).bfloat16().float()
    assert (decoded(encoded(tensors, layout), layout) == constant).all()
    tensors["w"][::2, ::3] *= 1 + 2**-7
    assert torch.allclose(decoded(encoded(tensors, layout), layout), tensors["w"], rtol=2**-6, atol=1e-40)


@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("pairs", ["bfloat16", "uint8"])
def test_a_group_of_zeros_among_others_stays_near_zero(bits: Bits, pairs: str) -> None:
    layout = layout_of(128, 128, bits=bits, pairs=pairs)
    tensors = weights_for(layout)
    tensors["w"][5, :64] = 0
    read = decoded(encoded(tensors, layout), layout)[5, :64]
    assert read.unique().numel() == 1 or pairs == "uint8"
    assert float(read.abs().max()) <= (0 if pairs == "bfloat16" else 0.02)


@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("pairs", ["bfloat16", "uint8"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fast", [False, True])
def test_weights_that_are_no_numbers_are_refused(bits: Bits, pairs: str, wrong: float, fast: bool) -> None:
    layout = layout_of(70, 96, bits=bits, pairs=pairs)
    tensors = weights_for(layout)
    tensors["w"][69, 95] = wrong
    with pytest.raises(CheckpointError, match="w has weights that are not finite numbers"):
        encoded(tensors, layout, fast=fast)


def test_a_range_beyond_fp32_is_refused() -> None:
    layout = layout_of(64, 64, "float32", bits=4)
    tensors = weights_for(layout)
    tensors["w"][0, 0], tensors["w"][0, 1] = 3e38, -3e38
    with pytest.raises(CheckpointError, match="not finite"):
        encoded(tensors, layout)


# torch's int4 kernel on the stored bytes: what later kernels build on


def int4(x: torch.Tensor, codes: torch.Tensor, pairs: torch.Tensor, p: Projection) -> torch.Tensor:
    codes = codes.view(p.padded_rows, p.columns // 2)
    product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, p.group, pairs.to(x.dtype))
    return product[:, : p.rows]


@pytest.mark.skipif(not AVX512, reason="records are in the order of the AVX-512 kernel")
@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("pairs", ["bfloat16", "uint8"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("rows", [192, 130])
def test_torchs_int4_kernel_takes_records_as_stored(
    bits: Bits, pairs: str, dtype: torch.dtype, tolerance: float, rows: int
) -> None:
    layout = layout_of(rows, 256, bits=bits, pairs=pairs)
    p, record = layout.projections[0], encoded(weights_for(layout), layout)
    views = sections(record, layout)
    x = torch.randn(3, p.columns, generator=torch.Generator().manual_seed(3)).to(dtype)
    stored = load_pairs(p, views, 0, p.padded_rows)
    if bits == 8:
        s, b = stored.unbind(2)
        y = int4(x, views["w.high"], torch.stack((16 * s, b), 2), p) + int4(
            x, views["w.low"], torch.stack((s, 8 * s), 2), p
        )
    else:
        y = int4(x, expand(views, p, 0, p.padded_rows), stored, p)
    expected = x.float() @ decoded(record, layout).T
    assert float((y.float() - expected).norm() / expected.norm()) < tolerance


def test_four_bit_records_expand_without_a_copy() -> None:
    layout = layout_of(128, 64, bits=4)
    record = encoded(weights_for(layout), layout)
    views = sections(record, layout)
    expanded = expand(views, layout.projections[0], 64, 128)
    assert expanded.untyped_storage().data_ptr() == record.untyped_storage().data_ptr()
    assert torch.equal(expanded, views["w.codes"].view(-1)[64 * 32 :])


# layouts


@pytest.mark.parametrize(
    ("columns", "group", "pairs", "expected"),
    [
        (96, 64, "bfloat16", (4, 32)),
        (32, 64, "bfloat16", (4, 32)),
        (48, 64, "bfloat16", (16, 0)),
        (48, 64, "uint8", (4, 16)),
        (40, 64, "uint8", (16, 0)),
        (4096, None, None, (4, 64)),
        (2880, 128, None, (4, 64)),
        (1536, 256, None, (4, 256)),
        (1152, 256, None, (4, 128)),
        (256, 32, None, (4, 32)),
        (256, 16, "uint8", (4, 16)),
    ],
)
def test_the_group_is_the_largest_that_divides(
    columns: int, group: int | None, pairs: str | None, expected: tuple[int, int]
) -> None:
    for transposed in (False, True):
        p = layout_of(8, columns, transposed=transposed, bits=4, group=group, pairs=pairs).projections[0]
        assert (p.bits, p.group) == expected
        assert (p.rows, p.columns, p.transposed) == (8, columns, transposed)


def test_layouts_keep_order_types_and_survive_json() -> None:
    layout = layout_for(
        {
            "gate_up_proj": ((256, 64), "float32"),
            "gate_up_proj_bias": ((256,), "float32"),
            "down_proj": ((64, 40), "float32"),
            "down_proj_bias": ((64,), "float16"),
        },
        bits=3,
    )
    assert [(p.name, p.bits, p.dtype) for p in layout.projections] == [
        ("gate_up_proj", 3, "float32"),
        ("down_proj", 16, "bfloat16"),
    ]
    assert [(b.name, b.size, b.dtype) for b in layout.biases] == [
        ("gate_up_proj_bias", 256, "bfloat16"),
        ("down_proj_bias", 64, "float16"),
    ]
    assert RecordLayout.from_json(Fields(layout.to_json())) == layout


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 5},
        {"bits": 4, "group": 48},
        {"bits": 4, "group": 16},
        {"bits": 4, "group": -64},
        {"bits": 4, "group": 0},
        {"bits": 4, "pairs": ""},
        {"bits": 4, "group": 512},
        {"bits": 4, "pairs": "float32"},
        {"bits": 2, "pairs": "uint8", "group": 8},
    ],
)
def test_settings_that_do_not_exist(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        layout_of(64, 64, **settings)


@pytest.mark.parametrize(("shape", "dtype"), [((8, 8), "float64"), ((8, 8), "float8_e4m3fn"), ((2, 8, 8), "bfloat16")])
def test_parameters_that_cannot_be_stored(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(CheckpointError, match="w "):
        layout_for({"w": (shape, dtype)}, bits=4)


@pytest.mark.parametrize(("rows", "columns"), [(65, 128), (4096, 1024), (100, 16384)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_bands_take_is_known_before(rows: int, columns: int, dtype: torch.dtype) -> None:
    p = Projection("up_proj", rows, columns, 4, str(dtype).removeprefix("torch."), False, 64, "bfloat16")
    cut = bands.Bands(torch.empty(rows, columns, dtype=dtype), p)
    codes = 3 * cut.transpose(next(iter(cut))).numel()  # as int16, and as bytes
    assert bands.band_bytes(p, dtype.itemsize) == cut._stored.nbytes + cut._buffers.nbytes + codes
