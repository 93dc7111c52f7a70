"""TieredBlock: the state of a block whose experts are in tiers; a demand for its experts, and its leases.

``RemoteExperts`` is the interface of an object that has its experts computed on other hosts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from moetier.runtime.kernels.experts.expert_kernels import ExpertKernels
from moetier.runtime.kernels.products.api import Kernels
from moetier.tiers.errors import MoetierError
from moetier.tiers.layout import ExpertKey, RecordLayout
from moetier.tiers.source import ExpertSource, Lease

from .snapshot import Trials

_open = threading.local()  # ``source``: the source of this thread's leases that have not ended regularly

# for each expert: the numbers of the tokens that it computes, and the number of the output for each
TokensOfExperts = Mapping[int, tuple[Sequence[int], Sequence[int]]]


class PendingOutputs(Protocol):
    """Interface of outputs that other hosts are computing."""

    @property
    def experts(self) -> Collection[int]:
        """The experts that other hosts compute."""

    def collect(self, outputs: int) -> list[int]:
        """Wait for the outputs, and write each to its row of [outputs, hidden] at the address ``outputs``.

        Return the experts that no host has computed.
        """

    def close(self) -> None:
        """Cancel computations whose outputs were not collected. Idempotent."""


class RemoteExperts(Protocol):
    """Interface of an object that has absent experts computed on other hosts, where that takes less time."""

    def note_local(self, block: int, experts: Sequence[int]) -> None:
        """Count a use of each of ``experts`` by one token, whose records were all in this process's tier.

        The counts decide which experts are worth a slot here.
        """

    def send(
        self, products: ExpertKernels, block: int, x: int, tokens: int, tokens_of: TokensOfExperts
    ) -> PendingOutputs:
        """Choose experts that other hosts compute faster, and send them the hidden states of these experts' tokens.

        Args:
            products: compiled code for the block's experts, with the type and the width of hidden states.
            block: number of the block.
            x: address of the hidden states [tokens, hidden], contiguous.
            tokens: number of tokens of x.
            tokens_of: all experts that are used, and the tokens of each.

        The caller closes the result.
        """


@dataclass(frozen=True, slots=True)
class TieredBlock:
    """State of an experts module whose parameters were removed, stored as the module's attribute ``tiered``.

    It is frozen, but ``compiled`` is a cache: ``runtime.moe.quick`` adds the kernels that it compiles.
    """

    block: int  # number of the block
    layout: RecordLayout
    source: ExpertSource[Tensor]
    kernels: Kernels
    device: torch.device  # device of the records
    # called once for each demand, with the block and the experts
    on_demand: Callable[[int, Collection[int]], None] | None = None
    # by type of the hidden states and parts of the module: kernels for all experts of the block. Without kernels (None)
    # they are computed one after the other
    compiled: dict[Any, Trials[Any]] = field(default_factory=dict)
    following: Sequence[ExpertKey] = ()  # all experts of the next block
    remote_compute: RemoteExperts | None = None  # computes absent experts on other hosts, if the quick way is used

    def request_following(self) -> None:
        """Let the experts of the next block be read, while the layers before it are computed."""
        if self.following:
            self.source.prefetch(self.block + 1, self.following)

    def cancel_following(self) -> None:
        """Cancel the reads of ``request_following`` that have not begun, as the next block will not be computed."""
        if self.following:
            with suppress(MoetierError):  # the source may be closed
                self.source.prefetch(self.block + 1, ())

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy()


class RoutedTokens(NamedTuple):
    """Tokens, and the experts that compute them."""

    x: Tensor  # [tokens, hidden]
    top_k_index: Tensor  # [tokens, top_k]
    weights: Tensor  # [tokens, top_k]


class BlockDemand:
    """A demand for experts of a block. Some may be leased, some used without leases, some computed on other hosts."""

    def __init__(self, tiered: TieredBlock) -> None:
        self.tiered = tiered
        self._is_announced = False

    def announce(self, experts: Collection[int]) -> None:
        """Call ``on_demand`` of the block with all ``experts`` of the demand, unless it was called before."""
        if not self._is_announced and self.tiered.on_demand is not None:
            self._is_announced = True
            self.tiered.on_demand(self.tiered.block, experts)

    def leases(self, experts: Collection[int], of_total: int = 0) -> Generator[list[Lease[Tensor]], None, None]:
        """Lease experts, and yield lists of leases that are valid at the same time.

        Records are uint8 [record bytes]. ``of_total`` is that of ``ExpertSource.acquire``. If it is 0, these are all
        experts of the demand, which is announced: before the leases are yielded if all are available together;
        otherwise after the first list has been computed. At that time other experts are still being read, so the call
        delays nothing.
        """
        block, source = self.tiered.block, self.tiered.source
        _open.source = source
        left, together = len(experts), list[Lease[Tensor]]()
        with closing(source.acquire([ExpertKey(block, expert) for expert in experts], of_total)) as leases:
            for lease in leases:
                together.append(lease)
                left -= 1
                if lease.more:
                    continue
                if left <= 0 and not of_total:
                    self.announce(experts)
                yield together
                together = []
                if not of_total:
                    self.announce(experts)
        _open.source = None


def check_shapes(x: Tensor, top_k_index: Tensor, weights: Tensor, hidden: int) -> None:
    """Raise ValueError unless x is [tokens, hidden], and ``top_k_index`` and ``weights`` are [tokens, top_k]."""
    shape = top_k_index.shape
    if x.shape != (shape[0], hidden) or weights.shape != shape:
        given = f"{[*x.shape]}, {[*shape]} and {[*weights.shape]}"
        raise ValueError(f"hidden states, experts and weights of shapes {given}, where hidden is {hidden}")


def refuse_copy(*_: object) -> NoReturn:
    """Refuse to copy or pickle a model with tiers, or a part of it. Raises MoetierError."""
    raise MoetierError(
        "A model with tiers can't be copied or pickled, because its experts belong to this process.",
        "Load the model again, in the process that uses it; to keep it, copy its model directory.",
    )


def release_open_leases() -> None:
    """End leases of this thread that an exception has left open."""
    if (cut := getattr(_open, "source", None)) is not None:
        _open.source = None
        with suppress(MoetierError):  # the source may be closed, or belong to another process
            cut.release_leases()


def group_by_expert(top_k_index: Tensor, experts: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Return for each expert that is used, in ascending order, the tokens that use it and its positions in their top-k.

    ``top_k_index`` is [tokens, top_k]. Both tensors of an expert are [n] if n tokens use it. They are in the order of
    the eager forward pass, by position and then by token. Indices of ``experts`` or more are ignored; with expert
    parallelism they mean an expert of another device. Waits for the device once.
    """
    tokens = len(top_k_index)
    index = top_k_index.T.reshape(-1).clamp(max=experts)  # by position, then by token
    counts = index.new_zeros(experts + 1).index_add_(0, index, torch.ones_like(index))
    order = torch.argsort(index, stable=True)
    positions, by_expert = order // tokens, order % tokens
    tokens_of, start = {}, 0
    for expert, count in enumerate(counts[:-1].tolist()):
        if count:
            tokens_of[expert] = (by_expert[start : start + count], positions[start : start + count])
            start += count
    return tokens_of
