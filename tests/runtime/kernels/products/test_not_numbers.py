"""Numbers that are NaN or infinite, in codes and scales of records: a product has them where torch's conversion has."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from coded_records import blocks, coded, projection
from torch import Tensor

from moetier.runtime.kernels.jit.processor import Processor
from moetier.runtime.kernels.products.packed import PackedKernels
from moetier.tiers.layout import GGUF_BLOCKS, Projection, RecordLayout
from moetier.tiers.quant.codec import TORCH_TYPES, decode, sections

CPUS = [None, "+avx2,+fma", ""]  # features of LLVM; None: this processor
NAME = "up_proj"
NAN_CODES = [0x7F, 0xFF]


def on_processors(*cases: tuple[str, ...]) -> list[Any]:
    """Each case with each processor. Of the other processors, one of every second case is quick, by turns."""
    return [
        pytest.param(*case, cpu, marks=[pytest.mark.slow] * (at > 0 and number % 4 != 2 * (at - 1)))
        for number, case in enumerate(cases)
        for at, cpu in enumerate(CPUS)
    ]


@functools.cache
def kernels_for(cpu: str | None) -> PackedKernels:
    return PackedKernels() if cpu is None else PackedKernels(Processor(cpu))


def every(kind: torch.dtype) -> Tensor:
    """All numbers of a type of one or two bytes; of fp32 the special ones: [n]."""
    if kind == torch.float32:
        bits = [0x7FC00000, -1, 0x7F800001, -0x7FFFFF, 0x7FFFFFFF, 0x7F800000, -0x800000, 0x3F800000, 0, 1]
        return torch.tensor(bits, dtype=torch.int32).view(kind).repeat(2)
    if kind.itemsize == 2:
        return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(kind)
    return torch.arange(256, dtype=torch.uint8)


def first_alone(rows: int, columns: int, value: float = 0.5) -> Tensor:
    x = torch.zeros(rows, columns)
    x[:, 0] = value
    return x


def assert_same(y: Tensor, wanted: Tensor, least: float = 1e-38) -> None:
    """``wanted`` is the first weight of each row, halved. An infinite one may be NaN in ``y``, as it is multiplied with
    zeros, too. Numbers up to ``least`` may be 0."""
    assert bool(y[wanted.isnan()].isnan().all())
    assert torch.equal(y.isfinite(), wanted.isfinite())
    whole = wanted.isfinite()
    torch.testing.assert_close(y[whole], wanted[whole], rtol=1e-5, atol=least)


@pytest.mark.parametrize(
    ("columns", "cpu"),
    [
        pytest.param(columns, cpu, marks=[pytest.mark.slow] * (number % 2 != at))
        for at, columns in enumerate((48, 128))
        for number, cpu in enumerate(CPUS)
    ],
)
def test_every_fp8_code_anywhere_in_a_row(columns: int, cpu: str | None) -> None:
    layout, record = coded(projection("e4m3", 256, columns, group=columns, scales="float32"))
    views = sections(record, layout)
    views[f"{NAME}.scales"].fill_(1)
    x = torch.ones(3, columns)
    for place in range(0, columns, 5):
        codes = views[f"{NAME}.codes"].fill_(0)
        codes[:, place] = every(torch.float8_e4m3fn)
        wanted = codes[:, place].view(torch.float8_e4m3fn).float()
        assert wanted.isnan().nonzero().flatten().tolist() == NAN_CODES
        for rows in (x, x[:1], 0 * x):
            y = kernels_for(cpu).project(rows, record, layout, NAME)
            assert_same(y, (rows[:, :1] * wanted).expand_as(y))


@pytest.mark.parametrize(
    ("coding", "scales", "cpu"),
    on_processors(
        *(("int4", "float16"), ("int4", "bfloat16"), ("int4", "float32")),
        *(("e2m1", "e8m0"), ("e2m1", "e4m3"), ("e4m3", "e8m0")),
    ),
)
def test_every_scale(coding: str, scales: str, cpu: str | None) -> None:
    kind = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}.get(scales) or TORCH_TYPES[scales]
    given = every(kind)
    layout, record = coded(projection(coding, len(given), 32, group=32, scales=scales, **_globals(coding, scales)))
    views = sections(record, layout)
    views[f"{NAME}.scales"].view(-1).copy_(given)
    views[f"{NAME}.codes"].fill_({"int4": 0x99, "e2m1": 0x22, "e4m3": 0x38}[coding])  # weights of 1
    if scales == "e4m3":
        views[f"{NAME}.globals"].fill_(1)
    y = kernels_for(cpu).project(first_alone(2, 32), record, layout, NAME)
    wanted = 0.5 * given.view(kind).float()
    assert wanted.isnan().any()
    assert_same(y, wanted.expand(2, -1), least=1e-26 if coding == "e4m3" else 1e-38)


def _globals(coding: str, scales: str) -> dict[str, str]:
    return {"globals": "multiply"} if (coding, scales) == ("e2m1", "e4m3") else {}


@pytest.mark.parametrize(("coding", "cpu"), on_processors(("q4_0",), ("q8_0",), ("q6_k",), ("mxfp4",)))
def test_every_scale_of_a_block(coding: str, cpu: str | None) -> None:
    form = GGUF_BLOCKS[coding]
    at, kind = {"q6_k": (208, torch.float16), "mxfp4": (0, torch.uint8)}.get(coding, (0, torch.float16))
    given = every(kind)
    layout, record = blocks(coding, len(given), form.weights)
    stored = record[: layout.payload_bytes].view(len(given), form.nbytes)
    stored[:] = 0x22  # all weights have the same sign, and are not 0
    stored[:, at : at + kind.itemsize] = given.view(torch.uint8).view(len(given), -1)
    y = kernels_for(cpu).project(first_alone(2, form.weights), record, layout, NAME)
    weights = decode(record, layout, NAME, torch.empty(len(given), form.weights))
    assert weights[:, 0].isnan().any()
    assert_same(y, 0.5 * weights[:, 0].expand(2, -1))


@pytest.mark.parametrize("cpu", [None, pytest.param(CPUS[1], marks=pytest.mark.slow), CPUS[2]])
def test_every_scale_beside_a_zero_point(cpu: str | None) -> None:
    given = every(torch.float16)
    p = Projection(NAME, len(given) // 16, 16 * 64, 4, "float16", group=64, pairs="float16_zeros")
    layout = RecordLayout((p,))
    record = torch.zeros(layout.record_bytes, dtype=torch.uint8)
    views = sections(record, layout)
    views[f"{NAME}.codes"].fill_(0x11)
    pairs = views[f"{NAME}.pairs"]
    pairs[..., 0] = given.view(pairs.shape[:2])
    x = torch.zeros(16, p.columns)
    x[range(16), range(0, p.columns, 64)] = 0.5
    y = kernels_for(cpu).project(x, record, layout, NAME)
    is_odd = ~pairs[..., 0].float().isfinite()
    assert torch.equal(~y.isfinite()[0], is_odd.any(0)), "in each product of the row"
    whole = ~is_odd.any(0)
    torch.testing.assert_close(y[:, whole], 0.5 * pairs[..., 0].float()[:, whole], rtol=1e-3, atol=1e-6)
