"""Products with records equal torch's own with the decoded weights, bit for bit, from any number of threads."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quantised_records import levels_at_random, quantised, with_zero_points

from moetier.runtime.devices.cpu import Cpu
from moetier.runtime.kernels.jit.processor import Processor
from moetier.runtime.kernels.products.api import Kernels
from moetier.runtime.kernels.products.packed import PackedKernels
from moetier.tiers.layout import BITS, Bits, RecordLayout
from moetier.tiers.quant.codec import decode, encode, layout_for
from moetier.tiers.quant.zero_points import Levels

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


# -- records where they lie --------------------------------------------------------------------------------------------

SLOWLY_COMPILED = (
    (64, "bfloat16", (65, 768)),
    (16, "uint8", (17, 512)),
    (16, "float16_zeros", (17, 512)),
    (128, "bfloat16_zeros", (65, 768)),
    (64, "float32_zeros", (17, 512)),
)
CPUS: list[str | None] = [None, "+avx2,+fma", ""]  # features of LLVM; None: this processor


@functools.cache
def packed_for(cpu: str | None) -> PackedKernels:
    return PackedKernels() if cpu is None else PackedKernels(Processor(cpu))


PAIRS = [
    *((group, "bfloat16") for group in (32, 64, 128, 256)),
    *((group, "uint8") for group in (16, 32, 64, 128, 256)),
    (16, "float16_zeros"),
    (64, "float16_zeros"),
    (128, "bfloat16_zeros"),
    (64, "float32_zeros"),
]
WIDTHS: list[Bits] = [8, 4, 3, 2]
SHAPES = [(17, 512), (65, 768)]
DEFAULT = (64, "bfloat16")


def some_records() -> Iterator[tuple[Bits, int, str]]:
    """Yield every kind of pairs with several widths, every size of groups with some width, and what is the default."""
    for group, pairs in PAIRS:
        sizes = [size for size, kind in PAIRS if kind == pairs]
        at = sizes.index(group)
        some = WIDTHS if (group, pairs) == DEFAULT else WIDTHS[at :: max(len(sizes), 2)] or WIDTHS[:1]
        yield from ((bits, group, pairs) for bits in some)


RECORDS = [*some_records()]


@pytest.mark.parametrize(
    ("bits", "group", "pairs"),
    [*RECORDS[::2], *(pytest.param(*each, marks=pytest.mark.slow) for each in RECORDS[1::2])],
)
def test_products_where_records_lie(bits: Bits, group: int, pairs: str) -> None:
    """Every type and shape with every width, and with every kind of pairs, but not with every two of them, as each is
    compiled anew; of the records that there are by default, every shape. Some also on one of the other processors, by
    turns."""
    number = WIDTHS.index(bits) + PAIRS.index((group, pairs))
    default = (group, pairs) == DEFAULT
    for at in range(len(SHAPES)) if default else (number % len(SHAPES),):
        dtype = TYPES[(number + at) % len(TYPES)]
        elsewhere = (dtype,) if default or pairs == "uint8" else ()
        products_where_records_lie(bits, group, pairs, SHAPES[at], (dtype,), elsewhere, CPUS[1 + number % 2 :][:1])


@pytest.mark.slow
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("group", "pairs"), PAIRS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_products_where_records_lie(bits: Bits, group: int, pairs: str, shape: tuple[int, int]) -> None:
    products_where_records_lie(bits, group, pairs, shape, TYPES, TYPES, CPUS[1:])


def products_where_records_lie(
    bits: Bits,
    group: int,
    pairs: str,
    shape: tuple[int, int],
    types: tuple[torch.dtype, ...],
    elsewhere: tuple[torch.dtype, ...],
    cpus: list[str | None],
) -> None:
    """Against decode and multiply; a row is the same to the bit in whatever company, or, ``elsewhere``, on ``cpus``."""
    layout, record = quantised(bits, *shape, group, pairs)
    assert packed_for(None).packs(layout)
    weights = decode(record, layout, "up_proj", torch.empty(shape))
    for dtype in types:
        x = torch.randn(9, shape[1], generator=torch.Generator().manual_seed(3)).to(dtype)
        y = packed_for(None).project(x, record, layout, "up_proj")
        assert y.shape == (9, shape[0])
        assert y.dtype == dtype
        ideal = x.float() @ weights.T
        assert float((y.float() - ideal).norm() / ideal.norm()) < 0.012
        for first, last in ((0, 1), (1, 3), (3, 7), (0, 8)):
            part = packed_for(None).project(x[first:last], record, layout, "up_proj")
            assert torch.equal(part, y[first:last])
        for cpu in cpus if dtype in elsewhere and (group, pairs, shape) in SLOWLY_COMPILED else ():
            assert torch.equal(packed_for(cpu).project(x, record, layout, "up_proj"), y)


def test_what_is_rounded_of_a_product_is_its_input() -> None:
    """An input of whole numbers up to 127 is not: the result is that of fp32, but for the order of its sums."""
    layout, record = quantised(4, 128, 512, 64, "bfloat16")
    x = torch.randint(-127, 128, (5, 512), generator=torch.Generator().manual_seed(1)).float()
    x[:, ::64] = 127.0
    ideal = x.double() @ decode(record, layout, "up_proj", torch.empty(128, 512)).double().T
    y = packed_for(None).project(x, record, layout, "up_proj")
    assert float((y - ideal).abs().max() / ideal.abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        pytest.param(bits, dtype, marks=[pytest.mark.slow] * (number % len(TYPES) != at))
        for number, bits in enumerate(WIDTHS)
        for at, dtype in enumerate(TYPES)
    ],
)
def test_zero_points_are_taken_in_fp32(bits: Bits, dtype: torch.dtype) -> None:
    """As (c - centre) * s + (centre - z) * s; denormal scales are no others."""
    levels = levels_at_random(bits, 128, 512, 64, dtype)
    layout, record = with_zero_points(levels, bits)
    x = torch.randint(-127, 128, (5, 512), generator=torch.Generator().manual_seed(1)).float()
    x[:, ::64] = 127.0
    ideal = x.double() @ Levels(levels.codes, levels.scales.double(), levels.zeros.double()).weights().T
    y = packed_for(None).project(x, record, layout, "up_proj")
    assert float((y - ideal).abs().max() / ideal.abs().max()) < 1e-6


def test_several_records_at_once() -> None:
    """With rows of their own, and with one row for all; also more of them than one thread takes."""
    made = [quantised(4, 1000, 256, 64, "bfloat16") for _ in range(3)]
    layout, kernels = made[0][0], packed_for(None)
    records = [record.roll(64 * number) for number, (_, record) in enumerate(made)]
    x = torch.randn(151, 256).bfloat16()
    counts = [5, 1, 145]  # the last are more than one call of a tile takes
    expected = [
        kernels.project(part, r, layout, "up_proj") for part, r in zip(torch.split(x, counts), records, strict=True)
    ]
    assert torch.equal(kernels.multiply(x, records, counts, layout, "up_proj"), torch.cat(expected))
    assert torch.equal(kernels.project(x[-1:], records[-1], layout, "up_proj"), expected[-1][-1:])
    one = [kernels.project(x[:1], record, layout, "up_proj") for record in records]
    assert torch.equal(kernels.multiply(x[:1], records, [1] * 3, layout, "up_proj"), torch.cat(one))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 0.0, 1e-42, 3e38])
@pytest.mark.parametrize("cpu", CPUS)
def test_numbers_at_the_edge(number: float, cpu: str | None) -> None:
    """What is not finite is not made finite; zeros, the smallest and the largest numbers do no harm."""
    layout, record = quantised(4, 64, 128, 64, "bfloat16")
    x = torch.ones(2, 128)
    x[0, 5] = number
    y = packed_for(cpu).project(x, record, layout, "up_proj")
    assert bool(y[1].isfinite().all())
    assert bool(y[0].isfinite().all()) == (abs(number) < 4e38)
    zeros = packed_for(cpu).project(torch.zeros(1, 128), record, layout, "up_proj")
    assert torch.equal(zeros, torch.zeros(1, 64))


def test_a_record_at_any_address() -> None:
    layout, record = quantised(3, 96, 256, 64, "uint8")
    x = torch.randn(3, 256)
    moved = torch.empty(len(record) + 7, dtype=torch.uint8)[7:]
    moved.copy_(record)
    kernels = packed_for(None)
    assert torch.equal(kernels.project(x, moved, layout, "up_proj"), kernels.project(x, record, layout, "up_proj"))


def test_threads_of_torch_multiply() -> None:
    """The result is the same with any number of threads, and torch's own threads are the ones."""
    layout, record = quantised(4, 1024, 1024, 64, "bfloat16")
    x, before = torch.randn(4, 1024), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(packed_for(None).project(x, record, layout, "up_proj"))
            torch.randn(1 << 20).exp_()
            here = threading.active_count(), len(list(Path("/proc/self/task").iterdir()))
            packed_for(None).project(x, record, layout, "up_proj")
            assert (threading.active_count(), len(list(Path("/proc/self/task").iterdir()))) == here
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_exact_kernels_are_torchs_own() -> None:
    assert type(Cpu().kernels(exact=True)) is Kernels
    assert type(Cpu().kernels()) is PackedKernels
