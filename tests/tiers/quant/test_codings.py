"""Matrices in the codings of checkpoints are decoded as each format's own decoder does, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from coded_records import coded, projection
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor as MXFP4
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor as NVFP4
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as INT4
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moetier.tiers.layout import SCALE_TYPES, Projection, RecordLayout
from moetier.tiers.quant import codec
from moetier.tiers.quant.codec import decode, sections

TYPES = [torch.bfloat16, torch.float16, torch.float32]
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decoded(record: Tensor, layout: RecordLayout, dtype: torch.dtype) -> Tensor:
    p = layout.projections[0]
    return decode(record, layout, p.name, torch.empty(p.shape, dtype=dtype))


def assert_same(found: Tensor, wanted: Tensor) -> None:
    """The same bits, those of negative zeros too."""
    assert found.dtype == wanted.dtype
    assert torch.equal(found.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))


# -- transformers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mxfp4_of_gpt_oss(dtype: torch.dtype) -> None:
    p = projection("e2m1", 90, 96, group=32, scales="e8m0", transposed=True)
    layout, record = coded(p)
    views = sections(record, layout)
    views["up_proj.codes"][0, :16] = torch.arange(16) * 17  # every number in both halves
    views["up_proj.scales"][:3, 0] = torch.tensor([1, 127, 250])
    blocks, scales = views["up_proj.codes"].view(1, 90, 3, 16), views["up_proj.scales"][None]
    assert_same(decoded(record, layout, dtype), convert_moe_packed_tensors(blocks, scales, dtype=dtype)[0])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("coding", "shape", "fields"),
    [
        ("e4m3", (256, 384), {"group": 128, "block_rows": 128, "scales": "float32"}),
        ("e4m3", (256, 384), {"group": 128, "block_rows": 128, "scales": "bfloat16"}),
        ("e4m3", (256, 128), {"group": 128, "block_rows": 128, "scales": "e8m0"}),
        ("e4m3", (40, 72), {"group": 72, "scales": "float32"}),
        ("e4m3", (40, 96), {"group": 32, "scales": "e8m0"}),
        ("e2m1", (40, 96), {"group": 32, "scales": "e8m0"}),
    ],
    ids=str,
)
def test_fp8_and_the_fp4_of_deepseek(
    coding: str, shape: tuple[int, int], fields: dict[str, Any], dtype: torch.dtype
) -> None:
    layout, record = coded(projection(coding, *shape, **fields))
    codes, scales = sections(record, layout).values()
    weight = codes.view(torch.float8_e4m3fn if coding == "e4m3" else torch.int8)
    wanted = Fp8Dequantize(None)._dequantize_one(weight, scales, dtype)
    assert_same(decoded(record, layout, dtype), wanted)


# -- compressed-tensors ------------------------------------------------------------------------------------------------


def written(form: str, weight: Tensor, group: int, scale_type: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Return what compressed-tensors stores for a weight, and the weight that it decodes from that."""
    strategy, number = {"nvfp4": ("tensor_group", "float"), "mxfp4": ("group", "float"), "int4": ("group", "int")}[form]
    args = QuantizationArgs(
        num_bits=4, type=number, symmetric=True, strategy=strategy, group_size=group,
        scale_dtype={"nvfp4": torch.float8_e4m3fn, "mxfp4": torch.uint8}.get(form),
    )  # fmt: skip
    compressor = {"nvfp4": NVFP4, "mxfp4": MXFP4, "int4": INT4}[form]
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    largest = weight.view(len(weight), -1, group).abs().amax(2)
    state = {"weight": weight, "weight_scale": (largest / (7 if form == "int4" else 6)).to(scale_type)}
    if form == "nvfp4":
        state["weight_global_scale"] = 6 * 448 / weight.abs().max().float().reshape(1)
        state["weight_scale"] = (state["weight_global_scale"] * largest / 6).to(torch.float8_e4m3fn).float()
    if form == "mxfp4":
        state["weight_scale"] = torch.exp2(torch.log2(state["weight_scale"].float()).ceil())
    stored = compressor.compress(state, scheme)
    return stored, compressor.decompress(stored, scheme)["weight"]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("form", "group", "scale_type"),
    [
        ("int4", 32, torch.bfloat16),
        ("int4", 128, torch.float16),
        ("mxfp4", 32, torch.float32),
        ("nvfp4", 16, torch.float32),
    ],
    ids=str,
)
def test_what_compressed_tensors_has_written(form: str, group: int, scale_type: torch.dtype, parts: int) -> None:
    """Its own compressors write matrices, which are the parts of one."""
    rows, columns, random = 40, 384, torch.Generator().manual_seed(7)
    dtype = scale_type if form == "int4" else torch.bfloat16  # of the weights
    made = [
        written(form, (torch.randn(rows, columns, generator=random) * (part + 1)).to(dtype), group, scale_type)
        for part in range(parts)
    ]
    fields = {
        "int4": {"scales": str(scale_type).removeprefix("torch.")},
        "mxfp4": {"scales": "e8m0"},
        "nvfp4": {"scales": "e4m3", "globals": "divide"},
    }[form]
    coding = "int4" if form == "int4" else "e2m1"
    layout, record = coded(projection(coding, parts * rows, columns, group=group, parts=parts, **fields))
    views = sections(record, layout)
    for part, (stored, _) in enumerate(made):
        own = slice(part * rows, (part + 1) * rows)
        views["up_proj.codes"][own] = stored["weight_packed"].contiguous().view(torch.uint8)
        scales = views["up_proj.scales"]
        scales[own] = stored["weight_scale"].contiguous().view(scales.dtype)
        if form == "nvfp4":
            views["up_proj.globals"][part] = stored["weight_global_scale"]
    assert_same(decoded(record, layout, dtype), torch.cat([read for _, read in made]))


# -- the formulas ------------------------------------------------------------------------------------------------------


def scale_at(views: dict[str, Tensor], p: Projection, row: int, column: int) -> np.float32:
    """The scale of a weight: scales of one part lie below those of the part before it."""
    part, own = divmod(row, p.rows // p.parts)
    of_part = -(-(p.rows // p.parts) // p.block_rows)
    stored = views[f"{p.name}.scales"][part * of_part + own // p.block_rows, column // p.group]
    match p.scales:
        case "e8m0":
            scale = np.float32(2.0 ** (int(stored) - 127))
        case "e4m3":
            exponent, rest = divmod(int(stored), 8)
            scale = np.float32((8 + rest) / 8 * 2.0 ** (exponent - 7) if exponent else rest / 8 * 2.0**-6)
        case _:
            scale = np.float32(float(stored))
    if p.globals:
        number = np.float32(float(views[f"{p.name}.globals"][part]))
        scale = scale * number if p.globals == "multiply" else scale / number
    return scale


def number_at(views: dict[str, Tensor], p: Projection, row: int, column: int) -> np.float32:
    codes = views[f"{p.name}.codes"][row]
    if p.coding == "e4m3":
        code = int(codes[column])
        exponent, rest = divmod(code & 127, 8)
        size = (8 + rest) / 8 * 2.0 ** (exponent - 7) if exponent else rest / 8 * 2.0**-6
        return np.float32(-size if code >> 7 else size)
    code = int(codes[column // 2]) >> (4 * (column % 2)) & 15
    if p.coding == "int4":
        return np.float32(code - 8)
    return np.float32(-FP4[code & 7] if code >> 3 else FP4[code])


FORMS: list[tuple[str, tuple[int, int], dict[str, Any]]] = [
    *(("e2m1", (24, 256), {"group": group, "scales": "e8m0"}) for group in (16, 32, 64, 128)),
    *(("int4", (24, 256), {"group": 32, "scales": scales}) for scales in SCALE_TYPES),
    ("int4", (33, 96), {"group": 32, "scales": "bfloat16", "parts": 3, "transposed": True}),
    ("e2m1", (34, 48), {"group": 16, "scales": "e4m3", "parts": 2, "globals": "multiply"}),
    ("e2m1", (34, 48), {"group": 16, "scales": "e4m3", "parts": 2, "globals": "divide"}),
    ("e4m3", (300, 200), {"group": 128, "block_rows": 128, "scales": "float32"}),
    ("e4m3", (600, 200), {"group": 128, "block_rows": 128, "scales": "float32", "parts": 2}),
    ("e4m3", (600, 130), {"group": 128, "block_rows": 128, "scales": "e8m0", "parts": 2, "transposed": True}),
    ("e4m3", (7, 33), {"group": 33, "scales": "bfloat16"}),
    ("e4m3", (48, 64), {"group": 128, "block_rows": 128, "scales": "float32", "parts": 2}),
    ("e4m3", (6, 40), {"group": 40, "block_rows": 3, "parts": 2, "scales": "float16"}),
]


@pytest.mark.parametrize(("coding", "shape", "fields"), FORMS, ids=str)
def test_every_coding_against_its_formula(
    coding: str, shape: tuple[int, int], fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several tiles, whose bounds are not those of blocks or parts."""
    p = projection(coding, *shape, **fields)
    layout, record = coded(p)
    views = sections(record, layout)
    monkeypatch.setattr(codec, "TILE_WEIGHTS", 64 * shape[1])
    found = decoded(record, layout, torch.float32)
    by_rows = found.T if p.transposed else found
    random = np.random.default_rng(0)
    ends = [(0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // p.parts, 0), (shape[0] // p.parts - 1, shape[1] - 1)]
    for row, column in [*ends, *zip(random.integers(0, shape[0], 200), random.integers(0, shape[1], 200), strict=True)]:
        row, column = min(int(row), shape[0] - 1), int(column)
        assert float(by_rows[row, column]) == number_at(views, p, row, column) * scale_at(views, p, row, column)
    for dtype in (torch.bfloat16, torch.float16):
        assert_same(decoded(record, layout, dtype), found.to(dtype))
