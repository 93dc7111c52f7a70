"""Products of many rows have the bits of products of one, on all sets of instructions that this machine has."""

from __future__ import annotations

import pytest
import torch
from instructions import FEATURES, processor_with
from torch import Tensor
from torch.nn.functional import linear

from moetier.runtime.kernels.products.gemv import W, X, Y, gemv_task
from moetier.runtime.kernels.products.matmul import matmul

TYPES = pytest.mark.parametrize(
    ("given", "kept"),
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=["bf16", "fp32", "mixed"],
)


@pytest.fixture(params=FEATURES)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let products be computed with some of this processor's instructions."""
    chosen = processor_with(request.param)
    for module in ("gemv", "matmul"):
        monkeypatch.setattr(f"moetier.runtime.kernels.products.{module}.this_processor", lambda: chosen)


def matrices(tokens: int, rows: int, columns: int, given: torch.dtype, kept: torch.dtype) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(tokens)
    x, weight = (torch.randn(count, columns, generator=random) for count in (tokens, rows))
    return x.to(given), weight.to(kept)


def one_row(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x [1, columns] with ``weight``."""
    task, y = gemv_task(weight, x.dtype), torch.empty(1, len(weight), dtype=weight.dtype)
    task.context[X], task.context[W], task.context[Y] = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    task.kernel.run(task.context, task.threads)
    return y


@TYPES
@pytest.mark.parametrize("columns", [16, 96, 2080])
@pytest.mark.parametrize(("tokens", "rows"), [(2, 1), (7, 3), (13, 150), (64, 37)])
@pytest.mark.usefixtures("processor")
def test_many_rows_have_the_bits_of_one(
    tokens: int, rows: int, columns: int, given: torch.dtype, kept: torch.dtype
) -> None:
    x, weight = matrices(tokens, rows, columns, given, kept)
    y = matmul(x, weight, kept)
    assert torch.equal(y, torch.cat([one_row(row, weight) for row in x.split(1)]))
    near = {"atol": 1e-3, "rtol": 1e-3} if kept == torch.float32 else {"atol": 0.1, "rtol": 1e-2}
    torch.testing.assert_close(y.double(), linear(x.double(), weight.double()), **near)


@TYPES
def test_blocks_and_threads_change_no_bit(given: torch.dtype, kept: torch.dtype) -> None:
    """Several blocks of rows, and several chunks of the matrix."""
    x, weight = matrices(500, 260, 2048, given, kept)
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            outputs.append(matmul(x, weight, kept))
    finally:
        torch.set_num_threads(before)
    outputs.append(torch.cat([matmul(rows, weight, kept) for rows in x.split(77)]))
    assert all(torch.equal(output, outputs[0]) for output in outputs)
