"""A router's logits, top-k and weights in one call, beside torch's."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moetier.runtime.kernels.layer.routing import CompiledRouter, RouterVariant

BF16, FP32 = torch.bfloat16, torch.float32


def numbers(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape))).to(dtype)


def route(x: Tensor, weight: Tensor, bias: Tensor | None = None, **form: object) -> tuple[Tensor, Tensor, Tensor]:
    plain = {"top_k": 2, "normalised": False, "factor": 1.0, "logit_dtype": weight.dtype, "weight_dtype": FP32}
    with torch.inference_mode():
        found = CompiledRouter(RouterVariant(**plain | form)).compute(x, weight, bias)  # type: ignore[arg-type]
    assert found is not None
    return found


WAYS = [*itertools.product([BF16, FP32], [BF16, FP32], [False, True], [False, True])]  # each is compiled anew
SIZES = [(1, 1), (16, 16), (60, 4), (128, 8), (513, 20)]


@pytest.mark.parametrize(
    ("experts", "top_k", "given", "kept", "biased", "normalised"),
    [
        *((8, 2, *way) for way in WAYS),
        *(  # two ways for each of the other sizes; the rest is slow
            pytest.param(*size, *way, marks=[pytest.mark.slow] * (place not in (number, len(WAYS) - 1 - number)))
            for number, size in enumerate(SIZES)
            for place, way in enumerate(WAYS)
        ),
    ],
)
def test_it_is_what_fp64_says(
    experts: int, top_k: int, given: torch.dtype, kept: torch.dtype, biased: bool, normalised: bool
) -> None:
    weight, x = numbers(experts, 64, dtype=kept) / 4, numbers(1, 1, 64, dtype=given)
    bias = numbers(experts, dtype=kept) if biased else None
    logits, weights, chosen = route(x, weight, bias, top_k=top_k, normalised=normalised, factor=2.5)
    product = (x.double() @ weight.double().T).view(1, -1).to(kept)
    torch.testing.assert_close(logits, product if bias is None else product + bias, rtol=1e-2, atol=1e-3)
    exact = logits.double()
    assert sorted(chosen[0].tolist()) == sorted(chosen[0].unique().tolist())
    assert torch.equal(exact.gather(-1, chosen), exact.topk(top_k).values)
    shares = exact.softmax(-1).gather(-1, chosen)
    wanted = 2.5 * (shares / shares.sum(-1, keepdim=True) if normalised else shares)
    torch.testing.assert_close(weights.double(), wanted, rtol=1e-5, atol=1e-9)


def test_of_equal_logits_the_first_are_chosen() -> None:
    weight = torch.zeros(40, 16)
    weight[7], weight[30] = 1.0, 1.0
    _, weights, chosen = route(torch.ones(1, 16), weight, top_k=4)
    assert chosen.tolist() == [[7, 30, 0, 1]]
    assert weights[0, 0] == weights[0, 1] > weights[0, 2] == weights[0, 3]


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_choose_different_experts(bad: float) -> None:
    _, _, chosen = route(torch.full((1, 16), bad), numbers(9, 16, dtype=FP32), top_k=9)
    assert sorted(chosen[0].tolist()) == list(range(9))


def test_the_types_are_the_routers() -> None:
    logits, weights, _ = route(numbers(1, 64), numbers(8, 64), logit_dtype=FP32, weight_dtype=BF16)
    assert (logits.dtype, weights.dtype) == (FP32, BF16)


@pytest.mark.parametrize("given", [FP32, BF16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_sigmoid": True, "normalised": True},
        {"groups": 4, "best_groups": 2, "best_of_group": 2, "is_sigmoid": True},
    ],
)
def test_rows_do_not_depend_on_one_another(options: dict[str, Any], given: torch.dtype) -> None:
    x, weight, bias = numbers(37, 64, dtype=given), numbers(32, 64), numbers(32)
    few = route(x, weight[:2], top_k=1)
    assert torch.equal(few[2][:1], route(x[:1], weight[:2], top_k=1)[2])
    assert all(torch.equal(all_[9:10], one) for all_, one in zip(few, route(x[9:10], weight[:2], top_k=1), strict=True))
    together = route(x.view(1, 37, 64), weight, bias, top_k=5, **options)
    for i, row in enumerate(x):
        for one, all_ in zip(route(row[None], weight, bias, top_k=5, **options), together, strict=True):
            assert torch.equal(one[0], all_[i])


def test_the_number_of_threads_changes_no_bits() -> None:
    weight, x, before, found = numbers(512, 512), numbers(1, 512), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(route(x, weight, top_k=8))
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(one, found[0], strict=True))


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (numbers(1, 24), numbers(5, 24), None),
        (numbers(1, 64)[:, ::2], numbers(5, 32), None),
        (numbers(1, 32).half(), numbers(5, 32), None),
        (numbers(1, 32), numbers(32, 5).T, None),
        (numbers(1, 32), numbers(5, 32), numbers(5).float()),
    ],
    ids=["24 columns", "with gaps", "fp16", "turned", "a bias of another type"],
)
def test_what_it_does_not_do(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    with torch.inference_mode():
        assert CompiledRouter(RouterVariant(2, False, 1.0, BF16, FP32)).compute(x, weight, bias) is None


def test_with_gradients_torch_computes() -> None:
    router = CompiledRouter(RouterVariant(2, False, 1.0, BF16, FP32))
    assert router.compute(numbers(1, 32), numbers(5, 32), None) is None
