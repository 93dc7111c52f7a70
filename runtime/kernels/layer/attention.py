"""Causal attention in place of transformers' attention functions.

For one token, torch's scaled_dot_product_attention takes many times as long as it takes to read keys and values, and
compiles its matrix products anew for each length of a context (docs/benchmarks.md, Attention). Many tokens are computed
with the bits of one, unless there is a mask, or torch is faster and these bits are not asked for (``torch_attention``).
SDPA has no attention sinks. Architectures with sinks compute with a function of their own, and it is replaced too.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moetier.runtime.kernels.jit.emitter import LANES
from moetier.runtime.kernels.products.api import CPU, FLOATS, has_memory
from moetier.runtime.kernels.products.row import prefers_torch
from moetier.runtime.libraries.torch_internals import parameters_of, replace_parameters
from moetier.runtime.libraries.transformers_internals import attention_of, can_use_sdpa

from .attend import attend
from .attention_code import NO_WINDOW
from .attention_piece import STEP
from .eight_bits import SCALE_BYTES
from .masks import Band, band_of, causal, causal_mask, in_order, sink_mask, written_out
from .packing import attend_to_each, packed_step
from .torch_attention import TILE, attend_with_torch

_ASKS = r'_attn_implementation\s*(?:==|!=|in|not in)\s[^\n]*"{}"'  # for the attention function of this name
# what code does with a mask other than give it on, such as to extend it
_USES_MASK = re.compile(r"\battention_mask\b(?!\s*[,:)]|=[^=])")
NAME, WITH_SINKS = "moetier_sdpa", "moetier_sinks"  # among transformers' attention functions
SLICE_BYTES = 32 << 20  # largest size of the scores of queries that an architecture's own function takes together
SCORE_BYTES = 12  # of one score: as it is, masked, and as a probability, in fp32
SINKS = "sinks"  # name of the parameter [heads] of an attention that has them
# arguments that change no results: positions are in cos and sin, windows in the mask, and hooks take what is output
HARMLESS = {"position_ids", "sliding_window", "use_cache", "output_router_logits", "output_hidden_states"}


def use_causal_attention(model: PreTrainedModel, *, same_bits: bool = True) -> None:
    """Replace the attention function of a model.

    This requires that the whole model uses one function, and that its code does not depend on the function's name. SDPA
    is replaced by ``causal_attention``. The function of an architecture with sinks is replaced by ``sink_attention``,
    if the architecture can't use SDPA, its function computes the same for a trial token, and the configuration asks for
    no attention weights. ``same_bits``: many tokens must have the bits of one, even where torch computes them faster.
    """
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    used = {attention_of(part.config) for part in parts}
    if len(used) != 1 or any(_asks_for(attention_of(part.config), part) for part in parts):
        return
    if used == {"sdpa"}:
        AttentionInterface.register(NAME, causal_attention)
        AttentionMaskInterface.register(NAME, causal_mask)
        model.set_attn_implementation(NAME)
    elif used == {"eager"} and not can_use_sdpa(model) and not any(part.config.output_attentions for part in parts):
        modules = [module for module in model.modules() if SINKS in parameters_of(module)]
        if modules and all(map(_has_plain_sinks, modules)):
            AttentionInterface.register(WITH_SINKS, sink_attention)
            AttentionMaskInterface.register(WITH_SINKS, sink_mask)
            model.set_attn_implementation(WITH_SINKS)
    for module in model.modules():
        if hasattr(module, "is_causal") or SINKS in parameters_of(module):
            vars(module)["same_bits"] = same_bits


def _asks_for(name: str, model: PreTrainedModel) -> bool:
    """Return whether the code of a model's class, or of a base class, depends on its attention function's name."""
    classes = [
        class_
        for class_ in type(model).__mro__
        if issubclass(class_, PreTrainedModel) and class_ is not PreTrainedModel
    ]
    try:
        return any(
            re.search(_ASKS.format(name), inspect.getsource(sys.modules[class_.__module__])) for class_ in classes
        )
    except (OSError, TypeError):  # the source can't be read, so it might
        return True


def sink_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute as ``causal_attention``, with sinks. Other inputs go to the architecture's own function.

    ``named`` are ``s_aux``, the sinks [heads], and further arguments of transformers' attention functions.
    """
    sinks, scaling = named.get("s_aux"), named.get("scaling")
    if (step := packed_step()) is not None:
        return attend_to_each(step, sink_attention, module, query, named)
    # without a mask, many tokens attend to all
    is_causal = getattr(module, "is_causal", True) and (query.shape[2] == 1 or band_of(attention_mask) is not None)
    if sinks is not None and is_causal and not asks_more(named, {"s_aux", "scaling"}):
        same_bits = getattr(module, "same_bits", True)
        y = _attend(query, key, value, attention_mask, scaling, sinks, same_bits=same_bits)
        if y is not None:
            return y, None
    key, value = in_order(key, value, attention_mask)
    attention_mask = written_out(attention_mask)
    if attention_mask is not None and attention_mask.dtype == torch.bool:  # the function adds its mask to scores
        zeros = torch.zeros(attention_mask.shape, dtype=query.dtype, device=query.device)
        attention_mask = zeros.masked_fill_(~attention_mask, torch.finfo(query.dtype).min)
    return _in_slices(_own_function(module), module, query, key, value, attention_mask, **named)


def _in_slices(
    attend: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named: Any
) -> tuple[Tensor, Tensor | None]:
    """Call an architecture's own function for some queries at a time, because it holds the scores of all of them.

    The weights that it returns are dropped if there is more than one slice.
    """
    batch, heads, tokens, _ = query.shape
    most = max(1, SLICE_BYTES // (batch * heads * key.shape[2] * SCORE_BYTES))
    if tokens <= most or asks_more(named, {"s_aux", "scaling"}):
        return attend(module, query, key, value, mask, **named)
    # a mask of one row is for all tokens
    masks = [None] * -(-tokens // most) if mask is None else torch.split(mask.expand(-1, -1, tokens, -1), most, 2)
    parts = [
        attend(module, part, key, value, part_mask, **named)[0]
        for part, part_mask in zip(torch.split(query, most, 2), masks, strict=True)
    ]
    return torch.cat(parts, 1), None


def asks_more(named: dict[str, Any], ignored: Collection[str] = ()) -> bool:
    """Return whether there are arguments that change results, besides those in ``ignored``."""
    others = [value for name, value in named.items() if name not in HARMLESS and name not in ignored]
    return any(isinstance(value, Tensor) or bool(value) for value in others)


def _own_function(module: nn.Module) -> Any:
    """Return the attention function that transformers has in the file of a module's class; None if it has none."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


@torch.no_grad()
def _has_plain_sinks(module: nn.Module) -> bool:
    """Return whether an architecture's own function computes as ``sink_attention`` does for a trial token.

    The module must give it the mask as it is, because there may be none (``sink_mask``).
    """
    try:
        if _USES_MASK.search(inspect.getsource(type(module).forward)):
            return False
    except (OSError, TypeError):  # the source can't be read, so it might
        return False
    sinks, share = parameters_of(module)[SINKS], getattr(module, "num_key_value_groups", 1)
    if sinks is None or sinks.dim() != 1 or sinks.dtype not in FLOATS or share < 1 or len(sinks) % share:
        return False
    random = torch.Generator().manual_seed(0)
    twin: Any = copy.copy(module)
    heads, length = len(sinks), 24
    shapes = (heads,), (1, heads, 1, LANES), *[(1, heads // share, length, LANES)] * 2
    other, query, key, value = (torch.randn(shape, generator=random).to(sinks.dtype) for shape in shapes)
    replace_parameters(twin, {**parameters_of(module), SINKS: other})
    try:
        given = {"scaling": 0.5, "dropout": 0.0, "s_aux": other}
        expected, _ = _own_function(twin)(twin, query, key, value, None, **given)
    except Exception:  # it needs or gives something else
        return False
    computed = _attend(query, key, value, None, 0.5, other)
    near = 1e-5 if sinks.dtype == torch.float32 else 3e-2
    return (
        computed is not None
        and computed.shape == expected.shape
        and torch.allclose(computed, expected, rtol=near, atol=near)
    )


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention with ``attend``: of a single new token, and of many without a mask.

    Other inputs go to transformers' function for SDPA. A sequence's result depends only on that sequence and its
    padding.

    Args:
        query: [batch, heads, tokens, width].
        key: [batch, key heads, length, width].
        value: [batch, key heads, length, values].
        attention_mask: [batch, 1, tokens, length], bool (True: attend) or numbers to be added.

    Returns:
        [batch, tokens, heads, values], and None in place of the attention weights.
    """
    if (step := packed_step()) is not None:
        named = {"dropout": dropout, "scaling": scaling, "position_bias": position_bias, **kwargs}
        return attend_to_each(step, causal_attention, module, query, named)
    tokens = query.shape[2]
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if dropout == 0.0 and position_bias is None and kwargs.get("softcap") is None and (tokens == 1 or is_causal):
        same_bits = getattr(module, "same_bits", True)
        y = _attend(query, key, value, attention_mask, scaling, kwargs.get("s_aux"), same_bits=same_bits)
        if y is not None:
            return y, None
    key, value = in_order(key, value, attention_mask)
    attention_mask, length = written_out(attention_mask), key.shape[2]
    if attention_mask is None and is_causal and 1 < tokens < length:  # see ``causal_mask``
        attention_mask = causal(tokens, length, length, query.device)
    values = value.shape[3]
    if query.device.type == "cpu" and values < key.shape[3]:
        # torch computes without the scores of all tokens only where keys and values are as wide
        value = F.pad(value, (0, key.shape[3] - values))
    y, _ = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        position_bias=position_bias,
        is_causal=is_causal,
        **kwargs,
    )
    return y[..., :values], None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    sinks: Tensor | None,
    *,
    same_bits: bool = True,
) -> Tensor | None:
    """Compute ``causal_attention`` with ``sinks`` [heads]. Return None for inputs that compiled code does not take.

    Unless a token must have the ``same_bits`` alone and beside others, torch computes many tokens where it is faster.
    """
    band, length = band_of(mask), None
    if mask is not None and band is not None:
        length, mask = mask.shape[3], None
    if torch.is_grad_enabled() or not _fits(query, key, value, mask):
        return None
    if sinks is not None and not fits_sinks(sinks, query.shape[1]):
        return None
    if query.stride(3) != 1:
        query = query.contiguous()
    first, window, pages = band or Band(0, NO_WINDOW)
    if (
        not same_bits
        and query.shape[2] >= TILE
        and query.dtype == key.dtype == torch.bfloat16
        and value.shape[3] <= key.shape[3]
        and prefers_torch()
    ):
        length = key.shape[2] if length is None else length
        places = None if pages is None else pages.places(torch.arange(first, first + length))
        return attend_with_torch(
            query, key, value, length=length, window=window, scaling=scaling, sinks=sinks, places=places
        )
    added = None if mask is None else _added(mask, len(query))
    return attend(
        query,
        key,
        value,
        added,
        scaling=scaling,
        sinks=sinks,
        window=window,
        first=first,
        pages=pages,
        length=length,
    )


def fits_sinks(sinks: Tensor, heads: int) -> bool:
    """Return whether compiled code can read sinks [heads]. Their type may be another than the keys'."""
    return has_memory(sinks) and sinks.dtype in FLOATS and sinks.shape == (heads,)


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    codes = SCALE_BYTES if key.dtype == torch.int8 else 0
    return (
        (query.shape[2] == 1 or mask is None)
        and query.shape[2] <= key.shape[2]
        and query.shape[3] == key.shape[3] - codes
        and key.shape[1:3] == value.shape[1:3]
        and type(query) is type(key) is type(value) is Tensor
        and (query.is_cpu and key.is_cpu and value.is_cpu)
        and key.dtype == value.dtype == (torch.int8 if codes else query.dtype)
        and query.dtype in FLOATS
        and query.shape[3] % LANES == (value.shape[3] - codes) % LANES == 0
        and query.shape[1] % key.shape[1] == 0
        and query.shape[0] == key.shape[0] == value.shape[0]
        and key.stride(3) == value.stride(3) == 1
        and query.shape[2] > 0
        and (mask is None or _is_row_of(mask, key, query.dtype))
    )


def _is_row_of(mask: Tensor, key: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a mask is one that SDPA takes for one token and queries of ``dtype``, the same for all heads.

    ``key`` is [batch, key heads, length, width].
    """
    return (
        has_memory(mask)
        and mask.dtype in (torch.bool, torch.float32, dtype)
        and mask.dim() == 4
        and mask.shape[0] in (1, key.shape[0])
        and mask.shape[1:] == (1, 1, key.shape[2])
    )


def _added(mask: Tensor, batch: int) -> Tensor:
    """Convert a mask to fp32 [batch, 1, length rounded up to STEP], to be added to scores."""
    numbers = mask[:, 0]
    if mask.dtype == torch.bool:
        lowest = torch.finfo(torch.float32).min / 2  # finite when it is multiplied by LOG2_E
        numbers = torch.zeros(numbers.shape, dtype=torch.float32, device=CPU).masked_fill_(~numbers, lowest)
    numbers = F.pad(numbers.float(), (0, -numbers.shape[2] % STEP))
    return numbers.expand(batch, -1, -1).contiguous()
