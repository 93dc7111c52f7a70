"""Memory for keys and values, in pages, the context that it has room for, and memory for other states of sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from moetier.runtime.config import KV_SHARE, Size, TierConfig
from moetier.runtime.kernels.layer.pages import PAGE_TOKENS
from moetier.runtime.libraries.torch_internals import parameters_of
from moetier.tiers.text import format_bytes

from .context import longest_context

MIN_PAGES = 4  # so many there are by default, however little memory there is
WITH_STATES = 4  # times as many as sequences need, if copies of other states than keys and values lie in pages too
NUMBER_BYTES = 4  # of recurrent states, and of some convolutions' inputs


@dataclass(frozen=True, slots=True)
class KVBudget:
    """Pages for keys and values of all sequences, and the longest sequence."""

    context: int = 0  # most tokens of a sequence
    pages: int = 0
    page_bytes: int = 0  # of PAGE_TOKENS tokens in all layers
    bits: int = 16  # 8, or 16 for keys and values of any type as they are

    @classmethod
    def of(
        cls,
        config: Any,
        tier_config: TierConfig,
        *,
        page_bytes: int,
        room: int,
        experts: int,
        has_snapshots: bool = False,
    ) -> KVBudget:
        """Return the budget that the options ask for.

        By default that is KV_SHARE of ``room``, but enough for the option ``context``, and no more than the sequences
        that are computed at a time can need, or WITH_STATES times as much.

        Args:
            config: the model's config in transformers.
            tier_config: the options of the tiers.
            page_bytes: bytes of a page; 0 if the model keeps no keys and values.
            room: bytes that the trunk and scratch memory leave.
            experts: bytes of all experts.
            has_snapshots: whether copies of states of the model lie in pages, besides keys and values.
        """
        longest = tier_config.context or longest_context(config)
        most = None if longest is None else -(-longest // PAGE_TOKENS)  # pages of a sequence
        if not page_bytes:
            pages = tier_config.sequences * (most or MIN_PAGES)
        elif tier_config.kv_cache is not None:
            pages = tier_config.kv_cache.of(room) // page_bytes
        else:
            pages = max(MIN_PAGES, _default_bytes(tier_config.ram, room, experts) // page_bytes)
            if most is not None:
                pages = min(pages, tier_config.sequences * most * (WITH_STATES if has_snapshots else 1))
            if tier_config.context is not None:
                pages = max(pages, -(-tier_config.context // PAGE_TOKENS))
        pages = max(pages, 1)
        context = min(longest or PAGE_TOKENS * pages, PAGE_TOKENS * pages)
        return cls(context, pages, page_bytes, tier_config.kv_bits)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return self.pages * self.page_bytes

    def describe(self, context: int) -> str:
        """Return what the context of a model, in tokens, costs, for a user."""
        what = f"a context of {context:,} tokens"
        return f"{what} ({format_bytes(self.nbytes)} for keys and values)" if self.page_bytes else what


def _default_bytes(ram: Size | None, room: int, experts: int) -> int:
    """Return the bytes for keys and values if no option gives them. ``ram``: the option for experts."""
    if ram is None or ram.bytes is None:
        return int(KV_SHARE * room)
    # what the experts leave is also for the tokens of a prompt that are computed together
    return min(int(KV_SHARE * room), max(room - min(ram.bytes, experts), 0) // 2)


NO_KV = KVBudget()


def state_bytes(model: Any) -> int:
    """Return the bytes of a sequence's states besides keys and values, at most a little more than they take.

    That is for each convolution its last inputs, and for each module with decays (Mamba, linear attention) the
    recurrent state of its heads. ``model`` may be on the meta device.
    """
    numbers = sum(
        module.in_channels * (module.dilation[0] * (module.kernel_size[0] - 1) + 1)
        for module in model.modules()
        if isinstance(module, nn.Conv1d)
    )
    numbers += sum(_recurrent(module) for module in model.modules() if "A_log" in parameters_of(module))
    return NUMBER_BYTES * numbers


def _recurrent(module: Any) -> int:
    """Return how many numbers the recurrent state has of a module with a decay for each head, or for each channel."""
    if module.A_log.dim() == 2:  # [channels, state]
        return int(module.A_log.numel())
    if hasattr(module, "num_v_heads"):
        return int(module.num_v_heads * module.head_k_dim * module.head_v_dim)
    width = getattr(module, "head_dim", 0)
    return int(getattr(module, "num_heads", 0) * width * getattr(module, "ssm_state_size", width))
