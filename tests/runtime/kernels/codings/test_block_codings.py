"""Products with matrices in the blocks of GGUF files, against decode and multiply."""

from __future__ import annotations

import functools

import llvmlite.binding as llvm
import pytest
import torch
from coded_records import before_a_fence, blocks

from moetier.runtime.kernels.codings import row_emitter
from moetier.runtime.kernels.jit.processor import Dot, Processor
from moetier.runtime.kernels.products.packed import PackedKernels
from moetier.tiers.layout import GGUF_BLOCKS, RecordLayout
from moetier.tiers.quant.codec import decode

# a whole run of columns that are loaded together, and a rest: of one block, of two, or alone
COLUMNS = {32: (288, 320, 96), 256: (512, 256)}
CPUS = ["", "+avx2,+fma", "+avx2,+fma,+avxvnni", "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni,+avx2,+fma"]
CASES = [(coding, columns) for coding, form in GGUF_BLOCKS.items() for columns in COLUMNS[form.weights]]
FIRST_CASES = [  # with one number of columns of each coding; the others are slow
    pytest.param(coding, columns, marks=[pytest.mark.slow] * (columns != COLUMNS[GGUF_BLOCKS[coding].weights][0]))
    for coding, columns in CASES
]
# one scale for a block, and scales of its parts; on another processor the other codings are slow
QUICK_CODINGS = ("q4_0", "q6_k")
QUICK_CASES = [("q4_0", COLUMNS[32][0])]


@functools.cache
def kernels_for(cpu: str | None) -> PackedKernels:
    return PackedKernels() if cpu is None else PackedKernels(Processor(cpu))


def rounded(x: torch.Tensor, group: int) -> torch.Tensor:
    """Round x [rows, columns] as the kernels do: to 8 bits, with a scale for each group."""
    parts = x.double().view(len(x), -1, group)
    step = parts.abs().amax(2, keepdim=True) / 127
    return (torch.where(step > 0, (parts / step).round(), 0 * parts) * step).view(x.shape)


def ideal(x: torch.Tensor, record: torch.Tensor, layout: RecordLayout) -> torch.Tensor:
    (p,) = layout.projections
    weights = decode(record, layout, p.name, torch.empty(p.shape)).double()
    return rounded(x.float(), p.group) @ weights.T


@pytest.mark.parametrize(
    ("coding", "columns", "dtype"),
    [
        pytest.param(*case.values, dtype, marks=[*case.marks, *[pytest.mark.slow] * ((coding == "q8_0") != is_short)])
        for dtype, is_short in ((torch.float32, False), (torch.bfloat16, True))
        for coding in GGUF_BLOCKS
        for case in FIRST_CASES
        if case.values[0] == coding
    ],
)
def test_products_are_those_with_decoded_weights(coding: str, columns: int, dtype: torch.dtype) -> None:
    """A row has the same bits in whatever company. One type of each coding is quick, fp32 for all but one."""
    layout, record = blocks(coding, 100, columns)
    x = torch.randn(9, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    y, wanted = kernels_for(None).project(x, record, layout, "up_proj"), ideal(x, record, layout)
    error = float((y.double() - wanted).norm() / wanted.norm())
    assert error < (2e-6 if dtype == torch.float32 else 4e-3), error
    for first, last in ((0, 1), (1, 3), (3, 7), (0, 8)):
        assert torch.equal(kernels_for(None).project(x[first:last], record, layout, "up_proj"), y[first:last])


@pytest.mark.parametrize(
    ("coding", "columns"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case not in QUICK_CASES)) for case in CASES],
)
def test_every_processor_gives_the_same_bits(coding: str, columns: int) -> None:
    layout, record = blocks(coding, 70, columns)
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(1))
    have = {f"+{name}" for name, has in llvm.get_host_cpu_features().items() if has}
    for rows in (x, x[:1]):
        wanted = kernels_for(None).project(rows, record, layout, "up_proj")
        for cpu in CPUS:
            if {*cpu.split(",")} - {""} <= have:
                assert torch.equal(kernels_for(cpu).project(rows, record, layout, "up_proj"), wanted), cpu


@pytest.mark.parametrize(
    "coding", [pytest.param(each, marks=[pytest.mark.slow] * (each != "q4_0")) for each in GGUF_BLOCKS]
)
def test_tiles_of_sixteen_rows_have_the_same_bits(coding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with registers of 512 bits, though without their instructions."""
    columns = COLUMNS[GGUF_BLOCKS[coding].weights][0]
    layout, record = blocks(coding, 40, columns)
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(4))
    monkeypatch.setattr(row_emitter, "WIDE", frozenset({Dot.PLAIN}))
    wide = PackedKernels(Processor(""))
    for rows in (x, x[:1]):
        here, there = (kernels.project(rows, record, layout, "up_proj") for kernels in (kernels_for(None), wide))
        assert torch.equal(here, there)


@pytest.mark.parametrize("byte", [0x00, 0x80, 0xFF])
@pytest.mark.parametrize(
    ("coding", "cpu"),
    [
        *((coding, None) for coding in GGUF_BLOCKS),
        *(pytest.param(coding, "", marks=[pytest.mark.slow] * (coding not in QUICK_CODINGS)) for coding in GGUF_BLOCKS),
    ],
)
def test_sums_of_the_largest_codes_and_numbers_do_not_overflow(coding: str, cpu: str | None, byte: int) -> None:
    columns = COLUMNS[GGUF_BLOCKS[coding].weights][0]
    layout, record = blocks(coding, 16, columns)
    heads = {"q4_0": (0, 2), "q8_0": (0, 2), "q4_k": (0, 16), "q5_k": (0, 16), "q6_k": (192, 210), "mxfp4": (0, 1)}
    first, last = heads[coding]
    codes = record[: layout.payload_bytes].view(-1, GGUF_BLOCKS[coding].nbytes)
    codes[:, :first], codes[:, last:] = byte, byte
    x = torch.ones(2, columns) * torch.tensor([[1.0], [-1.0]])  # all are rounded to 127 or -127
    y, wanted = kernels_for(cpu).project(x, record, layout, "up_proj"), ideal(x, record, layout)
    assert float((y - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize(("coding", "columns"), FIRST_CASES)
def test_no_byte_behind_a_record_is_read(coding: str, columns: int) -> None:
    layout, record = blocks(coding, 20, columns)
    x = torch.randn(3, columns)
    with before_a_fence(record[: layout.payload_bytes]) as moved:
        y = kernels_for(None).multiply(x, moved, [3], layout, "up_proj")
        one = kernels_for(None).multiply(x[:1], moved, [1], layout, "up_proj")
    assert torch.equal(y, kernels_for(None).project(x, record, layout, "up_proj"))
    assert torch.equal(one, y[:1])


def test_one_kernel_is_compiled_for_matrices_that_differ_only_in_their_rows() -> None:
    products = [PackedKernels().product(blocks("q4_0", rows, 96)[0], "up_proj", torch.float32) for rows in (16, 40)]
    assert products[0].kernel is products[1].kernel
