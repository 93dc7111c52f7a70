"""Memory that computing several tokens of a prompt together takes, besides their keys and values.

The sizes are those of the tensors that a layer holds at its peak. ``tests/runtime/model/test_prefill.py`` compares them
with measured peaks.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from moetier.runtime.config import DEFAULT_CONTEXT, TierConfig
from moetier.runtime.context import can_resume, context_of
from moetier.runtime.kernels.api import Kernels
from moetier.runtime.kernels.attention import SCORE_BYTES, SINKS, SLICE_BYTES
from moetier.runtime.moe.experts import experts_modules, output_bytes
from moetier.runtime.moe.grouped import quick_activation
from moetier.tiers.manifest import Manifest

LEAST = 32  # least number of tokens that are computed together; a smaller chunk is a multiple of it
STATES = 4  # tensors [tokens, hidden] of a layer: residual, normed, output and their sum; some in fp32 too if not quick
COPIES = 3  # times that outputs of linear modules are held: as they are, rotated or activated, and multiplied
OF_STATES = 12  # the same where a layer has another state than keys and values: in fp32, in steps and in chunks
ROUTER = 12  # bytes for each expert of a block: logits and probabilities
INDEX = 48  # bytes for each expert of a token: its number, sorted in several ways
SPARE = 1.25  # factor for freed memory that the allocator keeps in pieces


@dataclass(frozen=True, slots=True)
class Prefill:
    """Bytes that computing ``tokens`` of a prompt together takes: ``fixed``, and ``per_token`` for each of them."""

    tokens: int
    fixed: int = 0
    per_token: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes for all of the tokens."""
        return self.fixed + self.tokens * self.per_token

    def within(self, room: int) -> Prefill:
        """Return the same with as many of the tokens as fit into ``room`` bytes, or LEAST of them if fewer do."""
        most = (room - self.fixed) // self.per_token // LEAST * LEAST
        return replace(self, tokens=min(self.tokens, max(most, LEAST)))


NONE = Prefill(0)


def prefill_of(model: Any, manifest: Manifest, config: TierConfig, kernels: Kernels) -> Prefill:
    """Return the memory for a prompt's tokens that are computed together.

    ``config`` says how many: ``prefill_chunk``, or the first DEFAULT_CONTEXT tokens of the context. A model that can't
    resume in the middle of a prompt computes all of it together. ``model`` may be on the meta device, ``kernels`` are
    those that it will be computed with.
    """
    context = context_of(model.config, config.context)
    resumes = can_resume(model)
    tokens = min(context, (config.prefill_chunk or DEFAULT_CONTEXT) if resumes else context)
    size = model.dtype.itemsize
    text = model.config.get_text_config(decoder=True)
    is_quick = any(map(kernels.packs, manifest.layouts.values()))  # else norms and attention are those of transformers
    head = model.get_output_embeddings()
    fixed, of_attention = _attention(model, context, is_whole=tokens == context, is_quick=is_quick)
    linears = [(path, module) for path, module in model.named_modules() if hasattr(module, "out_features")]
    outputs = defaultdict[str, int](int)  # numbers that the linear modules of one parent return for a token
    for path, module in linears:
        outputs[path.rpartition(".")[0]] += module.out_features if module is not head else 0
    widest = max((module.in_features for _, module in linears), default=0)  # rounded to 8 bits, with their scales
    of_block = max(
        _block(module, manifest, number, model.dtype, kernels)
        for number, module in enumerate(experts_modules(model).values())
    )
    copies = COPIES if resumes else OF_STATES
    layer = max(of_attention + copies * size * max(outputs.values(), default=0), of_block)
    logits = text.vocab_size * (size + 8) if config.all_logits else 0  # in fp32, and their logarithms
    per_token = SPARE * (STATES * (size if is_quick else size + 4) * text.hidden_size + layer + 2 * widest) + logits
    return Prefill(tokens, int(SPARE * fixed), int(per_token))


def _attention(model: Any, context: int, *, is_whole: bool, is_quick: bool) -> tuple[int, int]:
    """Return the bytes of an attention over ``context`` tokens: those that it always takes, and those for a new token.

    ``is_whole``: whether all tokens of a context are computed together, which needs no mask. ``is_quick``: whether
    ``use_decode_attention`` is called for the model.
    """
    text, size = model.config.get_text_config(decoder=True), model.dtype.itemsize
    fixed = per_token = 0
    windows = any("sliding" in kind or "chunked" in kind for kind in getattr(text, "layer_types", None) or ())
    masks = (not is_whole) + windows
    is_eager = model.config._attn_implementation == "eager"
    is_sliced = is_eager and is_quick and any(SINKS in module._parameters for module in model.modules())
    for layer in text.per_layer_config:
        heads = layer.num_attention_heads
        width = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        keys = (getattr(layer, "qk_nope_head_dim", None) or 0) + (getattr(layer, "qk_rope_head_dim", None) or 0)
        values = getattr(layer, "v_head_dim", None) or width
        is_latent = bool(getattr(layer, "kv_lora_rank", None))
        # keys and values of all heads, which are made from latent ones, or repeated for all heads that share them
        expanded = heads * ((keys or width) + values) * size * (1 + is_latent)
        fixed = max(fixed, context * expanded)
        holds_scores = is_eager or (not is_quick and (keys or width) != values)
        scores = heads * SCORE_BYTES if holds_scores and not is_sliced else 0
        per_token = max(per_token, context * (scores + masks * (size + 2)))
    return fixed + (SLICE_BYTES if is_sliced else 0), per_token


def _block(module: Any, manifest: Manifest, number: int, dtype: Any, kernels: Kernels) -> int:
    """Return the bytes that a block with the Experts module ``module`` takes for each token."""
    block, layout = manifest.blocks[number], manifest.layout(number)
    found = output_bytes(module, layout, 1, block.top_k, dtype) + ROUTER * block.experts + INDEX * block.top_k
    if quick_activation(module, layout, kernels) is None:  # all tokens may choose the same expert
        found += COPIES * dtype.itemsize * max(p.rows for p in layout.projections)
    return found
