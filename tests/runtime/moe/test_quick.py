"""The quick way: what it takes, and what it refuses; what it computes is tested with its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from twins import BLOCK, CPU, inputs, pair

from moetier.runtime.kernels.products.packed import PackedKernels
from moetier.runtime.moe.block import RoutedTokens, TieredBlock
from moetier.runtime.moe.quick import compute_quick, forward_token, is_row_like, kernels_of


@pytest.fixture
def twin() -> Any:
    _, twin, source = pair("mixtral", torch.float32, bits=4)
    twin.tiered = TieredBlock(BLOCK, twin.tiered.layout, source, PackedKernels(), CPU)
    return twin


@pytest.mark.parametrize(
    ("other", "is_like"),
    [
        (torch.zeros(1, 8), True),
        (torch.zeros(1, 1, 8), True),
        (torch.zeros(8), True),
        (torch.zeros(2, 4), False),
        (torch.zeros(2, 8), False),
        (torch.zeros(1, 8, dtype=torch.bfloat16), False),
    ],
)
def test_a_residual_is_of_one_row_and_of_the_same_type(other: Tensor, is_like: bool) -> None:
    assert is_row_like(other, torch.zeros(1, 8)) == is_like


def test_shapes_that_do_not_fit_are_named(twin: Any) -> None:
    kernels = kernels_of(twin, twin.tiered, torch.float32)
    assert kernels is not None
    x, index, weights = inputs(ordinary(), torch.float32, tokens=5)
    with pytest.raises(ValueError, match=rf"\[4, {x.shape[1]}\].*where hidden is {x.shape[1]}"):
        next(compute_quick(kernels, twin.tiered, [RoutedTokens(x[:4], index, weights)]))


def test_what_compiled_code_cannot_compute_is_left_to_others(twin: Any) -> None:
    x, index, weights = inputs(ordinary(), torch.float32, tokens=1)
    experts = index[0].tolist()
    assert forward_token(twin, x, experts, weights.double(), None) is None
    assert forward_token(twin, x.half(), experts, weights, None) is None
    assert forward_token(twin, x, [*experts[:2], experts[0]], weights, None) is None, "an expert twice"
    assert forward_token(twin, x, [0, 1, twin.num_experts], weights, None) is None, "an expert of another device"
    handle = twin.act_fn.register_forward_hook(lambda *_: None)
    assert forward_token(twin, x, experts, weights, None) is None, "compiled code would not call the hook"
    handle.remove()
    assert forward_token(twin, x, experts, weights, None) is not None


def ordinary() -> Any:
    """The ordinary module, which still has its parameters."""
    return pair("mixtral", torch.float32, bits=4)[0]
