"""Which routers of transformers' architectures choose experts in one call, and that they choose as before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FURTHER, REQUIRED, tiny_model
from torch import Tensor

from moetier.runtime.model.load import load
from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.moe.routers import QuickRouter, use_quick_routers


def routers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, QuickRouter)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", sorted(REQUIRED | FURTHER))
def test_a_quick_router_chooses_as_its_architecture_does(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype)
    plain = copy.deepcopy(model)
    use_quick_routers(model)
    random = torch.Generator().manual_seed(1)
    for quick in routers(model):
        (path,) = [path for path, module in model.named_modules() if module is quick]
        own = plain.get_submodule(path)
        with torch.inference_mode():
            for _ in range(8):
                x = torch.randn(1, quick.weight.shape[1], generator=random).to(dtype)
                (logits, weights, experts), wanted = quick(x), own(x)
                assert [value.dtype for value in (logits, weights, experts)] == [value.dtype for value in wanted]
                assert [value.shape for value in (logits, weights, experts)] == [value.shape for value in wanted]
                torch.testing.assert_close(logits, wanted[0], rtol=2e-2, atol=2e-3)
                assert torch.equal(logits.gather(-1, experts), logits.topk(experts.shape[-1]).values)
                if torch.equal(experts, wanted[2]):
                    torch.testing.assert_close(weights, wanted[1], rtol=3e-2, atol=1e-3)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe"])
def test_these_are_found(model_type: str) -> None:
    model = tiny_model(model_type, torch.bfloat16)
    use_quick_routers(model)
    assert len(routers(model)) == len(experts_modules(model))


@pytest.mark.parametrize("model_type", ["deepseek_v3", "minimax_m2", "phimoe"])
def test_others_stay_as_they_are(model_type: str) -> None:
    model = tiny_model(model_type, torch.bfloat16)
    use_quick_routers(model)
    assert not routers(model)


def test_a_router_that_does_more_is_not_taken_for_another() -> None:
    model = tiny_model("mixtral", torch.float32)
    router: Any = model.model.layers[0].mlp.gate
    kind = type(router)

    def forward(self: Any, x: Tensor) -> Any:
        logits, weights, experts = kind.forward(self, x)
        return logits, weights * 1.01, experts

    router.__class__ = type("LoudRouter", (kind,), {"forward": forward})
    use_quick_routers(model)
    assert type(router).__name__ == "LoudRouter"
    assert len(routers(model)) == len(experts_modules(model)) - 1


def test_prompts_and_gradients_are_the_routers_own() -> None:
    model = tiny_model("qwen3_moe", torch.float32)
    plain = copy.deepcopy(model)
    use_quick_routers(model)
    quick, own = (
        next(m for m in part.modules() if hasattr(m, "top_k") and hasattr(m, "weight")) for part in (model, plain)
    )
    x = torch.randn(3, quick.weight.shape[1])
    with torch.inference_mode():
        assert all(torch.equal(*pair) for pair in zip(quick(x), own(x), strict=True))
    quick(x[:1])[1].sum().backward()
    assert quick.weight.grad is not None


@pytest.mark.parametrize("exact", [False, True])
def test_a_quantised_models_routers_are_such(tinymix_4bit: Path, exact: bool) -> None:
    model, _ = load(tinymix_4bit, daemon=None, exact=exact, device="cpu")
    with model.tiers:
        assert bool(routers(model)) is not exact
