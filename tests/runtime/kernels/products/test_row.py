"""One row with a matrix, beside the same in fp64; and which of a model's matrices are such."""

from __future__ import annotations

import copy
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparison import convert_tiny
from torch import Tensor, nn

from moetier.runtime.kernels.products.packed import PackedKernels
from moetier.runtime.kernels.products.row import RowMatrix, RowWeight, use_row_weights
from moetier.runtime.model.load import load
from moetier.tiers.quant.codec import decode, encode, layout_for


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape))).bfloat16()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (3, 48), (8, 1024), (513, 272), (1000, 4096)])
def test_it_is_what_fp64_says(rows: int, columns: int, biased: bool) -> None:
    weight, x = numbers(rows, columns), numbers(1, 1, columns)
    bias = numbers(rows) if biased else None
    with torch.inference_mode():
        found = F.linear(x, RowWeight(weight, False), bias)
    assert found.shape == (1, 1, rows)
    product = (x.double() @ weight.double().T).bfloat16()  # a bias comes after that
    torch.testing.assert_close(found, product if bias is None else product + bias)


def test_the_matrix_may_lie_at_any_byte() -> None:
    memory = torch.zeros(1 + 2 * 5 * 32, dtype=torch.uint8)
    weight = numbers(5, 32)
    memory[1:] = weight.view(torch.uint8).flatten()
    odd = torch.frombuffer(memory.numpy(), dtype=torch.bfloat16, offset=1, count=5 * 32).view(5, 32)
    x = numbers(1, 32)
    with torch.inference_mode():
        found, expected = RowMatrix(odd, 5, 32).multiply(x), RowMatrix(weight, 5, 32).multiply(x)
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (numbers(2, 32), numbers(5, 32)),
        (numbers(0, 32), numbers(5, 32)),
        (numbers(2, 16), numbers(5, 32)),
        (numbers(1, 24), numbers(5, 24)),
        (numbers(1, 32).float(), numbers(5, 32).float()),
        (numbers(1, 32), numbers(32, 5).T),
        (numbers(1, 32).float(), numbers(5, 32)),
    ],
    ids=["two rows", "no row", "half a row twice", "24 columns", "fp32", "turned", "two types"],
)
def test_what_it_does_not_do_is_left_to_torch(x: Tensor, weight: Tensor) -> None:
    with torch.inference_mode():
        assert RowMatrix(weight, *weight.shape).multiply(x) is None
        if x.dtype == weight.dtype and x.shape[-1] == weight.shape[-1]:
            assert torch.equal(F.linear(x, RowWeight(weight, False)), F.linear(x, weight))


def quantised(rows: int, columns: int, bits: int = 4) -> tuple[RowMatrix, Tensor]:
    """A matrix, and its decoded weights."""
    layout = layout_for({"weight": ((rows, columns), "bfloat16")}, bits=bits)  # type: ignore[arg-type]
    record = np.zeros(layout.record_bytes, np.uint8)
    encode({"weight": numbers(rows, columns)}, layout, record)
    stored = torch.from_numpy(record)
    weights = decode(stored, layout, "weight", torch.empty(rows, columns, dtype=torch.float32))
    return RowMatrix(stored, rows, columns, partial(PackedKernels().product, layout, "weight")), weights


def step(matrices: list[RowMatrix], x: Tensor) -> list[Tensor]:
    """Multiply x with one matrix after the other."""
    found = [matrix.multiply(x) for matrix in matrices]
    assert all(y is not None for y in found)
    return found  # type: ignore[return-value]


@pytest.fixture
def three() -> list[RowMatrix]:
    return [quantised(80, 128)[0], RowMatrix(numbers(5, 128), 5, 128), quantised(513, 128, 8)[0]]


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
def test_quantised_ones_are_what_fp64_says(given: torch.dtype) -> None:
    matrix, weights = quantised(80, 128)
    x = numbers(1, 128).to(given)
    with torch.inference_mode():
        (found,) = step([matrix], x)
    expected = x.double() @ weights.double().T
    assert found.dtype == given
    assert float((found.double() - expected).norm() / expected.norm()) < 0.02


def test_a_matrix_may_get_another_value_or_type() -> None:
    weights = [RowWeight(numbers(5, 32), False), RowWeight(numbers(7, 32), False)]
    with torch.inference_mode():
        for value in (numbers(5, 32), numbers(5, 32) * 2, numbers(3, 32), numbers(5, 32).float()):
            x = numbers(1, 32).to(value.dtype)
            weights[0].data, weights[1].data = value, weights[1].data.to(value.dtype)
            for _ in range(2):
                x = x.clone()
                found = [F.linear(x, weight) for weight in weights]
                for y, weight in zip(found, weights, strict=True):
                    torch.testing.assert_close(y, (x.double() @ weight.data.double().T).to(x.dtype))


def test_threads_have_products_of_their_own(three: list[RowMatrix]) -> None:
    rows = [numbers(1, 128) * (1 + number) for number in range(4)]
    with torch.inference_mode():
        expected = [step(three, x) for x in rows]
    wrong = []

    def work(number: int) -> None:
        with torch.inference_mode():
            for _ in range(200):
                found = step(three, rows[number].clone())
                wrong.extend(y for y, wanted in zip(found, expected[number], strict=True) if not torch.equal(y, wanted))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_number_of_threads_changes_no_bits() -> None:
    matrices = [quantised(2064, 256)[0], RowMatrix(numbers(1030, 256), 1030, 256)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                found += [step(matrices, numbers(1, 256)) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for products in found for pair in zip(products, found[0], strict=True))


def test_gradients_are_torchs() -> None:
    weight, x = RowWeight(numbers(8, 32)), numbers(1, 32).requires_grad_()
    F.linear(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert weight.grad.shape == (8, 32)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.tied = nn.Embedding(40, 32), nn.Embedding(24, 32)
        self.linear, self.head = nn.Linear(32, 24), nn.Linear(32, 24, bias=False)
        self.norm = nn.LayerNorm(32)
        self.head.weight = self.tied.weight


def test_matrices_of_modules_are_replaced_and_tables_are_not() -> None:
    model = Parts().bfloat16()
    before = copy.deepcopy(model.state_dict())
    use_row_weights(model)
    kinds = {name: type(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    found = [name for name, kind in kinds.items() if kind is RowWeight]
    assert found == ["tied.weight", "linear.weight", "head.weight"]
    assert model.head.weight is model.tied.weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(model.tied(torch.tensor([3])), before["tied.weight"][3:4])
        x = numbers(1, 32)
        assert torch.equal(model.head(x), RowMatrix(before["tied.weight"], 24, 32).multiply(x))
    assert type(model.float().linear.weight.data) is Tensor
    assert model.linear(numbers(1, 32).float()).dtype == torch.float32


@pytest.mark.parametrize("exact", [False, True])
def test_a_quantised_models_routers_are(tinymix_4bit: Path, exact: bool) -> None:
    model, _ = load(tinymix_4bit, daemon=None, exact=exact, device="cpu")
    with model.tiers:
        kinds = {type(p) for name, p in model.named_parameters() if name.endswith(("gate.weight", "q_proj.weight"))}
        assert kinds == {nn.Parameter if exact else RowWeight}


def test_an_unquantised_ones_are_not(tmp_path: Path) -> None:
    _, directory = convert_tiny("mixtral", torch.bfloat16, tmp_path)
    model, _ = load(directory, daemon=None, device="cpu")
    with model.tiers:
        assert not any(type(parameter) is RowWeight for parameter in model.parameters())
