"""One row with a matrix of bf16, beside the same in fp64; and which of a model's matrices are multiplied so."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comparison import convert_tiny
from torch import Tensor, nn

from moetier.runtime.kernels.row import RowWeight, Scores, linear_row, use_row_weights
from moetier.runtime.model.load import load


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape))).bfloat16()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (3, 48), (8, 1024), (513, 272), (1000, 4096)])
def test_it_is_what_fp64_says(rows: int, columns: int, biased: bool) -> None:
    weight, x = numbers(rows, columns), numbers(1, 1, columns)
    bias = numbers(rows) if biased else None
    with torch.inference_mode():
        found = linear_row(x, weight, bias)
    assert found is not None
    assert found.shape == (1, 1, rows)
    product = (x.double() @ weight.double().T).bfloat16()  # a bias comes after that
    torch.testing.assert_close(found, product if bias is None else product + bias)


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (8, 1024), (513, 272)])
def test_scores_are_what_fp64_says(rows: int, columns: int, given: torch.dtype) -> None:
    weight, x = numbers(rows, columns).float() * 1.001, numbers(1, 1, columns).to(given)
    scores = Scores(weight)
    for _ in range(2):  # its numbers may change in place
        expected = (weight.double() @ x.double().flatten()).float()
        torch.testing.assert_close(torch.tensor(scores.of(x)), expected, rtol=1e-5, atol=1e-4)
        weight[0] += 1.0


@pytest.mark.parametrize(
    "x",
    [numbers(2, 32), numbers(1, 48), numbers(1, 64)[:, ::2], numbers(1, 32).half()],
    ids=["two rows", "48 columns", "with gaps", "fp16"],
)
def test_other_scores_are_left_to_torch(x: Tensor) -> None:
    assert Scores(numbers(8, 32).float()).of(x) is None


def test_the_matrix_may_lie_at_any_byte() -> None:
    memory = torch.zeros(1 + 2 * 5 * 32, dtype=torch.uint8)
    weight = numbers(5, 32)
    memory[1:] = weight.view(torch.uint8).flatten()
    odd = torch.frombuffer(memory.numpy(), dtype=torch.bfloat16, offset=1, count=5 * 32).view(5, 32)
    x = numbers(1, 32)
    with torch.inference_mode():
        found, expected = linear_row(x, odd), linear_row(x, weight)
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
        assert linear_row(x, weight) is None
        if x.dtype == weight.dtype and x.shape[-1] == weight.shape[-1]:
            assert torch.equal(F.linear(x, RowWeight(weight, False)), F.linear(x, weight))


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
        assert torch.equal(model.head(x), linear_row(x, before["tied.weight"]))
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
