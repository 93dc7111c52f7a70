"""RMS norms in one pass, beside what architectures of transformers compute; and which of a model's norms are such."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRMSNormGated
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from moetier.runtime.kernels.layer.norm import QuickNorm, Scale, rms_norm, use_quick_norms
from moetier.runtime.model.load import load

KINDS = {Scale.ROUNDED: Qwen3MoeRMSNorm, Scale.PLAIN: GptOssRMSNorm, Scale.BEYOND_ONE: Gemma3RMSNorm}


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape))).to(dtype)


def norm_of(kind: Any, width: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    module = kind(width, eps=1e-5)
    module.weight.data = numbers(width, dtype=dtype)
    return module.to(dtype)


@pytest.mark.parametrize("scale", Scale)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 16), (1, 1, 2048), (1, 3, 32, 128), (0, 64)])
def test_it_is_what_the_architecture_computes(scale: Scale, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    module, x = norm_of(KINDS[scale], shape[-1], dtype), numbers(*shape, dtype=dtype)
    with torch.inference_mode():
        found, wanted = rms_norm(x, module.weight, 1e-5, scale), module(x)
    assert found is not None
    # the order of a sum is another: now and then a number of bf16 is rounded to its neighbour
    torch.testing.assert_close(found, wanted, rtol=2**-7 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)
    if dtype is torch.bfloat16 and x.numel():
        assert (found == wanted).float().mean() > 0.99


def test_a_row_depends_on_nothing_but_itself() -> None:
    x, weight = numbers(7, 256), numbers(256)
    alone = [rms_norm(row[None], weight, 1e-6, Scale.ROUNDED) for row in x]
    together = rms_norm(x, weight, 1e-6, Scale.ROUNDED)
    assert together is not None
    assert torch.equal(together, torch.cat([row for row in alone if row is not None]))


@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", Scale)
def test_a_trial_finds_how_a_norm_multiplies(scale: Scale, loaded: torch.dtype) -> None:
    model = nn.ModuleList([norm_of(KINDS[scale], 512, loaded)])
    x = numbers(3, 512, dtype=loaded)
    with torch.inference_mode():
        before = model[0](x)
        use_quick_norms(model)
        after = model[0](x)
    found: Any = model[0]
    assert isinstance(found, QuickNorm)
    assert found.quick_scale is scale
    assert type(found).__name__ == KINDS[scale].__name__
    if loaded is torch.bfloat16:
        assert (before == after).float().mean() > 0.99


class LoudRMSNorm(Qwen3MoeRMSNorm):  # type: ignore[misc]
    """One that is not what its name says."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * 1.05  # type: ignore[no-any-return]


class WaryRMSNorm(Qwen3MoeRMSNorm):  # type: ignore[misc]
    """One that refuses what it is tried with."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        raise AssertionError(hidden_states.shape)


@pytest.mark.parametrize(
    "module",
    [
        norm_of(LoudRMSNorm, 64),
        norm_of(Qwen3MoeRMSNorm, 24),
        norm_of(Qwen3MoeRMSNorm, 64, torch.float16),
        norm_of(Qwen3NextRMSNormGated, 64),
        norm_of(KimiLinearRMSNormGated, 64),
        norm_of(functools.partial(GraniteMoeHybridRMSNormGated, group_size=64), 64),
        norm_of(WaryRMSNorm, 64),
        nn.LayerNorm(64),
    ],
    ids=["another", "24 columns", "fp16", "a gate", "no gate is None", "a gate or none", "refuses", "no RMS norm"],
)
def test_others_stay_as_they_are(module: nn.Module) -> None:
    kind = type(module)
    use_quick_norms(nn.ModuleList([module]))
    assert type(module) is kind


def test_what_it_does_not_do_is_the_modules() -> None:
    module = norm_of(Qwen3MoeRMSNorm, 64)
    plain = copy.deepcopy(module)
    use_quick_norms(nn.ModuleList([module]))
    turned = numbers(64, 3).T
    with torch.inference_mode():
        assert torch.equal(module(turned), plain(turned))
        assert torch.equal(module(numbers(2, 64).float()), plain(numbers(2, 64).float()))
    x = numbers(2, 64).requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    assert module.weight.grad is not None


@pytest.mark.parametrize("exact", [False, True])
def test_a_quantised_models_norms_are_such(tinymix_4bit: Path, exact: bool) -> None:
    model, _ = load(tinymix_4bit, daemon=None, exact=exact, device="cpu")
    with model.tiers:
        norms = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
        assert norms
        assert all(isinstance(norm, QuickNorm) is not exact for norm in norms)
