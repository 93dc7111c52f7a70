"""Compiled quantisation beside torch's: the same bytes for all forms, weights and processors."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import each_two
from threads import Task

from moetier.runtime.kernels.jit.processor import Processor, this_processor
from moetier.runtime.kernels.quantise.encode import encode, quantise
from moetier.tiers.errors import CheckpointError
from moetier.tiers.layout import GROUPS, Bits, RecordLayout
from moetier.tiers.quant import codec, hqq
from moetier.tiers.quant.codec import layout_for

QUANTISED: tuple[Bits, ...] = (8, 4, 3, 2)
PAIRS = ("bfloat16", "uint8")
DTYPES = ("bfloat16", "float16", "float32")


@functools.cache
def processor(features: str | None) -> Processor:
    return Processor(features) if features is not None else this_processor()


def layout_of(rows: int, columns: int, dtype: str, transposed: bool = False, **settings: Any) -> RecordLayout:
    shape = (columns, rows) if transposed else (rows, columns)
    return layout_for({"w": (shape, dtype)}, transposed=transposed, **settings)


def normal(rows: int, columns: int, std: float = 0.02, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * std


def both(weights: torch.Tensor, layout: RecordLayout, *, fast: bool, features: str | None = None) -> None:
    """Assert that torch and the kernel make the same record and nearly the same error of ``weights``."""
    compiled = functools.partial(quantise, processor=processor(features))
    records = [np.full(layout.record_bytes, 0xA5, np.uint8) for _ in range(2)]
    ours, theirs = (
        codec.encode({"w": weights}, layout, record, fast=fast, quantise=way)["w"]
        for record, way in zip(records, (compiled, None), strict=True)
    )
    assert np.array_equal(*records)
    assert ours.squared == pytest.approx(theirs.squared, rel=1e-4)
    assert ours.squared_norm == pytest.approx(theirs.squared_norm, rel=1e-4)


def both_in_form(
    weights: torch.Tensor, bits: Bits, group: int, pairs: str, transposed: bool, dtype: str, *, fast: bool
) -> None:
    """Like ``both``, with the smallest group that these pairs permit if ``group`` is less."""
    group = max(group, min(GROUPS[pairs]))
    layout = layout_of(*weights.shape, dtype, transposed, bits=bits, group=group, pairs=pairs)
    weights = weights.to(getattr(torch, dtype))
    both(weights.T.contiguous() if transposed else weights, layout, fast=fast)


@pytest.mark.parametrize(
    ("bits", "group", "pairs", "transposed", "dtype", "fast"),
    [
        case
        for case in each_two(QUANTISED, GROUPS["uint8"], PAIRS, (False, True), DTYPES, (False, True))
        if not case.marks  # the slow ones are several hundred
    ],
)
def test_it_makes_torchs_bytes_in_each_form(
    bits: Bits, group: int, pairs: str, transposed: bool, dtype: str, fast: bool
) -> None:
    for rows in (17, 65):
        both_in_form(normal(rows, 512), bits, group, pairs, transposed, dtype, fast=fast)


@settings(max_examples=6, deadline=None)
@given(
    bits=st.sampled_from(QUANTISED),
    group=st.sampled_from(GROUPS["uint8"]),
    pairs=st.sampled_from(PAIRS),
    rows=st.integers(1, 300),
    columns=st.sampled_from([32, 48, 64, 96, 128, 256, 512]),
    transposed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    fast=st.booleans(),
    std=st.sampled_from([1e-6, 0.02, 0.3, 3.0, 1000.0]),
    seed=st.integers(0, 2**31),
)
def test_it_makes_torchs_bytes(
    bits: Bits, group: int, pairs: str, rows: int, columns: int, transposed: bool, dtype: str, fast: bool, std: float,
    seed: int,
) -> None:  # fmt: skip
    both_in_form(normal(rows, columns, std, seed), bits, group, pairs, transposed, dtype, fast=fast)


@pytest.mark.parametrize(("features", "bits", "pairs"), each_two(("+avx2,+fma,+f16c", ""), QUANTISED, PAIRS))
def test_the_bytes_do_not_depend_on_the_processor(features: str, bits: Bits, pairs: str) -> None:
    """Some weights are small and some so large that their errors shrink."""
    dtype = {"bfloat16": "bfloat16", "uint8": "float16"}[pairs]
    weights = torch.cat([normal(100, 256, std) for std in (0.02, 3.0)]).to(getattr(torch, dtype))
    both(weights, layout_of(200, 256, dtype, bits=bits, pairs=pairs), fast=False, features=features)


@pytest.mark.parametrize(("bits", "pairs", "fast"), each_two(QUANTISED, PAIRS, (False, True)))
def test_unusual_groups(bits: Bits, pairs: str, fast: bool) -> None:
    """Constant, huge, tiny and denormal ones, zeros of either sign, and outliers, alone and side by side."""
    rows = 64
    layout = layout_of(rows, 256, "float32", bits=bits, pairs=pairs)
    kinds = [torch.full((rows, 256), value) for value in (0.0, -0.0, 1.0, -0.0217, 1e-30, 1e-42, -3e38)]
    kinds += [normal(rows, 256, std) for std in (1e-44, 1e-41, 1e-38, 1e-36, 1e-30, 1e-10, 1e10, 1e36)]
    outlier = normal(rows, 256)
    outlier[::3, 5] = 40.0
    signs = torch.zeros(rows, 256)
    signs[:, ::2] = -0.0
    kinds += [outlier, signs, normal(rows, 256).sign(), 1 + normal(rows, 256, 1e-7)]
    for weights in kinds:
        both(weights, layout, fast=fast)
    together = torch.cat(kinds)
    both(together, layout_of(len(together), 256, "float32", bits=bits, pairs=pairs), fast=fast)


def test_all_fp16_numbers_are_read() -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    finite = every[every.isfinite()]
    finite = torch.cat([finite, finite[: -len(finite) % 256]]).view(-1, 256)
    both(finite, layout_of(len(finite), 256, "float16", bits=8), fast=False)


@pytest.mark.parametrize(
    ("pairs", "dtype", "wrong", "fast"), each_two(PAIRS, DTYPES, (math.nan, math.inf, -math.inf), (False, True))
)
def test_weights_that_are_no_numbers_are_refused(pairs: str, dtype: str, wrong: float, fast: bool) -> None:
    layout = layout_of(70, 96, dtype, bits=4, pairs=pairs)
    for place in ((0, 0), (69, 95), (40, 33)):
        weights = normal(70, 96).to(getattr(torch, dtype))
        weights[place] = wrong
        with pytest.raises(CheckpointError, match="w has weights that are not finite numbers"):
            encode({"w": weights}, layout, np.empty(layout.record_bytes, np.uint8), fast=fast)


@pytest.mark.parametrize("pairs", PAIRS)
def test_a_range_beyond_fp32_is_refused(pairs: str) -> None:
    layout = layout_of(64, 64, "float32", bits=4, pairs=pairs)
    weights = normal(64, 64)
    weights[3, 0], weights[3, 1] = 3e38, -3e38
    with pytest.raises(CheckpointError, match="not finite"):
        encode({"w": weights}, layout, np.empty(layout.record_bytes, np.uint8))


def test_matrices_of_any_strides() -> None:
    weights = normal(512, 512).bfloat16()
    layout = layout_of(128, 128, "bfloat16", bits=4)
    for view in (
        weights[:128, :128],
        weights[::4, ::4],
        weights[:128, :128].T,
        weights[::4, :128],
        weights[7, :128].expand(128, 128),
    ):
        both(view, layout, fast=False)


def test_threads_may_quantise_at_once() -> None:
    layout = layout_of(640, 512, "bfloat16", bits=4)
    weights = [normal(640, 512, seed=seed).bfloat16() for seed in range(4)]

    def record(matrix: torch.Tensor) -> bytes:
        out = np.empty(layout.record_bytes, np.uint8)
        encode({"w": matrix}, layout, out)
        return out.tobytes()

    tasks = [Task(functools.partial(record, matrix)) for matrix in weights]
    assert [task.result() for task in tasks] == [record(matrix) for matrix in weights]


def test_powers_are_rounded_as_well_as_fp32_allows() -> None:
    x = torch.cat([torch.logspace(-1, 38, 100_000), torch.tensor([torch.finfo(torch.float32).max])])
    exact = x.double().pow(-0.3)
    found = hqq.power(x).double()
    assert ((found - exact).abs() <= 2.0**-24 * (1 + 1e-6) * 2 ** exact.log2().ceil()).all()
    assert (hqq.power(x) == exact.float()).float().mean() > 0.9999
