"""Check whether a token's logits have the same bits in every company.

That is: they depend on the tokens up to it only, neither on the chunks in which a prompt is computed, nor on other
sequences, cached keys and values, threads or memory. Compiled code computes attention, matrices, routers and experts so
(``runtime.kernels``). Other parts of a model are torch's, whose sums depend on how many tokens are computed together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetier.tiers.manifest import Manifest

_LINEAR, _MAMBA = "linear attention", "Mamba layers"
_SPARSE, _OWN = "attention to chosen positions", "an attention of its own"
# Part of a model that torch computes, by model type. The other types were compared as tiny random models
# (tests/runtime/model/test_same_bits.py).
VARYING: Mapping[str, str] = {
    **dict.fromkeys(("bailing_hybrid", "kimi_linear", "minimax", "qwen3_5_moe", "qwen3_next", "qwen4_exp"), _LINEAR),
    **dict.fromkeys(("granitemoehybrid", "jamba", "nemotron_h"), _MAMBA),
    **dict.fromkeys(("axk2", "deepseek_v32", "deepseek_v4", "dots3_note", "glm5_next", "glm_moe_dsa"), _SPARSE),
    **dict.fromkeys(("hy_v4", "hy_v4_vl", "minimax_m3_vl", "mistral_large4"), _SPARSE),
    **dict.fromkeys(("diffusion_gemma", "gemma4", "inkling", "inkling2", "inkling2_loop"), _OWN),
    **dict.fromkeys(("lara_mini", "mimo_v2_flash", "openai_privacy_filter", "qwen3_omni_moe", "unlimited_ocr"), _OWN),
}


def varying_part(config: Mapping[str, Any], manifest: Manifest, *, dtype: str | None = None) -> str | None:
    """Return the part of a model that computes a token with other bits in other company; None if none does.

    Args:
        config: the model's config.json.
        manifest: the manifest of its store.
        dtype: type of the trunk, such as "bfloat16"; None: as config.json says.
    """
    projections = [projection for layout in manifest.layouts.values() for projection in layout.projections]
    if all(projection.bits == 16 for projection in projections):
        return "all parts, because 16-bit experts are computed as by transformers"
    dtype = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype != "bfloat16":
        return f"the trunk's products in {dtype}"
    return VARYING.get(str(config.get("model_type")).removesuffix("_text"))


def varying_part_here(model: Any) -> str | None:
    """Return ``varying_part`` of a loaded model, for the options and the processor with which it is computed."""
    from moetier.runtime.kernels.jit.processor import refusal
    from moetier.runtime.kernels.products.row import RowWeight, prefers_torch

    tiers = model.tiers
    if reason := refusal():
        return f"all parts, because there is no compiled code here: {reason}"
    if not any(map(tiers.kernels.packs, tiers.manifest.layouts.values())):
        return "all parts, which are computed as by transformers"
    part = varying_part(model.config.to_dict(), tiers.manifest, dtype=str(model.dtype).removeprefix("torch."))
    if part is None and prefers_torch() and any(type(p) is RowWeight and not p.same_bits for p in model.parameters()):
        return "products with 16-bit matrices, which torch computes faster with AMX (--same-bits avoids it)"
    return part


def bits_of(part: str | None) -> str:
    """Return what to say of a model's logits by what ``varying_part`` has returned."""
    return "the same bits in every company" if part is None else f"last bits depend on chunks and company: {part}"
