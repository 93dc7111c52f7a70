"""TieredBlock: the state of a block whose experts are in tiers, and the leases of its records.

``Elsewhere`` is the interface of computing its experts on other hosts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from moetier.runtime.kernels.experts.expert_kernels import ExpertKernels
from moetier.runtime.kernels.products.api import Kernels
from moetier.tiers.errors import MoetierError
from moetier.tiers.layout import ExpertKey, RecordLayout
from moetier.tiers.source import ExpertSource, Lease

from .snapshot import Trials

_open = threading.local()  # ``source``: the source of this thread's leases that have not ended regularly

# for each expert: the numbers of the rows of x that it computes, and the row of the outputs for each
Rows = Mapping[int, tuple[Sequence[int], Sequence[int]]]


class Sent(Protocol):
    """Interface of computations that other hosts do."""

    @property
    def experts(self) -> Collection[int]:
        """The experts that are computed elsewhere."""

    def collect(self, outputs: int) -> list[int]:
        """Wait for the outputs, and write them to their rows of ``outputs``, an address.

        Return the experts that no host has computed.
        """

    def close(self) -> None:
        """Cancel what is not collected. Idempotent."""


class Elsewhere(Protocol):
    """Interface of an object that has experts computed on other hosts."""

    def note(self, block: int, experts: Sequence[int]) -> None:
        """Note that one token has used experts of a block, which are all here."""

    def send(self, products: ExpertKernels, block: int, x: int, tokens: int, rows: Rows) -> Sent:
        """Begin to compute those experts of ``rows`` that are better computed elsewhere.

        ``x`` is the address of the hidden states [tokens, hidden]. The caller closes the result.
        """


@dataclass(frozen=True, slots=True)
class TieredBlock:
    """State of an experts module whose parameters were removed, stored as the module's attribute ``tiered``."""

    block: int  # number of the block
    layout: RecordLayout
    source: ExpertSource[Tensor]
    kernels: Kernels
    device: torch.device  # device of the records
    # called once for each demand with the block and the experts
    demanded: Callable[[int, Collection[int]], None] | None = None
    # by type of the hidden states and parts of the module: kernels for the quick way. Without kernels (None) the block
    # is computed in the exact way
    compiled: dict[Any, Trials[ExpertKernels]] = field(default_factory=dict)
    elsewhere: Elsewhere | None = None  # computes absent experts on other hosts, if the quick way is used

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_copy()


def refuse_copy(*_: object) -> NoReturn:
    """Refuse to copy or pickle a model with tiers, or a part of it. Raises MoetierError."""
    raise MoetierError(
        "A model with tiers can't be copied or pickled, because its experts belong to this process.",
        "Load the model again, in the process that uses it; to keep it, copy its model directory.",
    )


def end_open_leases() -> None:
    """End leases of this thread that an exception has left open."""
    if (cut := getattr(_open, "source", None)) is not None:
        _open.source = None
        with suppress(MoetierError):  # the source may be closed, or belong to another process
            cut.reclaim()


def groups(here: TieredBlock, experts: Collection[int]) -> Generator[list[Lease[Tensor]], None, None]:
    """Lease a block's experts, and yield lists of leases that are valid at the same time.

    Records are uint8 [record bytes]. ``here.demanded`` is called once. If all experts are available together, it is
    called before they are yielded. Otherwise it is called after the first list has been computed: at that time other
    experts are still being read, so the call delays nothing.
    """
    _open.source = here.source
    left = len(experts)
    demanded = here.demanded  # set to None once it was called
    with closing(here.source.acquire([ExpertKey(here.block, expert) for expert in experts])) as leases:
        group = []
        for lease in leases:
            group.append(lease)
            left -= 1
            if lease.more:
                continue
            if demanded is not None and left <= 0:
                demanded(here.block, experts)
                demanded = None
            yield group
            group = []
            if demanded is not None:
                demanded(here.block, experts)
                demanded = None
    _open.source = None


def rows_of_experts(top_k_index: Tensor, experts: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Return for each expert that is used, in ascending order, the tokens that use it and its positions in their top-k.

    ``top_k_index`` is [tokens, top_k]. Both tensors of an expert are [n] if n tokens use it. They are in the order of
    the eager forward pass, by position and then by token. Indices of ``experts`` or more are ignored; with expert
    parallelism they mean "computed elsewhere". Waits for the device once.
    """
    tokens = len(top_k_index)
    index = top_k_index.T.reshape(-1).clamp(max=experts)  # by position, then by token
    counts = index.new_zeros(experts + 1).index_add_(0, index, torch.ones_like(index))
    order = torch.argsort(index, stable=True)
    positions, by_expert = order // tokens, order % tokens
    rows, start = {}, 0
    for expert, count in enumerate(counts[:-1].tolist()):
        if count:
            rows[expert] = (by_expert[start : start + count], positions[start : start + count])
            start += count
    return rows
