"""Which routers of transformers' architectures choose experts in one call, and that they choose as before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FURTHER, REQUIRED, TYPES, tiny_model
from torch import Tensor

from moetier.runtime.model.load import load
from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.moe.routers import QuickRouter, RowRouter, argument_names, use_quick_routers
from moetier.runtime.moe.snapshot import MAX_TRIALS

# types whose routers are not computed so: they have more parts, or other functions
OTHERS = {
    "afmoe", "deepseek_v4", "diffusion_gemma", "ernie4_5_moe", "ernie4_5_vl_moe", "gemma4", "hunyuan_v1_moe", "inkling",
    "inkling2", "inkling2_loop", "kolibri1", "laguna", "lfm2_moe", "muse_spark", "openai_privacy_filter",
    "phimoe", "zaya",
}  # fmt: skip
# it rounds scores to 16 bits: whether a tie shows in the trial depends on the weights, which torch 2.10 draws otherwise
BY_CHANCE = {"mistral4"}


def routers(model: Any) -> list[Any]:
    found = [module for module in model.modules() if isinstance(module, QuickRouter)]
    return [router for router in found if router.quick_router.routing(router, model.dtype) is not None]


def argued(model: Any, router: Any) -> list[Any]:
    """The arguments that a router gets beside the hidden states."""
    return [getattr(parent, name) for name in argument_names(router) for parent in parents(model, router)]


def parents(model: Any, module: Any) -> list[Any]:
    return [parent for parent in model.modules() if any(child is module for child in parent.children())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_quick_router_chooses_as_its_architecture_does(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype)
    plain = copy.deepcopy(model)
    use_quick_routers(model)
    random = torch.Generator().manual_seed(1)
    for quick in routers(model):
        (path,) = [path for path, module in model.named_modules() if module is quick]
        own, more = plain.get_submodule(path), argued(model, quick)
        with torch.inference_mode():
            same = 0
            for _ in range(8):
                x = torch.randn(1, quick.weight.shape[1], generator=random).to(dtype)
                (logits, weights, experts), wanted = quick(x, *more), own(x, *more)
                assert [value.dtype for value in (logits, weights, experts)] == [value.dtype for value in wanted]
                assert [value.shape for value in (logits, weights, experts)] == [value.shape for value in wanted]
                torch.testing.assert_close(logits, wanted[0], rtol=2e-2, atol=2e-3)
                if torch.equal(experts.sort().values, wanted[2].sort().values):
                    same += 1
                    by_expert = (found.gather(-1, order.argsort()) for found, order in ((weights, experts), wanted[1:]))
                    torch.testing.assert_close(*by_expert, rtol=3e-2, atol=1e-3)
            assert same >= 6


@pytest.mark.parametrize("model_type", sorted((REQUIRED | FURTHER) - BY_CHANCE))
def test_which_are_found(model_type: str) -> None:
    model = tiny_model(model_type, torch.bfloat16)
    use_quick_routers(model)
    assert bool(routers(model)) is (model_type not in OTHERS)


def test_scores_may_be_summed_by_group() -> None:
    """Experts of the best groups only, by their two best experts, with a correction."""
    model = tiny_model("deepseek_v3", torch.float32, num_local_experts=16, n_group=4, topk_group=2)
    plain = copy.deepcopy(model)
    use_quick_routers(model)
    quick, own = (next(m for m in part.modules() if hasattr(m, "topk_group")) for part in (model, plain))
    form = quick.quick_router.routing(quick, torch.float32).variant
    assert (form.groups, form.best_groups, form.best_of_group, form.has_correction) == (4, 2, 2, True)
    random = torch.Generator().manual_seed(2)
    for part in (quick, own):
        part.e_score_correction_bias.copy_(torch.linspace(-0.4, 0.4, 16)[torch.arange(16) * 5 % 16])
    with torch.inference_mode():
        for _ in range(200):
            x = torch.randn(1, quick.weight.shape[1], generator=random)
            (_, weights, experts), (_, others, wanted) = quick(x), own(x)
            assert experts.sort().values.tolist() == wanted.sort().values.tolist()
            torch.testing.assert_close(weights.sort().values, others.sort().values)


def test_experts_of_other_groups_may_be_better_than_negative_ones() -> None:
    """AXK-2 ranks them as 0, so it may take them, and keeps its own router. DeepSeek-V3 never takes them."""
    for kind, is_quick in (("axk2", False), ("deepseek_v3", True)):
        model = tiny_model(kind, torch.float32, num_local_experts=16, n_group=4, topk_group=2)
        plain = copy.deepcopy(model)
        use_quick_routers(model)
        quick, own = (next(m for m in part.modules() if hasattr(m, "topk_group")) for part in (model, plain))
        assert (quick.quick_router.routing(quick, torch.float32) is not None) is is_quick
        random = torch.Generator().manual_seed(2)
        for part in (quick, own):
            part.e_score_correction_bias.copy_(torch.linspace(-2, -1, 16))
        with torch.inference_mode():
            for _ in range(20):
                x = torch.randn(1, quick.weight.shape[1], generator=random)
                assert quick(x)[2].sort().values.tolist() == own(x)[2].sort().values.tolist()


def test_a_correction_that_is_replaced_counts() -> None:
    model = tiny_model("minimax_m2", torch.bfloat16)
    use_quick_routers(model)
    quick = routers(model)[0]
    x, count = torch.randn(1, quick.weight.shape[1]).bfloat16(), len(quick.weight)
    with torch.inference_mode():
        for expert in range(count):
            _, weights, experts = quick(x, 9.0 * (torch.arange(count) == expert))
            assert experts[0, 0] == expert
            assert weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_k", 2), ("norm_topk_prob", False), ("routed_scaling_factor", 0.5), ("topk_group", 1), ("num_group", 8)],
)
def test_numbers_that_are_changed_count(name: str, value: float) -> None:
    model = tiny_model("deepseek_v3", torch.float32, num_local_experts=16, n_group=4, topk_group=2)
    plain = copy.deepcopy(model)
    use_quick_routers(model)
    quick, own = (next(m for m in part.modules() if hasattr(m, "topk_group")) for part in (model, plain))
    random = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        quick(torch.randn(1, quick.weight.shape[1], generator=random))
        for part in (quick, own):
            assert getattr(part, name) != value
            setattr(part, name, value)
        assert quick.quick_router.routing(quick, torch.float32) is not None
        for _ in range(20):
            x = torch.randn(1, quick.weight.shape[1], generator=random)
            (_, weights, experts), (_, others, wanted) = quick(x), own(x)
            assert experts.sort().values.tolist() == wanted.sort().values.tolist()
            torch.testing.assert_close(weights.sort().values, others.sort().values)


def test_a_router_that_does_more_is_not_taken_for_another() -> None:
    model = tiny_model("mixtral", torch.float32)
    router: Any = model.model.layers[0].mlp.gate
    kind = type(router)

    def forward(self: Any, x: Tensor) -> Any:
        logits, weights, experts = kind.forward(self, x)
        return logits, weights * 1.01, experts

    router.__class__ = type("LoudRouter", (kind,), {"forward": forward})
    use_quick_routers(model)
    assert router not in routers(model)
    assert len(routers(model)) == len(experts_modules(model)) - 1


def test_a_router_whose_numbers_keep_changing_is_tried_no_more() -> None:
    """It keeps its own code, also with numbers that were tried."""
    model = tiny_model("qwen3_moe", torch.float32)
    use_quick_routers(model)
    router, known = routers(model)[0], dict[Any, Any]()
    quick = RowRouter(known)
    for count in range(100):
        router.count = count % MAX_TRIALS
        assert quick.routing(router, torch.float32) is not None
    for count in range(100):
        router.count = count + MAX_TRIALS
        assert quick.routing(router, torch.float32) is None
    assert len(known) == MAX_TRIALS
    router.count = 0
    assert quick.routing(router, torch.float32) is None


def test_a_type_is_tried_when_it_comes() -> None:
    model = tiny_model("qwen3_moe", torch.bfloat16)
    use_quick_routers(model)
    quick = routers(model)[0]
    model.float()
    assert quick.quick_router.routing(quick, torch.bfloat16).variant.weight_dtype == torch.bfloat16
    with torch.inference_mode():
        assert quick(torch.randn(1, quick.weight.shape[1]))[1].dtype == torch.float32


def test_gradients_are_the_routers_own() -> None:
    model = tiny_model("qwen3_moe", torch.float32)
    plain = copy.deepcopy(model)
    use_quick_routers(model)
    quick, own = (
        next(m for m in part.modules() if hasattr(m, "top_k") and hasattr(m, "weight")) for part in (model, plain)
    )
    x = torch.randn(3, quick.weight.shape[1])
    assert all(torch.equal(*pair) for pair in zip(quick(x), own(x), strict=True))
    quick(x[:1])[1].sum().backward()
    assert quick.weight.grad is not None


@pytest.mark.parametrize("exact", [False, True])
def test_a_quantised_models_routers_are_such(tinymix_4bit: Path, exact: bool) -> None:
    model, _ = load(tinymix_4bit, daemon=None, exact=exact, device="cpu")
    with model.tiers:
        assert bool(routers(model)) is not exact
