"""Kernels for AArch64, under an emulator: the bits are those of the kernels for this machine."""

from __future__ import annotations

import platform
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from arm import TRIPLE, ArmProgram, SharedMemory
from coded_records import blocks, coded, projection
from llvmlite import ir
from quantised_records import quantised
from torch import Tensor

from moetier.runtime.kernels.experts.expert_code import (
    ACTIVATE,
    ADD_UP,
    PLACE,
    ActivateContext,
    Activation,
    AddUpContext,
    PlaceContext,
    activation_module,
    adding_module,
    placing_module,
)
from moetier.runtime.kernels.jit.emitter import BF16, FP32
from moetier.runtime.kernels.jit.processor import Dot, Processor, arm_features, this_processor
from moetier.runtime.kernels.jit.team import compile_kernel
from moetier.runtime.kernels.layer.attention_code import (
    ATTEND,
    NO_WINDOW,
    STRIP_ROWS,
    AttentionContext,
    attention_module,
)
from moetier.runtime.kernels.layer.attention_piece import PIECE, held_numbers, result_numbers
from moetier.runtime.kernels.layer.eight_bits import in_codes
from moetier.runtime.kernels.layer.norm import float_bits
from moetier.runtime.kernels.products.dots import ROWS
from moetier.runtime.kernels.products.gemm import WORK, ProjectionProduct, Rounded, product_module, variant_of
from moetier.runtime.kernels.products.gemm_tile import PackedVariant
from moetier.runtime.kernels.products.gemv import GEMV, gemv_module
from moetier.runtime.kernels.products.matmul import MATMUL, PADDING, matmul_module
from moetier.runtime.kernels.products.rounding import ROUND, Rounding, rounding_module
from moetier.runtime.kernels.products.words import WORD
from moetier.tiers.layout import GGUF_BLOCKS, Bits, RecordLayout

FEATURES = {Dot.PLAIN: "", Dot.DOTPROD: "+dotprod", Dot.I8MM: "+dotprod,+i8mm"}
Steps = list[tuple[str, Sequence[int]]]
ACTIVATIONS = [
    Activation("silu", limit=7.0, shift=1.0),
    Activation("gelu"),
    Activation("gelu_tanh", interleaved=True),
    Activation("relu2", gated=False),
]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[SharedMemory]:
    found = SharedMemory(tmp_path, 16 << 20)
    yield found
    found.close()


def compare(
    folder: Path, memory: SharedMemory, processor: Processor, emit: Callable[[Processor], dict[str, ir.Module]],
    steps: Steps, results: list[Tensor],
) -> None:  # fmt: skip
    """Run functions here and on AArch64, and assert that all results have the same bits, and are not 0."""
    arm = ArmProgram(folder, memory, processor, emit(processor))
    here = {name: compile_kernel(this_processor(), module, name) for name, module in emit(this_processor()).items()}
    for name, context in steps:
        here[name].run(array("q", context), 1)
    expected = [result.clone() for result in results]
    for result in results:
        assert result.any()
        result.zero_()
    arm.run(*((name, memory.context(context)) for name, context in steps))
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize(("dot", "instruction"), [(Dot.DOTPROD, "sdot"), (Dot.I8MM, "usdot")])
def test_the_instructions_for_integer_products_are_used(dot: Dot, instruction: str) -> None:
    processor = Processor(FEATURES[dot], TRIPLE)
    assert processor.dot is dot
    code, machine = processor.optimised(product_module(PackedVariant(8, 64, "bfloat16", BF16), processor))
    assert re.search(rf"\b{instruction}\s+v\d+\.4s, v\d+\.16b", machine.emit_assembly(code))


def test_codes_of_a_table_are_looked_up_in_one_instruction() -> None:
    processor = Processor(FEATURES[Dot.DOTPROD], TRIPLE)
    p = projection("e2m1", 64, 96, group=32, scales="e8m0")
    code, machine = processor.optimised(product_module(variant_of(p, FP32), processor), unroll=False)
    assert re.search(r"\btbl\s+v\d+\.16b", machine.emit_assembly(code))


def test_features_are_found_in_the_list_of_linux() -> None:
    text = "processor\t: 0\nFeatures\t: fp asimd asimddp atomics {}\nCPU part\t: 0xd0c\n"
    assert arm_features(text.format("")) == ["+dotprod"]
    assert arm_features(text.format("bf16 i8mm")) == ["+dotprod", "+i8mm"]
    assert arm_features("flags\t: avx2\n") == []


@pytest.mark.slow
@pytest.mark.parametrize("dot", FEATURES)
@pytest.mark.parametrize(
    ("bits", "group", "pairs"),
    [(8, 64, "bfloat16"), (4, 64, "bfloat16"), (3, 64, "bfloat16"), (2, 16, "uint8"), (8, 128, "uint8")],
)
def test_products(tmp_path: Path, memory: SharedMemory, bits: Bits, group: int, pairs: str, dot: Dot) -> None:
    products(tmp_path, memory, *quantised(bits, 70, 512, group, pairs), dot)


@pytest.mark.slow
@pytest.mark.parametrize("dot", FEATURES)
@pytest.mark.parametrize(
    ("coding", "scales"), [("e2m1", "e8m0"), ("e2m1", "e4m3"), ("int4", "float16"), ("e4m3", "e8m0")]
)
def test_products_with_codings(tmp_path: Path, memory: SharedMemory, coding: str, scales: str, dot: Dot) -> None:
    products(tmp_path, memory, *coded(projection(coding, 70, 480, group=32, scales=scales)), dot)


@pytest.mark.slow
@pytest.mark.parametrize("dot", FEATURES)
@pytest.mark.parametrize("coding", GGUF_BLOCKS)
def test_products_with_blocks(tmp_path: Path, memory: SharedMemory, coding: str, dot: Dot) -> None:
    products(tmp_path, memory, *blocks(coding, 70, 512 if GGUF_BLOCKS[coding].weights == 256 else 288), dot)


def products(folder: Path, memory: SharedMemory, layout: RecordLayout, record: Tensor, dot: Dot) -> None:
    """Compare products of seven rows."""
    (p,), rows = layout.projections, 7
    compiled = ProjectionProduct(layout, p.name, torch.bfloat16, torch.float32, this_processor())
    record = memory.copy(record)
    x = memory.copy(torch.randn(rows, p.columns, generator=torch.Generator().manual_seed(1)).bfloat16())
    y = memory.empty(rows, compiled.rows, dtype=torch.float32)
    taken = memory.empty(rows * compiled.row_bytes, dtype=torch.uint8)
    jobs = memory.context(array("q", (record.data_ptr(), 0, rows)))
    rounded = Rounded(taken.data_ptr(), rows, compiled)
    product = compiled.context(1, array("q", (0, 0, 0)), rounded, y.data_ptr(), has_own_rows=True)
    product[3] = jobs.data_ptr()
    steps = [(ROUND, rounded.context(x.data_ptr())), (WORK, product)]

    def emit(processor: Processor) -> dict[str, ir.Module]:
        product = product_module(variant_of(p, FP32), processor)
        return {ROUND: rounding_module(compiled.rounding, BF16), WORK: product}

    compare(folder, memory, Processor(FEATURES[dot], TRIPLE), emit, steps, [taken, y])


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_what_is_between_and_after_products(tmp_path: Path, memory: SharedMemory, activation: Activation) -> None:
    """One expert with biases, for three rows of one token: so its outputs are added up."""
    random = torch.Generator().manual_seed(2)
    columns, rows, group = 128, 3, 64
    record = memory.copy(torch.randn(2 * columns, generator=random).bfloat16())  # its biases only
    jobs = memory.context(array("q", (record.data_ptr(), 0, rows)))
    inner = memory.copy(4 * torch.randn(rows, columns * (2 if activation.gated else 1), generator=random))
    rounded = memory.empty(rows * (columns + 12 * (columns // group)), dtype=torch.uint8)
    numbers = rounded.data_ptr()
    scales = numbers + rows * columns
    sums = scales + rows * (columns // group) * 8
    part = memory.copy(torch.randn(rows, columns, generator=random))
    places = memory.context(array("q", (2, 0, 1)))
    outputs, out = (memory.empty(count, columns, dtype=torch.bfloat16) for count in (rows, 1))
    weights = memory.copy(torch.rand(1, rows, generator=random))
    order, bounds = memory.context(array("q", reversed(range(rows)))), memory.context(array("q", (0, rows)))
    activating = ActivateContext(
        items=1,
        jobs=jobs.data_ptr(),
        product=inner.data_ptr(),
        rounded=numbers,
        scales=scales,
        sums=sums,
        columns=columns,
        **dict(zip(("alpha", "limit", "shift"), activation.numbers, strict=True)),
    )
    placing = PlaceContext(
        items=1,
        jobs=jobs.data_ptr(),
        product=part.data_ptr(),
        places=places.data_ptr(),
        outputs=outputs.data_ptr(),
        columns=columns,
    )
    adding = AddUpContext(
        tokens=1,
        outputs=outputs.data_ptr(),
        weights=weights.data_ptr(),
        rows=order.data_ptr(),
        bounds=bounds.data_ptr(),
        sums=out.data_ptr(),
        columns=columns,
    )
    steps = [(ACTIVATE, array("q", activating)), (PLACE, array("q", placing)), (ADD_UP, array("q", adding))]

    def emit(processor: Processor) -> dict[str, ir.Module]:
        return {
            ACTIVATE: activation_module(activation.variant, Rounding(group), True),
            PLACE: placing_module(torch.bfloat16, True),
            ADD_UP: adding_module(torch.bfloat16, torch.float32, False),
        }

    compare(tmp_path, memory, Processor("", TRIPLE), emit, steps, [rounded, outputs, out])


fused = pytest.mark.skipif(
    platform.machine() != "x86_64" or "fma" not in Path("/proc/cpuinfo").read_text().split(),
    reason="this processor rounds products before it adds them; AArch64 does not",
)


@fused
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_codes", [False, True], ids=["as they are", "in 8 bits"])
def test_attention(tmp_path: Path, memory: SharedMemory, dtype: torch.dtype, has_codes: bool) -> None:
    """Many tokens at once, and the last of them alone, which has the same bits."""
    share, key_heads, length, key_width, value_width = 3, 2, 2 * PIECE + 9, 32, 48
    random = torch.Generator().manual_seed(3)
    query = memory.copy(torch.randn(1, share * key_heads, STRIP_ROWS // share, key_width, generator=random).to(dtype))
    rows = (torch.randn(1, key_heads, length, width, generator=random).to(dtype) for width in (key_width, value_width))
    key, value = (memory.copy(in_codes(part) if has_codes else part) for part in rows)
    pages = memory.context([0])  # a single one
    steps, results = [], []
    for name, queries in (("moetier_many", query), ("moetier_one", query[:, :, -1:])):
        tokens = queries.shape[2]
        out = memory.empty(1, tokens, share * key_heads, value_width, dtype=dtype)
        thread = 4 * (held_numbers(tokens * share, key_width, value_width) + 2 * tokens * share * result_numbers(48))
        given = AttentionContext(
            items=key_heads, key_heads=key_heads, share=share, tokens=tokens, strip=tokens, spans=1,
            end=length, window=NO_WINDOW, key_width=key_width, value_width=value_width,
            queries=queries.data_ptr(), query_head=query.stride(1), query_token=query.stride(2),
            keys=key.data_ptr(), key_head=key.stride(1), key_position=key.stride(2),
            values=value.data_ptr(), value_head=value.stride(1), value_position=value.stride(2),
            pages=pages.data_ptr(), page_bits=62, out=out.data_ptr(),
            scratch=memory.empty(thread, dtype=torch.uint8).data_ptr(), thread_bytes=thread,
            item_bytes=4 * tokens * share * result_numbers(48), scaling=float_bits(0.2),
        )  # fmt: skip
        steps.append((name, array("q", (*given, *bytes(key_heads)))))
        results.append(out)

    def emit(processor: Processor) -> dict[str, ir.Module]:
        modules = {}
        for name, has_few_rows in (("moetier_many", False), ("moetier_one", True)):
            modules[name] = module = attention_module(processor, dtype, False, has_few_rows, dtype, has_codes)
            module.globals[ATTEND].name = name
        return modules

    compare(tmp_path, memory, Processor("", TRIPLE), emit, steps, results)
    assert torch.equal(results[0][:, -1:], results[1])


@fused
@pytest.mark.slow
def test_rows_with_a_matrix(tmp_path: Path, memory: SharedMemory) -> None:
    """Eleven rows at once, and the last of them alone, which has the same bits."""
    random = torch.Generator().manual_seed(4)
    x, matrix = (memory.copy(torch.randn(rows, 96, generator=random).bfloat16()) for rows in (11, 50))
    y, alone = (memory.empty(rows, 50, dtype=torch.bfloat16) for rows in (11, 1))
    nbytes = (12 + ROWS) * (96 * WORD + PADDING)
    scratch = memory.empty(nbytes, dtype=torch.uint8).data_ptr()
    addresses = [part.data_ptr() for part in (x, matrix, y)]
    steps = [
        (MATMUL, array("q", (0, 0, 1, *addresses, 11, 50, 96, 12, scratch, nbytes))),
        (GEMV, array("q", (0, 13, x[-1:].data_ptr(), 50, 96, matrix.data_ptr(), alone.data_ptr()))),
    ]

    def emit(processor: Processor) -> dict[str, ir.Module]:
        given = (processor, *[torch.bfloat16] * 3, False)
        return {MATMUL: matmul_module(*given), GEMV: gemv_module(*given)}

    compare(tmp_path, memory, Processor("", TRIPLE), emit, steps, [y, alone])
    assert torch.equal(y[-1:], alone)
