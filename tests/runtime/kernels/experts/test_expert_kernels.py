"""Experts in compiled code: every activation, biases, group sizes and types, against float64."""

from __future__ import annotations

import math
from array import array
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import tiny_model
from coded_records import coded, projection
from torch import Tensor

from moetier.runtime.kernels.experts.expert_code import FUNCTIONS, Activation
from moetier.runtime.kernels.experts.expert_kernels import ExpertKernels
from moetier.runtime.kernels.experts.expert_products import PIECE
from moetier.runtime.kernels.jit.processor import Processor
from moetier.runtime.moe.activation import activation_of
from moetier.runtime.moe.experts import experts_modules
from moetier.tiers.layout import Bias, RecordLayout
from moetier.tiers.quant.codec import decode, encode, layout_for, sections

HIDDEN, INNER, EXPERTS = 64, 128, 5
TYPES = [torch.bfloat16, torch.float32]


def records_of(activation: Activation, *, bias: bool = False, **form: Any) -> tuple[RecordLayout, list[Tensor]]:
    first = "gate_up_proj" if activation.gated else "up_proj"
    shapes: dict[str, tuple[int, ...]] = {
        first: ((2 if activation.gated else 1) * INNER, HIDDEN),
        "down_proj": (HIDDEN, INNER),
    }
    if bias:
        shapes |= {f"{name}_bias": shape[:1] for name, shape in shapes.items()}
    layout = layout_for({name: (shape, "bfloat16") for name, shape in shapes.items()}, **{"bits": 4} | form)
    random, records = torch.Generator().manual_seed(0), []
    for _ in range(EXPERTS):
        record = np.zeros(layout.record_bytes, np.uint8)
        encode({name: torch.randn(shape, generator=random) * 0.3 for name, shape in shapes.items()}, layout, record)
        records.append(torch.from_numpy(record))
    return layout, records


def matrix(record: Tensor, layout: RecordLayout, name: str) -> Tensor:
    p = next(p for p in layout.projections if p.name == name)
    return decode(record, layout, name, torch.empty(p.shape, dtype=torch.float32)).double()


def activated(activation: Activation, x: Tensor) -> Tensor:
    """The definition, written out."""
    gate, up = x, torch.ones_like(x)
    if activation.gated:
        gate, up = (x[..., ::2], x[..., 1::2]) if activation.interleaved else x.chunk(2, -1)
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit) + activation.shift
    functions = {
        "silu": lambda: gate * torch.sigmoid(activation.alpha * gate),
        "gelu": lambda: F.gelu(gate),
        "gelu_tanh": lambda: F.gelu(gate, approximate="tanh"),
        "relu2": lambda: F.relu(gate).square(),
    }
    return functions[activation.function]() * up


def expected(activation: Activation, layout: RecordLayout, record: Tensor, x: Tensor, *, bias: bool) -> Tensor:
    first = "gate_up_proj" if activation.gated else "up_proj"
    parts = sections(record, layout) if bias else {}
    inner = x.double() @ matrix(record, layout, first).T + (parts[f"{first}_bias"].double() if bias else 0)
    outer = activated(activation, inner) @ matrix(record, layout, "down_proj").T
    return outer + (parts["down_proj_bias"].double() if bias else 0)


def added(kernels: ExpertKernels, outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sums of outputs [tokens * top_k, hidden], those of the first token first."""
    tokens, top_k = weights.shape
    rows, bounds = torch.arange(tokens * top_k), top_k * torch.arange(tokens + 1)
    sums = torch.full((tokens, HIDDEN), torch.nan, dtype=outputs.dtype)
    kernels.add_up(outputs, weights.reshape(-1), rows, bounds, sums)
    return sums


def computed(kernels: ExpertKernels, records: list[Tensor], x: Tensor, rows: list[int]) -> Tensor:
    """``rows[i]`` rows of x for the i-th record."""
    jobs, first = array("q"), 0
    for record, count in zip(records, rows, strict=True):
        jobs.extend((record.data_ptr(), first, count))
        first += count
    outputs = torch.zeros(first, HIDDEN, dtype=x.dtype)
    kernels.compute(x, jobs, array("q", range(first)), outputs)
    return outputs


def assert_near(found: Tensor, wanted: Tensor, tolerance: float = 0.03) -> None:
    assert float((found.double() - wanted).norm() / wanted.norm()) < tolerance


WAYS = [
    *(Activation(function) for function in FUNCTIONS),
    *(Activation(function, gated=False) for function in FUNCTIONS),
    Activation("silu", interleaved=True, alpha=1.702, limit=1.5, shift=1.0),
    Activation("silu", limit=0.5),
    Activation("gelu_tanh", interleaved=True),
]


@pytest.mark.parametrize(
    ("activation", "bias"),
    [  # with biases or without, in turn; the rest is slow
        pytest.param(activation, bias, marks=[pytest.mark.slow] * (bias != (number % 2 == 0)))
        for number, activation in enumerate(WAYS)
        for bias in (False, True)
    ],
    ids=str,
)
def test_every_activation(activation: Activation, bias: bool) -> None:
    layout, records = records_of(activation, bias=bias)
    kernels = ExpertKernels(layout, activation, torch.float32, EXPERTS)
    x = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(1))
    found = computed(kernels, records, x, [1] * EXPERTS)
    for expert, record in enumerate(records):
        wanted = expected(activation, layout, record, x[expert : expert + 1], bias=bias)
        assert_near(found[expert : expert + 1], wanted)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "form",
    [{"group": 16, "pairs": "uint8"}, {"group": 64, "pairs": "bfloat16"}, {"bits": 8}, {"bits": 3}, {"bits": 2}],
    ids=str,
)
def test_every_coding_and_unequal_numbers_of_rows(form: dict[str, Any], dtype: torch.dtype) -> None:
    activation, rows = Activation(), [3, 1, 2 * PIECE + 5, 4, PIECE]
    layout, records = records_of(activation, **form)
    kernels = ExpertKernels(layout, activation, dtype, EXPERTS)
    x = torch.randn(sum(rows), HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = computed(kernels, records, x, rows)
    first = 0
    for record, count in zip(records, rows, strict=True):
        part = slice(first, first + count)
        assert_near(found[part], expected(activation, layout, record, x[part], bias=False))
        assert torch.equal(computed(kernels, [record], x[part], [count]), found[part])
        first += count


CODED: list[tuple[str, dict[str, Any]]] = [
    ("e2m1", {"group": 32, "scales": "e8m0"}),
    ("e2m1", {"group": 16, "scales": "e4m3", "globals": "divide"}),
    ("int4", {"group": 32, "scales": "bfloat16"}),
    ("e4m3", {"group": 64, "block_rows": 64, "scales": "float32"}),
]


@pytest.mark.parametrize(
    ("activation", "number"),
    [  # of gates and ups in turn, FP4 and INT4 as models have them; the rest is slow
        pytest.param(WAYS[way], number, marks=[pytest.mark.slow] * (way == 4 or (way == 8 and number % 2)))
        for way in (0, 4, 8)
        for number in range(len(CODED))
    ],
    ids=str,
)
def test_records_in_the_coding_of_a_checkpoint(activation: Activation, number: int) -> None:
    """Gates and ups are rows of one part, as gpt-oss has them, or of two parts. With the slow cases, every coding and
    activation is there with biases and without."""
    (coding, fields), bias = CODED[number], (number + WAYS.index(activation) // 4) % 2 == 0
    first, rows = ("gate_up_proj", 2 * INNER) if activation.gated else ("up_proj", INNER)
    parts = 2 if activation.gated and not activation.interleaved else 1
    up = projection(coding, rows, HIDDEN, first, parts=parts, **fields)
    down = projection(coding, HIDDEN, INNER, "down_proj", **fields)
    biases = tuple(Bias(f"{p.name}_bias", p.rows) for p in (up, down)) if bias else ()
    made = [coded(up, down, biases=biases, seed=seed) for seed in range(EXPERTS)]
    layout, records = made[0][0], [record for _, record in made]
    assert ExpertKernels.can_compile(layout, activation)
    kernels = ExpertKernels(layout, activation, torch.float32, EXPERTS)
    counts = [1, 3, 1, 6, 1]
    x = torch.randn(sum(counts), HIDDEN, generator=torch.Generator().manual_seed(1))
    found = torch.split(computed(kernels, records, x, counts), counts)
    for record, own, rows_of_x in zip(records, found, torch.split(x, counts), strict=True):
        assert_near(own, expected(activation, layout, record, rows_of_x, bias=bias))
        assert torch.equal(computed(kernels, [record], rows_of_x[:1], [1]), own[:1])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_one_row_for_all_experts_and_the_weighted_sum(dtype: torch.dtype) -> None:
    activation = Activation()
    layout, records = records_of(activation)
    kernels = ExpertKernels(layout, activation, dtype, EXPERTS)
    random = torch.Generator().manual_seed(3)
    x, weights = torch.randn(1, HIDDEN, generator=random).to(dtype), torch.rand(1, EXPERTS, generator=random)
    together = computed(kernels, records, x, [1] * EXPERTS)
    assert torch.equal(together, computed(kernels, records, x.expand(EXPERTS, -1).contiguous(), [1] * EXPERTS))
    found = added(kernels, together, weights)
    assert found.dtype == dtype
    assert_near(found, weights.double() @ together.double(), 1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("activation", [WAYS[0], WAYS[1], WAYS[8]], ids=str)
def test_the_same_bits_on_every_processor(activation: Activation) -> None:
    layout, records = records_of(activation, bias=True)
    x = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(5))
    weights, found = torch.rand(2, 2, generator=torch.Generator().manual_seed(6)), []
    for processor in (None, Processor("+avx2,+fma"), Processor("")):
        kernels = ExpertKernels(layout, activation, torch.float32, EXPERTS, processor)
        found.append(added(kernels, computed(kernels, records[:1], x, [4]), weights))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_stay_in_their_rows(bad: float) -> None:
    activation = Activation("silu", limit=7.0, shift=1.0)
    layout, records = records_of(activation)
    kernels = ExpertKernels(layout, activation, torch.float32, EXPERTS)
    x = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(4))
    clean = computed(kernels, records[:1], x, [2])
    x[0, 3] = bad
    found = computed(kernels, records[:1], x, [2])
    assert not found[0].isfinite().any()
    assert torch.equal(found[1], clean[1])


@pytest.mark.parametrize("limit", [0.5, 12.0, 100.0])
def test_a_limit_is_found_whatever_its_size(limit: float) -> None:
    module = next(iter(experts_modules(tiny_model("gpt_oss", torch.float32)).values()))
    module.limit = limit
    assert activation_of(module) == Activation("silu", interleaved=True, alpha=module.alpha, limit=limit, shift=1.0)


def test_an_unknown_limit_is_not_overlooked() -> None:
    module = next(iter(experts_modules(tiny_model("mixtral", torch.float32)).values()))
    plain = activation_of(module)
    assert plain == Activation()
    apply_gate = type(module)._apply_gate
    module._apply_gate = lambda x: apply_gate(module, x.clamp(max=200.0))
    assert activation_of(module) is None
    module._apply_gate = lambda x: 1 / 0
    assert activation_of(module) is None


def test_what_does_not_fit_is_refused() -> None:
    layout, _ = records_of(Activation())
    assert ExpertKernels.can_compile(layout, Activation())
    assert not ExpertKernels.can_compile(layout, Activation(gated=False))
    down = layout.projections[1]
    narrow = replace(layout, projections=(layout.projections[0], replace(down, rows=down.rows - 16)))
    assert not ExpertKernels.can_compile(narrow, Activation())
    biased, _ = records_of(Activation(), bias=True)
    assert ExpertKernels.can_compile(biased, Activation())
    assert not ExpertKernels.can_compile(replace(biased, biases=biased.biases[:1]), Activation())
    ungated, _ = records_of(Activation("relu2", gated=False))
    assert ExpertKernels.can_compile(ungated, Activation("relu2", gated=False))
    assert not ExpertKernels.can_compile(ungated, Activation("relu2", interleaved=True, gated=False))
