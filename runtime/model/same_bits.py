"""Check whether a token's logits have the same bits in every company.

That is: they depend on the tokens up to it only, neither on the chunks in which a prompt is computed, nor on other
sequences, cached keys and values, threads or memory. Compiled code computes attention, matrices, routers and experts so
(``runtime.kernels``). Other parts of a model are torch's, whose sums depend on how many tokens are computed together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from moetier.tiers.manifest import Manifest


class Apart(NamedTuple):
    """How far the logits of a prompt's tokens are apart between chunks of 1, 7, 33 and 150 tokens."""

    largest: float  # difference of a logit
    share: float  # of the tokens: those that have a logit that differs

    def __str__(self) -> str:
        return f"{self.share:.0%}, by up to {self.largest:.2g}"


class Varying(NamedTuple):
    """The part of a model that torch computes, and how far a tiny model's logits are apart; None: not measured."""

    part: str
    moetier: Apart | None = None
    transformers: Apart | None = None  # plain transformers, with the same weights

    def __str__(self) -> str:
        if self.moetier is None:
            return self.part
        return (
            f"{self.part} (tokens of a tiny model whose logits differ between chunks: {self.moetier}; in plain "
            f"transformers: {self.transformers})"
        )


WITH_AMX = "torch computes prompts' attention and 16-bit matrices with AMX (--same-bits avoids it)"
_LINEAR, _MAMBA = "linear attention", "Mamba layers"
_SPARSE, _OWN = "attention to chosen positions", "an attention of its own"
# By model type, as tests/measurements/same_bits.py has measured it. Most logits are below 4. A last bit may send a
# token to another expert, which moves logits by 1 or 2. Differences of 3 and more are no last bits: transformers can't
# continue such a model in chunks, and the engine computes its prompts in one; or the tiny model had two heads of an
# index, so that many scores were exactly 0, and any of these positions was chosen. The other types were compared as
# tiny random models (tests/runtime/model/test_same_bits.py).
VARYING: Mapping[str, Varying] = {
    "axk2": Varying(_SPARSE, Apart(5.3, 0.92), Apart(5.3, 0.92)),
    "bailing_hybrid": Varying(_LINEAR, Apart(1.4, 0.16), Apart(1.2, 0.28)),
    "deepseek_v32": Varying(_SPARSE, Apart(6.3, 0.92), Apart(6.1, 0.93)),
    "deepseek_v4": Varying(_SPARSE, Apart(0.8, 0.3), Apart(0.84, 0.44)),
    "diffusion_gemma": Varying(_OWN),
    "dots3_note": Varying(_SPARSE, Apart(5.9, 0.94), Apart(5.9, 0.94)),
    "gemma4": Varying(_OWN, Apart(1.0, 0.99), Apart(1.4, 0.99)),
    "glm5_next": Varying(_SPARSE, Apart(3.7, 0.7), Apart(3.7, 0.7)),
    "glm_moe_dsa": Varying(_SPARSE, Apart(5.7, 0.93), Apart(5.7, 0.93)),
    "granitemoehybrid": Varying(_MAMBA, Apart(0.89, 0.99), Apart(0.87, 0.99)),
    "hy_v4": Varying(_SPARSE, Apart(5.2, 1.0), Apart(5.2, 1.0)),
    "hy_v4_vl": Varying(_SPARSE, Apart(5.8, 1.0), Apart(5.7, 1.0)),
    "inkling": Varying(_OWN, Apart(0.09, 0.99), Apart(0.074, 0.99)),
    "inkling2": Varying(_OWN, Apart(0.0, 0.0), Apart(0.017, 0.5)),
    "inkling2_loop": Varying(_OWN, Apart(0.0, 0.0), Apart(0.017, 0.5)),
    "jamba": Varying(_MAMBA, Apart(6.0, 0.99), Apart(6.0, 0.99)),
    "kimi_linear": Varying(_LINEAR, Apart(1.4, 0.68), Apart(1.5, 0.68)),
    "lara_mini": Varying(_OWN, Apart(0.37, 0.6), Apart(0.48, 0.91)),
    "mimo_v2_flash": Varying(_OWN, Apart(0.047, 0.05), Apart(0.035, 0.16)),
    "minimax": Varying(_LINEAR, Apart(4.1, 1.0), Apart(4.1, 1.0)),
    "minimax_m3_vl": Varying(_SPARSE, Apart(1.3, 0.99), Apart(1.8, 0.99)),
    "mistral_large4": Varying(_SPARSE, Apart(5.8, 0.93), Apart(5.7, 0.93)),
    "nemotron_h": Varying(_MAMBA, Apart(0.98, 0.99), Apart(0.98, 0.99)),
    "openai_privacy_filter": Varying(_OWN),
    "qwen3_5_moe": Varying(_LINEAR, Apart(2.1, 0.28), Apart(0.79, 0.66)),
    "qwen3_next": Varying(_LINEAR, Apart(0.15, 0.09), Apart(0.99, 0.6)),
    "qwen3_omni_moe": Varying(_OWN),
    "qwen4_exp": Varying(_LINEAR, Apart(0.32, 0.99), Apart(0.29, 0.71)),
    "unlimited_ocr": Varying(_OWN, Apart(5.6, 0.99), Apart(5.6, 0.99)),
}


def varying_part(config: Mapping[str, Any], manifest: Manifest, *, dtype: str | None = None) -> str | None:
    """Return the part of a model that computes a token with other bits in other company; None if none does.

    With the part comes what was measured of it.

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
    varying = VARYING.get(str(config.get("model_type")).removesuffix("_text"))
    return None if varying is None else str(varying)


def varying_part_here(model: Any) -> str | None:
    """Return ``varying_part`` of a loaded model, for the options and the processor with which it is computed."""
    from moetier.runtime.kernels.jit.processor import refusal
    from moetier.runtime.kernels.products.row import prefers_torch

    tiers = model.tiers
    if reason := refusal():
        return f"all parts, because there is no compiled code here: {reason}"
    if not any(map(tiers.kernels.packs, tiers.manifest.layouts.values())):
        return "all parts, which are computed as by transformers"
    part = varying_part(model.config.to_dict(), tiers.manifest, dtype=str(model.dtype).removeprefix("torch."))
    flags = (getattr(owner, "same_bits", True) for owner in (*model.parameters(), *model.modules()))
    if part is None and prefers_torch() and not all(flags):
        return WITH_AMX
    return part


def varying_part_by_default(config: Mapping[str, Any], manifest: Manifest) -> str | None:
    """Return ``varying_part`` with default options; WITH_AMX if that is None and torch is used on this processor."""
    from moetier.runtime.kernels.products.row import prefers_torch

    return varying_part(config, manifest) or (WITH_AMX if prefers_torch() else None)


def bits_of(part: str | None) -> str:
    """Return what to say of a model's logits by what ``varying_part`` has returned."""
    if part is None:
        return "the same bits, alone and beside other requests"
    return f"text may vary slightly when requests run together: {part}"
