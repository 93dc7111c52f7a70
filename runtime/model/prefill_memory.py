"""Memory that computing several tokens of a prompt together takes, besides their keys and values.

The sizes are those of the tensors that a layer holds at its peak. ``tests/runtime/model/test_prefill_memory.py``
compares them with measured peaks.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from moetier.runtime.config import PREFILL_TOKENS, TierConfig
from moetier.runtime.kernels.layer.attention import SCORE_BYTES, SINKS
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS
from moetier.runtime.kernels.layer.torch_attention import SEGMENT
from moetier.runtime.kernels.products.api import FLOATS, Kernels
from moetier.runtime.kernels.slots import SlotKernels
from moetier.runtime.libraries.torch_internals import parameters_of
from moetier.runtime.libraries.transformers_internals import attention_of
from moetier.runtime.moe.experts import experts_modules, output_bytes
from moetier.runtime.moe.grouped import GROUP_OUTPUTS
from moetier.runtime.moe.quick import quick_activation
from moetier.tiers.manifest import Block, Manifest

from .context import SNAPSHOT_TOKENS, can_resume, has_index, has_states
from .kv_budget import KVBudget

PASS_TOKENS = 256  # tokens of a forward pass, if a prompt is computed in lockstep
TIMES_IN_LOCKSTEP = 3  # times as many tokens are computed together in lockstep, which takes a third of the memory
MIN_IN_LOCKSTEP = 2048  # tokens that are computed together in lockstep even if they take more than the default share
PASS_BYTES = 320 << 10  # of a forward pass that waits: its stack, and small tensors
MIN_TOKENS = 32  # least number of tokens that are computed together; a smaller chunk is a multiple of it
STATES = 4  # tensors [tokens, hidden] of a layer: residual, normed, output and their sum; some in fp32 too if not quick
COPIES = 3  # times that outputs of linear modules are held: as they are, rotated or activated, and multiplied
STATE_COPIES = 8  # the same in a model with other states than keys and values: these are computed in fp32, in chunks
TOKEN_SCANS = 3  # fp32 tensors that hold a state for each token, if a scan goes from token to token
CHUNK_SCANS = 8  # the same if a scan goes from chunk to chunk: states, and what each token adds to a later one
ROUTER = 64  # bytes per token and expert of a block: logits, probabilities, and gaps between the experts' tokens
INDEX = 48  # bytes per chosen expert of a token: its number, sorted in several ways
# layer types whose names contain one of these keep neither keys nor values
NOTHING_PER_TOKEN = ("linear", "mamba", "conv", "moe", "mlp")
INDEXED = "indexed_attention"
WINDOWED = ("sliding", "chunked")
STATEFUL = ("linear", "mamba", "hybrid")  # they have states that are computed in fp32
SMALL_BYTES = 11 << 20  # of scratch memory and small tensors, for any number of tokens
EXACT_BYTES = 32 << 20  # the same, more if torch multiplies with decoded experts
SPARE = 1.25  # factor for freed memory that the allocator keeps in pieces


@dataclass(frozen=True, slots=True)
class AttentionMemory:
    """Bytes that one variant of attention takes besides its own modules' outputs, which ``Prefill`` counts."""

    window: int = 0  # most tokens that a token attends to, including itself; 0: all
    always: int = 0  # bytes for each token that is attended to
    masked: int = 0  # bytes for each token that is attended to, if there is a mask
    kept: int = 0  # bytes of keys and values of such a token, which are copied when their memory grows
    packed: int = 0  # bytes of the keys and values of such a token that torch packs, of SEGMENT at most
    scores: int = 0  # bytes for each pair of a new token and a token that it attends to
    mask: int = 0  # bytes of the mask for each such pair
    has_mask: bool = False  # whether there is a mask even if each token attends to all earlier ones


@dataclass(frozen=True, slots=True)
class Lockstep:
    """Memory for computing prompts in passes of PASS_TOKENS tokens, whose experts are computed together.

    ``moe/lockstep.py`` does so.
    """

    tokens: int  # of all prompts that are computed together; at most PASS_TOKENS: no memory is reserved for them
    states: int  # bytes for each token while experts are computed
    fixed: int  # bytes for any number of tokens


@dataclass(frozen=True, slots=True)
class Prefill:
    """Memory for computing ``tokens`` of a prompt together, in a context of ``context`` tokens."""

    tokens: int
    context: int = 0
    lockstep: Lockstep | None = None  # None: prompts can't be computed in lockstep
    resumes: bool = True  # whether a prompt can be divided; otherwise it is computed as a whole
    states: int = 0  # bytes for each token: hidden states, which a layer holds all the time
    of_attention: int = 0  # bytes for each token while attention is computed
    of_block: int = 0  # bytes for each token while experts are computed
    fixed: int = 0  # bytes for any number of tokens
    attentions: tuple[AttentionMemory, ...] = ()

    @property
    def nbytes(self) -> int:
        """The larger of: bytes for one forward pass; bytes for a prompt in lockstep."""
        nbytes = self._together_bytes(self.tokens)
        if self.lockstep is not None and self.lockstep.tokens > PASS_TOKENS:
            nbytes = max(nbytes, self._lockstep_bytes(self.lockstep.tokens))
        return nbytes

    @property
    def least_bytes(self) -> int:
        """Bytes that let a prompt reuse each expert often: room for MIN_IN_LOCKSTEP tokens, or for all if fewer."""
        if self.lockstep is None or self.lockstep.tokens <= PASS_TOKENS:
            return 0
        return self._lockstep_bytes(min(self.lockstep.tokens, MIN_IN_LOCKSTEP))

    @property
    def later_chunk(self) -> int:
        """Most tokens of a chunk after the first that fit into the same bytes, as later chunks may need masks."""
        return self._most(self.nbytes, self.tokens)

    @property
    def lockstep_chunk(self) -> int | None:
        """Most tokens of prompts that fit into the same bytes in lockstep; None if they can't be computed so."""
        if self.lockstep is None:
            return None
        if self.context <= min(PASS_TOKENS, self.tokens):
            return self.tokens  # each prompt is a single pass
        tokens = self._most_in_lockstep(self.nbytes)
        return tokens if tokens >= PASS_TOKENS else None

    def _most_in_lockstep(self, room: int) -> int:
        """Return how many tokens of prompts fit into ``room`` bytes in lockstep."""
        assert self.lockstep is not None
        return max(int((room - self._lockstep_bytes(0)) / (SPARE * self.lockstep.states)), 0)

    def _lockstep_bytes(self, tokens: int) -> int:
        """Return the bytes for computing ``tokens`` of prompts in lockstep."""
        assert self.lockstep is not None
        attentions = tuple(replace(attention, mask=0) for attention in self.attentions)
        nbytes = replace(self, attentions=attentions).bytes_of(PASS_TOKENS, is_whole=False)
        return self.lockstep.fixed + nbytes + math.ceil(SPARE * self.lockstep.states * tokens)

    def bytes_of(self, tokens: int, *, is_whole: bool) -> int:
        """Return the bytes for computing ``tokens`` together: a whole prompt, or the last tokens of the context."""
        length = tokens if is_whole else max(self.context, tokens)
        masks, work = dict[int, int](), 0
        for attention in self.attentions:
            seen = min(length, attention.window - 1 + tokens) if attention.window else length
            has_mask = attention.has_mask or not is_whole or 0 < attention.window < length
            masks[attention.window] = tokens * seen * attention.mask * has_mask
            expanded = attention.always + attention.masked * has_mask + attention.kept * (not is_whole)
            packed = min(seen, SEGMENT) * attention.packed
            work = max(work, seen * expanded + packed + tokens * seen * attention.scores)
        layer = max(tokens * self.of_attention + work, tokens * self.of_block)
        return self.fixed + int(SPARE * (tokens * self.states + layer + sum(masks.values())))

    def _together_bytes(self, tokens: int) -> int:
        """Return the bytes for computing ``tokens`` in one forward pass, anywhere in the context."""
        return self.bytes_of(tokens, is_whole=tokens >= self.context or not self.resumes)

    def within(self, room: int) -> Prefill:
        """Return a copy with as many of the tokens as fit into ``room`` bytes, but at least MIN_TOKENS of them."""
        fits, lockstep = self._together_bytes(self.tokens) <= room, self.lockstep
        if lockstep is not None:
            lockstep = replace(lockstep, tokens=min(lockstep.tokens, self._most_in_lockstep(room)))
        return replace(self, tokens=self.tokens if fits else self._most(room, self.tokens - 1), lockstep=lockstep)

    def longest(self, room: int) -> int:
        """Return how many tokens of a prompt that is not divided fit into ``room`` bytes, up to the context."""
        fits = self.bytes_of(self.context, is_whole=True) <= room
        return self.context if fits else max(self._most(room, self.context), self.tokens)

    def _most(self, room: int, most: int) -> int:
        sizes = range(MIN_TOKENS, most + 1, MIN_TOKENS)
        fitting = bisect_right(sizes, room, key=lambda tokens: self.bytes_of(tokens, is_whole=not self.resumes))
        return sizes[fitting - 1] if fitting else min(MIN_TOKENS, most)


NO_PREFILL = Prefill(0)


def prefill_of(model: Any, manifest: Manifest, config: TierConfig, kernels: Kernels, kv: KVBudget) -> Prefill:
    """Return the memory for a prompt's tokens that are computed together.

    ``config`` says how many: ``prefill_chunk``, or PREFILL_TOKENS, but no more than a context has. In lockstep they are
    TIMES_IN_LOCKSTEP times as many, of one prompt or several, but no more than all sequences have. ``model`` may be on
    the meta device, ``kernels`` are those that it will be computed with, and ``kv`` has the context.
    """
    size, resumes = model.dtype.itemsize, can_resume(model)
    text = model.config.get_text_config(decoder=True)
    is_quick = any(map(kernels.packs, manifest.layouts.values()))  # else norms and attention are those of transformers
    is_eager = attention_of(model.config) == "eager"
    has_sinks = is_eager and is_quick and any(SINKS in parameters_of(module) for module in model.modules())
    modules = experts_modules(model)
    are_quick = {
        number: quick_activation(modules[block.path], manifest.layout(number), kernels) is not None
        for number, block in enumerate(manifest.blocks)
        if block.path in modules  # else loading refuses the model
    }
    of_block = max(
        _block(modules[manifest.blocks[number].path], manifest, number, model.dtype, kernels, is_quick=computes_quick)
        for number, computes_quick in are_quick.items()
    )
    angles = max(
        getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        for layer in text.per_layer_config
    )
    in_lockstep = (
        resumes
        and not (has_states(model) or has_index(model))
        and model.dtype in FLOATS  # compiled attention takes no others
        and (not is_eager or has_sinks)
        and len(modules) == len(manifest.blocks)
        and all(are_quick.values())
    )
    # with AMX; the same is reserved on other processors, where it is little
    by_torch = is_quick and model.dtype == torch.bfloat16 and kv.bits == 16 and not config.same_bits
    chunk = config.prefill_chunk or PREFILL_TOKENS
    tokens, of_all = min(chunk, kv.context), min(config.sequences * kv.context, PAGE_TOKENS * kv.pages)
    lockstep = Lockstep(
        tokens=min(TIMES_IN_LOCKSTEP * chunk, of_all) if tokens > PASS_TOKENS else 0,
        # two tensors (residual and normed state), the angles, and the experts' sums
        states=text.hidden_size * (2 * size + 4)
        + 2 * angles * size
        + max(map(_choices, manifest.blocks))
        + PASS_BYTES // PASS_TOKENS,
        fixed=2 * GROUP_OUTPUTS * size * text.hidden_size,
    )
    return Prefill(
        tokens=min(tokens, SNAPSHOT_TOKENS) if resumes and has_states(model) else tokens,
        context=kv.context,
        lockstep=lockstep if in_lockstep else None,
        resumes=resumes,
        states=STATES * (size if is_quick else size + 4) * text.hidden_size,
        of_attention=_outputs(model),
        of_block=max(of_block, text.vocab_size * (size + 8) if config.all_logits else 0),  # in fp32, and logarithms
        fixed=SMALL_BYTES + (EXACT_BYTES if config.exact else 0),
        attentions=tuple(
            {
                *_attentions(
                    text,
                    size,
                    is_eager=is_eager and not has_sinks,
                    has_mask=is_eager,
                    is_quick=is_quick,
                    by_torch=by_torch,
                )
            }
        ),
    )


def _choices(block: Block) -> int:
    """Return the bytes that a block's router gives for each token: logits, probabilities, and the choice."""
    return 8 * block.experts + INDEX * block.top_k


def _outputs(model: Any) -> int:
    """Return the bytes that the layer with the largest modules needs for each token of a prompt.

    These are the outputs of the linear modules of one parent, with copies that torch makes of them, and the states of a
    state-space module.
    """
    head, size = model.get_output_embeddings(), model.dtype.itemsize
    text = model.config.get_text_config(decoder=True)
    # ``_attentions`` counts keys and values that are expanded from latent ones
    latents = {getattr(layer, "kv_lora_rank", None) for layer in text.per_layer_config}
    linears = defaultdict[str, list[int]](list)  # numbers that the linear modules of each parent return for a token
    for path, module in model.named_modules():
        if hasattr(module, "out_features") and module is not head and module.in_features not in latents:
            linears[path.rpartition(".")[0]].append(module.out_features)
    states = {path: _state(module) for path, module in model.named_modules() if "A_log" in parameters_of(module)}
    layer_types = getattr(text, "layer_types", None) or ()
    copies = STATE_COPIES if any(name in layer_type for layer_type in layer_types for name in STATEFUL) else COPIES
    # the last module of a parent combines the outputs of the others
    sizes: list[int] = [
        size * (copies * sum(numbers[:-1]) + numbers[-1]) + states.get(path, 0) for path, numbers in linears.items()
    ]
    return max(sizes, default=0)


def _state(module: Any) -> int:
    """Return the bytes of the states that a state-space module (Mamba) makes for each token."""
    width = getattr(module, "ssm_state_size", 0)
    if module.A_log.dim() == 2:
        return int(TOKEN_SCANS * 4 * module.A_log.numel())
    return int(CHUNK_SCANS * 4 * module.A_log.numel() * (width + module.chunk_size)) if width else 0


def _attentions(
    text: Any, size: int, *, is_eager: bool, has_mask: bool, is_quick: bool, by_torch: bool
) -> Iterator[AttentionMemory]:
    """Yield the attention of each layer of a model with the configuration ``text``, whose numbers have ``size`` bytes.

    ``is_eager``: whether scores of all tokens are computed. ``has_mask``: whether there is a mask for each prompt.
    ``is_quick``: whether ``use_causal_attention`` is called for the model. ``by_torch``: whether torch computes then.
    """
    layers = text.per_layer_config
    layer_types = getattr(text, "layer_types", None) or [""] * len(layers)
    for layer, layer_type in zip(layers, layer_types, strict=True):
        if any(name in layer_type for name in NOTHING_PER_TOKEN):
            continue
        heads, sizes = layer.num_attention_heads, defaultdict[str, int](int)
        for name in ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank", "index_n_heads"):
            sizes[name] = getattr(layer, name, None) or 0
        width = sizes["head_dim"] or layer.hidden_size // heads
        keys = sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"] or width
        values = sizes["v_head_dim"] or width
        expanded = heads * (keys + values) * size  # keys and values of all heads
        is_shared = heads != (getattr(layer, "num_key_value_heads", None) or heads)
        # Compiled code takes keys that several heads share as they are. SDPA repeats them if there is a mask
        kept = (getattr(layer, "num_key_value_heads", None) or heads) * (keys + values) * size
        shares = not is_eager and keys <= 256 and (keys == values or (is_quick and keys > values))
        holds_scores = is_eager or (not is_quick and keys != values)
        plain = AttentionMemory(
            always=2 * expanded if sizes["kv_lora_rank"] else expanded * is_shared * (not shares),
            masked=expanded * is_shared * shares * (not is_quick or bool(getattr(layer, "attention_chunk_size", None))),
            kept=0 if sizes["kv_lora_rank"] else kept,
            packed=0 if sizes["kv_lora_rank"] else 2 * by_torch * kept,  # as they are in pages, and packed
            scores=SCORE_BYTES * (heads * holds_scores + sizes["index_n_heads"]),
            mask=size + 1,
            has_mask=has_mask,
        )
        window = getattr(layer, "sliding_window", None) or getattr(layer, "attention_chunk_size", None) or 0
        is_windowed = any(name in layer_type for name in WINDOWED)
        if window and (is_windowed or not layer_type):
            yield replace(plain, window=window)
        if not is_windowed:
            yield plain


def _block(module: Any, manifest: Manifest, number: int, dtype: Any, kernels: Kernels, *, is_quick: bool) -> int:
    """Return the bytes that a block with the Experts module ``module`` takes for each token.

    ``is_quick``: whether its experts are computed in the quick way.
    """
    block, layout = manifest.blocks[number], manifest.layout(number)
    nbytes = output_bytes(module, layout, 1, block.top_k, dtype) + ROUTER * block.experts + INDEX * block.top_k
    if isinstance(kernels, SlotKernels):  # outputs are fp32, and all activations are kept
        down = layout.projection("down_proj")
        nbytes += block.top_k * (4 * down.rows + dtype.itemsize * down.columns)
    elif not is_quick:  # all tokens may choose the same expert
        nbytes += COPIES * dtype.itemsize * max(p.rows for p in layout.projections)
    return nbytes
