"""One row with a matrix of fp32, which scores experts for predictions, beside the same in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moetier.runtime.kernels.products.gemv import Scores


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape))).bfloat16()


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (8, 1024), (513, 272)])
def test_scores_are_what_fp64_says(rows: int, columns: int, given: torch.dtype) -> None:
    weight, x = numbers(rows, columns).float() * 1.001, numbers(1, 1, columns).to(given)
    scores = Scores(weight)
    for _ in range(2):  # its numbers may change in place
        expected = (weight.double() @ x.double().flatten()).float()
        torch.testing.assert_close(torch.tensor(scores.compute(x)), expected, rtol=1e-5, atol=1e-4)
        weight[0] += 1.0


@pytest.mark.parametrize(
    "x",
    [numbers(2, 32), numbers(1, 48), numbers(1, 64)[:, ::2], numbers(1, 32).half()],
    ids=["two rows", "48 columns", "with gaps", "fp16"],
)
def test_other_scores_are_left_to_torch(x: Tensor) -> None:
    assert Scores(numbers(8, 32).float()).compute(x) is None
