"""Private names of torch. No other module uses one, besides ``lean``, which replaces modules of torch.

All of them are in torch 2.9 to 2.13. If a version of torch lacks one, tests/runtime/libraries names the line to change.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._pytree import tree_map_only as tree_map_only

# A module's own dictionaries, which may be changed. The public ways to them (named_parameters and the like) walk all
# modules, leave out names without a value, and take tens of microseconds: too long for each layer and token.
parameters_of: Callable[[Any], dict[str, Any]] = attrgetter("_parameters")
buffers_of: Callable[[Any], dict[str, Any]] = attrgetter("_buffers")
children_of: Callable[[Any], dict[str, Any]] = attrgetter("_modules")
# hooks by number, called before and after a module's forward; torch has public functions to add them, none to see them
hooks_before: Callable[[Any], dict[int, Any]] = attrgetter("_forward_pre_hooks")
hooks_after: Callable[[Any], dict[int, Any]] = attrgetter("_forward_hooks")
# the same for all modules, as two dictionaries
GLOBAL_HOOKS: tuple[dict[int, Any], dict[int, Any]] = (_global_forward_hooks, _global_forward_pre_hooks)

# whether flash attention takes fewer heads of keys than of queries (pytorch#157893); 2.9 was not tried
_FLASH_SHARES_KEYS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)

# Context in which subclasses of Tensor are computed as plain tensors. In a ``__torch_function__`` torch's documentation
# names it, too ("Extending PyTorch").
without_subclasses = torch._C.DisableTorchFunctionSubclass


def replace_parameters(module: nn.Module, parameters: dict[str, Any]) -> None:
    """Give a module a dictionary of parameters of its own, as a copy shares that of its original.

    The values may be plain tensors, which nn.Module's own way to set an attribute would refuse.
    """
    module.__dict__["_parameters"] = parameters


def replace_buffers(module: nn.Module, buffers: dict[str, Any]) -> None:
    """Give a module its own dictionary of buffers, because a copy of a module shares that of the original."""
    module.__dict__["_buffers"] = buffers


def separate(module: nn.Module) -> None:
    """Give a shallow copy of a module empty dictionaries of children and of hooks. Its original keeps its own."""
    for name in ("_modules", "_forward_hooks", "_forward_pre_hooks"):
        module.__dict__[name] = type(vars(module)[name])()


def has_bf16_instructions() -> bool:
    """Return whether this processor multiplies bf16 with AVX-512."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Compute attention on a CPU, as ``scaled_dot_product_attention`` does, which does not return the second result.

    Args:
        query: [batch, heads, tokens, width].
        key: [batch, key heads, length, width].
        value: [batch, key heads, length, width].
        mask: [tokens, length], added to scores; None: each token attends to all keys.
        scale: factor of scores; None: width ** -0.5.

    Returns:
        [batch, heads, tokens, width], and the logarithms of the sums of exponentiated scores, [batch, heads, tokens].
    """
    if key.shape[1] < query.shape[1] and not _FLASH_SHARES_KEYS:
        key, value = (numbers.repeat_interleave(query.shape[1] // key.shape[1], 1) for numbers in (key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask, scale=scale)


def arrange_int4(nibbles: Tensor, inner_tiles: int) -> Tensor:
    """Arrange codes of 4 bits, uint8 [rows, columns / 2], in the order of ``multiply_int4`` on a GPU, as int32."""
    return torch.ops.aten._convert_weight_to_int4pack(nibbles, inner_tiles)


def multiply_int4(x: Tensor, arranged: Tensor, group: int, pairs: Tensor) -> Tensor:
    """Multiply x bf16 [tokens, columns] -> bf16 [tokens, rows] with arranged codes of 4 bits.

    ``pairs``: scale and offset of each group, bf16 [columns / group, rows, 2]. torch has no public int4 product.
    """
    return torch.ops.aten._weight_int4pack_mm(x, arranged, group, pairs)
