"""Products with codes of 4 bits, as torch has them, equal those with the decoded weights. Here the CPU's stand in for
CUDA's; what torch says of CUDA's shapes and types is asked on tensors without memory."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from coded_records import coded, projection
from int4 import CpuInt4, cuda_operators
from quantised_records import levels_at_random, with_zero_points
from torch._subclasses import FakeTensorMode

from moetier.runtime.devices.cuda import CudaInt4
from moetier.runtime.devices.device import chosen_device
from moetier.runtime.kernels import int4 as fused
from moetier.runtime.kernels.int4 import FusedKernels, fused_or_plain
from moetier.runtime.kernels.products.api import Kernels
from moetier.tiers.layout import Bits, RecordLayout
from moetier.tiers.quant.codec import decode, encode, layout_for
from moetier.tiers.quant.packing import from_kernel_order, pair_columns

KINDS = [
    "cpu",
    "order of cuda",
    pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]),
]
SETTINGS = [
    *((group, "bfloat16") for group in (32, 64, 128, 256)),
    *((group, "uint8") for group in (16, 32, 64, 128, 256)),
]
WIDTHS: list[Bits] = [8, 4, 3, 2]
SHAPES = [(17, 512), (130, 768)]


@pytest.fixture(params=KINDS)
def kernels(request: pytest.FixtureRequest) -> Iterator[FusedKernels]:
    match request.param:
        case "cuda":
            yield FusedKernels("cuda", CudaInt4())
        case "cpu":
            yield FusedKernels("cpu", CpuInt4())
        case _:
            with cuda_operators():
                yield FusedKernels("cpu", CudaInt4())


@functools.cache
def quantised(
    bits: Bits, rows: int, columns: int, group: int, pairs: str, transposed: bool = False
) -> tuple[RecordLayout, torch.Tensor]:
    shape = (columns, rows) if transposed else (rows, columns)
    parameters = {"up_proj": (shape, "bfloat16")}
    layout = layout_for(parameters, bits=bits, group=group, pairs=pairs, transposed=transposed)
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(bits)) * 0.02
    out = np.empty(layout.record_bytes, np.uint8)
    encode({"up_proj": weights}, layout, out, fast=True)
    return layout, torch.from_numpy(out)


def arranged(kernels: Kernels, record: torch.Tensor, layout: RecordLayout) -> torch.Tensor:
    """A copy, as a slot of the device has it."""
    copy = record.to(kernels.device, copy=True)
    assert kernels.arrange is not None
    kernels.arrange(copy, layout)
    return copy


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_matrices_with_zero_points_are_decoded(kernels: FusedKernels, bits: Bits) -> None:
    layout, record = with_zero_points(levels_at_random(bits, 70, 256, 64, torch.float16), bits)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).to(kernels.device, torch.bfloat16)
    there = arranged(kernels, record, layout)
    assert torch.equal(there.cpu(), record)
    plain = Kernels(kernels.device).project(x, there, layout, "up_proj")
    assert torch.equal(kernels.project(x, there, layout, "up_proj"), plain)


@pytest.mark.parametrize(
    ("bits", "group", "pairs", "shape"),
    [
        (bits, group, pairs, SHAPES[(number + at) % len(SHAPES)])  # by turns
        for number, bits in enumerate(WIDTHS)
        for at, (group, pairs) in enumerate(SETTINGS)
    ],
)
def test_products_with_arranged_records(
    kernels: FusedKernels,
    bits: Bits,
    group: int,
    pairs: str,
    shape: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against decode and multiply; with groups of 16 it is that."""
    monkeypatch.setattr(fused, "TILE_WEIGHTS", 64 * 512)  # several tiles to an arrangement
    layout, record = quantised(bits, *shape, group, pairs)
    device = kernels.device
    there = arranged(kernels, record, layout)
    weights = decode(record, layout, "up_proj", torch.empty(shape))
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(4))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in (1, 17):
            x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(dtype)
            y = kernels.project(x.to(device), there, layout, "up_proj").cpu()
            assert y.shape == (rows, shape[0])
            assert y.dtype == dtype
            assert y.is_contiguous()
            ideal = x.float() @ weights.T
            assert float((y.float() - ideal).norm() / ideal.norm()) < 0.01
    biased = kernels.project(x.to(device), there, layout, "up_proj", bias.to(device, dtype)).cpu()
    assert float((biased - y - bias).abs().max()) < 0.01


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_transposed_modules_and_rows_that_lie_apart(kernels: FusedKernels, bits: Bits) -> None:
    layout, record = quantised(bits, 96, 256, 64, "bfloat16", transposed=True)
    x = torch.randn(256, 5, generator=torch.Generator().manual_seed(1)).T
    ideal = x @ decode(record, layout, "up_proj", torch.empty(256, 96))
    y = kernels.project(x.to(kernels.device), arranged(kernels, record, layout), layout, "up_proj").cpu()
    assert float((y - ideal).norm() / ideal.norm()) < 0.01


@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
def test_only_codes_that_fit_are_arranged(bits: Bits) -> None:
    """Everything else is as it came: pairs, biases, and what is not quantised."""
    parameters = {"gate_up_proj": ((128, 256), "bfloat16"), "down_proj": ((256, 72), "bfloat16")}
    layout = layout_for(parameters | {"gate_up_proj_bias": ((128,), "bfloat16")}, bits=bits, group=64, pairs="bfloat16")
    record = torch.randint(0, 256, (layout.record_bytes,), dtype=torch.uint8)
    with cuda_operators():
        there = arranged(FusedKernels("cpu", CudaInt4()), record, layout)
    fits = {8: {"gate_up_proj.high", "gate_up_proj.low"}, 4: {"gate_up_proj.codes"}}.get(bits, set())
    changed = set()
    for section in layout.sections:
        part = slice(section.offset, section.offset + section.nbytes)
        if not torch.equal(there[part], record[part]):
            changed.add(section.name)
    assert changed == fits


def test_what_has_no_groups_that_fit_is_decoded_and_bit_for_bit_torchs_own(kernels: FusedKernels) -> None:
    for bits, group in ((16, 64), (4, 16)):
        layout, record = quantised(bits, 96, 272, group, "uint8")  # type: ignore[arg-type]
        x = torch.randn(3, 272).to(kernels.device)
        there = arranged(kernels, record, layout)
        assert torch.equal(there.cpu(), record)
        y = kernels.project(x, there, layout, "up_proj")
        assert torch.equal(y, Kernels(kernels.device).project(x, there, layout, "up_proj"))


@pytest.mark.parametrize("coding", ["e2m1", "int4", "e4m3"])
def test_codings_of_checkpoints_are_decoded(kernels: FusedKernels, coding: str) -> None:
    """So records are left as they are, though torch's product has their group size."""
    layout, record = coded(projection(coding, 48, 128, group=32, scales="bfloat16"))
    there = arranged(kernels, record, layout)
    assert torch.equal(there.cpu(), record)
    x = torch.randn(3, 128).to(kernels.device)
    y = kernels.project(x, there, layout, "up_proj")
    assert torch.equal(y, Kernels(kernels.device).project(x, there, layout, "up_proj"))
    assert not kernels.packs(layout)


@pytest.mark.parametrize("columns", [32, 96, 256])
def test_columns_in_pairs(columns: int) -> None:
    nibbles = torch.randint(0, 256, (128 * columns // 2,), dtype=torch.uint8)
    codes = from_kernel_order(nibbles, columns)
    assert torch.equal(pair_columns(nibbles, columns), codes[:, ::2] * 16 + codes[:, 1::2])


@pytest.mark.parametrize("columns", [64, 96, 128, 4096])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_cudas_product_gets_the_types_and_shapes_that_torch_says_it_takes(columns: int, bits: Bits) -> None:
    """On tensors without memory, of which torch asks what it would ask of CUDA's."""
    layout = layout_for({"up_proj": ((130, columns), "bfloat16")}, bits=bits, group=32)
    with FakeTensorMode():
        kernels = FusedKernels("cpu", CudaInt4())
        record = torch.empty(layout.record_bytes, dtype=torch.uint8)
        assert kernels.arrange is not None
        kernels.arrange(record, layout)
        for dtype in (torch.bfloat16, torch.float16):
            y = kernels.project(torch.empty(3, columns, dtype=dtype), record, layout, "up_proj")
            assert (y.shape, y.dtype) == ((3, 130), dtype)


# -- whether it can be used --------------------------------------------------------------------------------------------


class Broken(CpuInt4):
    """As on a device that torch has no such product for: it fails, or does nothing."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def multiply(self, x: torch.Tensor, arranged: torch.Tensor, group: int, pairs: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        y = super().multiply(x, arranged, group, pairs)
        return y if group < 256 else torch.zeros_like(y)


def test_a_product_that_is_right_is_used() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(fused_or_plain(torch.device("cpu"), CpuInt4())) is FusedKernels
        with cuda_operators():
            assert type(fused_or_plain(torch.device("cpu"), CudaInt4())) is FusedKernels


@pytest.mark.parametrize(
    ("error", "says"),
    [(None, "wrong"), (RuntimeError("no kernel image"), "kernel image"), (AttributeError("_x"), "_x")],
)
def test_a_product_that_is_not_what_it_should_be_is_not_used(error: Exception | None, says: str) -> None:
    with pytest.warns(RuntimeWarning, match=says):
        kernels = fused_or_plain(torch.device("cpu"), Broken(error))
    assert type(kernels) is Kernels
    assert kernels.arrange is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_has_fused_kernels() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("it has no such product")
    assert type(chosen_device("cuda").kernels()) is FusedKernels
    assert type(chosen_device("cuda").kernels(exact=True)) is Kernels
