"""Products with matrices in the codings of checkpoints, against decode and multiply."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from coded_records import before_a_fence, coded, projection

from moetier.runtime.kernels.codings import row_emitter
from moetier.runtime.kernels.jit.processor import Dot, Processor
from moetier.runtime.kernels.products.packed import PackedKernels
from moetier.tiers.layout import SCALE_TYPES, Projection, RecordLayout
from moetier.tiers.quant.codec import decode

TYPES = (torch.float32, torch.bfloat16, torch.float16)
CPUS = [None, "+avx2,+fma", ""]  # features of LLVM; None: this processor


@functools.cache
def kernels_for(cpu: str | None) -> PackedKernels:
    return PackedKernels() if cpu is None else PackedKernels(Processor(cpu))


def ideal(x: torch.Tensor, record: torch.Tensor, layout: RecordLayout) -> torch.Tensor:
    p = layout.projections[0]
    weights = decode(record, layout, p.name, torch.empty(p.shape, dtype=torch.float32)).double()
    return x.double() @ (weights if p.transposed else weights.T)


def tolerance(p: Projection, dtype: torch.dtype) -> float:
    """With FP8, nothing is rounded but the sums and the result."""
    if p.coding != "e4m3":
        return 0.012
    return 1e-6 if dtype == torch.float32 else 4e-3


def type_of(shape: tuple[int, int]) -> torch.dtype:
    """The type of inputs for matrices of a shape, by turns. Tests of one form use one type: its kernel is there."""
    return TYPES[sum(shape) % len(TYPES)]


GROUPS = [("e2m1", (48, 256), {"group": group, "scales": "e8m0"}) for group in (16, 32, 64, 128)]
SCALES = [(coding, (17, 96), {"group": 32, "scales": scales}) for coding in ("int4", "e4m3") for scales in SCALE_TYPES]
OTHERS: list[tuple[str, tuple[int, int], dict[str, Any]]] = [
    ("e2m1", (16, 32), {"group": 32, "scales": "e8m0"}),  # one tile of the widest registers, one group
    ("e2m1", (150, 352), {"group": 32, "scales": "e8m0"}),  # two chunks and three groups
    ("e2m1", (66, 208), {"group": 16, "scales": "e4m3", "parts": 2, "globals": "multiply"}),
    ("e2m1", (66, 208), {"group": 16, "scales": "e4m3", "parts": 2, "globals": "divide"}),
    ("int4", (40, 256), {"group": 128, "scales": "bfloat16", "transposed": True}),
    ("int4", (30, 160), {"group": 32, "scales": "float16", "parts": 3}),
    ("e2m1", (60, 96), {"group": 32, "scales": "e8m0", "parts": 2, "block_rows": 8}),
    ("e4m3", (300, 272), {"group": 128, "block_rows": 128, "scales": "float32"}),
    ("e4m3", (600, 208), {"group": 128, "block_rows": 128, "scales": "float32", "parts": 2}),
    ("e4m3", (64, 48), {"group": 128, "block_rows": 128, "scales": "e8m0", "parts": 2}),
    ("e4m3", (20, 80), {"group": 80, "scales": "bfloat16"}),
    ("e4m3", (20, 400), {"group": 400, "block_rows": 20, "scales": "float32"}),
]


def slowly_compiled(*cases: Any) -> list[Any]:
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


OF_INT4, OF_E4M3 = SCALES[: len(SCALE_TYPES)], SCALES[len(SCALE_TYPES) :]
# of OTHERS, what differs little from cases that are quick
PARTLY = [OTHERS[number] for number in (0, 3, 5, 7, 9, 10)]


@pytest.mark.parametrize(
    ("coding", "shape", "fields"),
    [
        *(*GROUPS[:2], *OF_INT4[:3], *OF_E4M3[:2], *(case for case in OTHERS if case not in PARTLY)),
        *slowly_compiled(*GROUPS[2:], *OF_INT4[3:], *OF_E4M3[2:], *PARTLY),
    ],
    ids=str,
)
def test_products_where_records_lie(coding: str, shape: tuple[int, int], fields: dict[str, Any]) -> None:
    """A row has the same bits in whatever company."""
    p = projection(coding, *shape, **fields)
    layout, record = coded(p)
    kernels = kernels_for(None)
    assert kernels.packs(layout)
    dtype = type_of(shape)
    x = torch.randn(9, shape[1], generator=torch.Generator().manual_seed(3)).to(dtype)
    wanted = ideal(x, record, layout)
    y = kernels.project(x, record, layout, p.name)
    assert y.shape == (9, shape[0])
    assert y.dtype == dtype
    assert float((y.double() - wanted).norm() / wanted.norm()) < tolerance(p, dtype)
    for first, last in ((0, 1), (1, 3), (3, 7), (0, 8)):
        assert torch.equal(kernels.project(x[first:last], record, layout, p.name), y[first:last])


@pytest.mark.parametrize(
    ("coding", "shape", "fields", "cpu"),
    [
        *((*GROUPS[0], CPUS[1]), (*SCALES[2], CPUS[2]), (*OTHERS[8], CPUS[1])),
        *slowly_compiled((*GROUPS[0], CPUS[2]), (*SCALES[2], CPUS[1]), (*OTHERS[8], CPUS[2])),
        *slowly_compiled(*((*case, cpu) for case in (SCALES[8], *OTHERS[1:3]) for cpu in CPUS[1:])),
    ],
    ids=str,
)
def test_the_same_bits_on_every_processor(
    coding: str, shape: tuple[int, int], fields: dict[str, Any], cpu: str
) -> None:
    p = projection(coding, *shape, **fields)
    layout, record = coded(p)
    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(4)).to(type_of(shape))
    for rows in (x, x[:1]):
        here, there = (kernels_for(each).project(rows, record, layout, p.name) for each in (None, cpu))
        assert torch.equal(here, there)


@pytest.mark.parametrize(("coding", "shape", "fields"), [SCALES[2], *slowly_compiled(GROUPS[0], *OTHERS[1:3])], ids=str)
def test_tiles_of_sixteen_rows_have_the_same_bits(
    coding: str, shape: tuple[int, int], fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with registers of 512 bits, though without their instructions."""
    p = projection(coding, *shape, **fields)
    layout, record = coded(p)
    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(4)).to(type_of(shape))
    monkeypatch.setattr(row_emitter, "WIDE", frozenset({Dot.PLAIN}))
    wide = PackedKernels(Processor(""))
    for rows in (x, x[:1]):
        here, there = (kernels.project(rows, record, layout, p.name) for kernels in (kernels_for(None), wide))
        assert torch.equal(here, there)


@pytest.mark.parametrize("coding", ["e2m1", "int4"])
def test_what_is_rounded_of_a_product_is_its_input(coding: str) -> None:
    """Whole numbers up to 127 are not changed by rounding. The result differs from fp32's by the order of sums."""
    layout, record = coded(projection(coding, 48, 320, group=32, scales="bfloat16"))
    x = torch.randint(-127, 128, (5, 320), generator=torch.Generator().manual_seed(1)).float()
    x[:, ::32] = 127.0
    wanted = ideal(x, record, layout)
    y = kernels_for(None).project(x, record, layout, "up_proj")
    assert float((y - wanted).abs().max() / wanted.abs().max()) < 1e-6


@pytest.mark.parametrize("code", [0x00, 0x77, 0xFF])
@pytest.mark.parametrize("coding", ["e2m1", "int4"])
def test_sums_of_the_largest_codes_and_numbers_do_not_overflow(coding: str, code: int) -> None:
    p = projection(coding, 16, 128, group=128, scales="float32")
    layout, record = coded(p)
    section = layout.sections[0]
    record[section.offset : section.offset + section.nbytes] = code
    x = torch.ones(2, 128) * torch.tensor([[1.0], [-1.0]])  # all are rounded to 127 or -127
    y = kernels_for(None).project(x, record, layout, p.name)
    wanted = ideal(x, record, layout)
    assert float((y - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("coding", ["e2m1", "e4m3"])
def test_more_rows_than_one_call_multiplies_and_several_records(coding: str) -> None:
    p = projection(coding, 150, 96, group=32, scales="e8m0")
    made = [coded(p, seed=seed) for seed in range(3)]
    layout, records, counts = made[0][0], [record for _, record in made], [40, 1, 6]
    kernels, x = kernels_for(None), torch.randn(47, 96).bfloat16()
    parts = zip(torch.split(x, counts), records, strict=True)
    expected = [kernels.project(part, record, layout, p.name) for part, record in parts]
    assert torch.equal(kernels.multiply(x, records, counts, layout, p.name), torch.cat(expected))
    one = [kernels.project(x[:1], record, layout, p.name) for record in records]
    assert torch.equal(kernels.multiply(x[:1], records, [1] * 3, layout, p.name), torch.cat(one))
    for row in (0, 31, 32, 39):
        assert torch.equal(kernels.project(x[row : row + 1], records[0], layout, p.name), expected[0][row : row + 1])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 0.0, 1e-42, 1e19])
@pytest.mark.parametrize("coding", ["e2m1", "e4m3"])
def test_numbers_at_the_edge(number: float, coding: str) -> None:
    """A row with an infinity or NaN gives results that are not finite. Zeros and extreme numbers do no harm."""
    layout, record = coded(projection(coding, 64, 128, group=32, scales="float32"))
    x = torch.ones(2, 128)
    x[0, 5] = number
    y = kernels_for(None).project(x, record, layout, "up_proj")
    assert bool(y[1].isfinite().all())
    if abs(number) < 4e38:
        assert bool(y[0].isfinite().all())
    elif coding == "e2m1":
        assert not bool(y[0].isfinite().any())
    else:  # a weight may be 0
        assert not bool(y[0].isfinite().all())
    zeros = kernels_for(None).project(torch.zeros(1, 128), record, layout, "up_proj")
    assert torch.equal(zeros, torch.zeros(1, 64))


@pytest.mark.parametrize(
    ("coding", "shape", "fields"),
    [
        *(GROUPS[0], *OF_INT4[:3], *OTHERS[1:3], OTHERS[8]),
        *slowly_compiled(*OF_INT4[3:], OTHERS[0], OTHERS[7], *OTHERS[9:12]),
    ],
    ids=str,
)
def test_no_byte_behind_a_record_is_read(coding: str, shape: tuple[int, int], fields: dict[str, Any]) -> None:
    p = projection(coding, *shape, **fields)
    layout, record = coded(p)
    x = torch.randn(3, shape[1]).to(type_of(shape))
    with before_a_fence(record[: layout.payload_bytes]) as moved:
        y = kernels_for(None).multiply(x, moved, [3], layout, p.name)
        one = kernels_for(None).multiply(x[:1], moved, [1], layout, p.name)
    assert torch.equal(y, kernels_for(None).project(x, record, layout, p.name))
    assert torch.equal(one, y[:1])


def test_forms_that_no_kernel_has_are_decoded() -> None:
    for p in (
        projection("e2m1", 15, 96, group=32, scales="e8m0"),  # fewer rows than a tile has
        projection("e4m3", 40, 72, group=72, scales="bfloat16"),
        projection("e4m3", 40, 192, group=96, scales="bfloat16"),
    ):
        layout, record = coded(p)
        assert not kernels_for(None).packs(layout)
        x = torch.randn(2, p.columns)
        y = kernels_for(None).project(x, record, layout, p.name)
        assert float((y - ideal(x, record, layout)).norm()) < 1e-5 * float(y.norm())


def test_threads_make_no_difference() -> None:
    layout, record = coded(projection("e2m1", 2048, 512, group=32, scales="e8m0"))
    x, before, results = torch.randn(3, 512), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(kernels_for(None).project(x, record, layout, "up_proj"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
