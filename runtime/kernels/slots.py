"""Kernels of a device that compute a block's experts together, from records as they lie in slots.

``SlotKernels`` offers them for a model's experts, in the place of the kernels that multiply with one matrix at a time.
They are used only if they compute small blocks correctly at the start.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moetier.runtime.kernels.experts.expert_code import Activation
from moetier.runtime.kernels.products.api import Kernels
from moetier.tiers.layout import PAIR_TYPES, WEIGHT_TYPES, ZERO_POINTS, Bits, RecordLayout
from moetier.tiers.quant.codec import encode, layout_for

TRIED: tuple[tuple[Bits, int], ...] = ((4, 1), (4, 17), (16, 1), (16, 17))  # bits and tokens of the trials


class Sums(Protocol):
    """Interface of the outputs of a block's experts, which are added up for each token."""

    def add(self, table: Tensor) -> None:
        """Queue the computation of experts, for all their tokens.

        ``table`` is int64 [experts], on the device: the address of each expert's record, or 0. No expert has an address
        in two calls.
        """

    def result(self) -> Tensor:
        """Return the sums over all experts of the calls of ``add``, of which there was one at least: [tokens, hidden].

        Their bits do not depend on which experts came in which call.
        """


class BlockKernels(Protocol):
    """Interface of kernels for a block's experts. All work is queued on the current stream."""

    def begin(self, x: Tensor, index: Tensor, weights: Tensor) -> Sums:
        """Begin to compute x [tokens, hidden] with ``weights`` [tokens, top_k] of the experts ``index``.

        ``index`` is int64 [tokens, top_k]; other numbers than those of the block's experts are ignored. All are
        contiguous.
        """


Make = Callable[[RecordLayout, Activation, int], BlockKernels]  # the int: the number of the block's experts


class SlotKernels(Kernels):
    """Kernels for experts' records as they lie. A block whose activation is not known is computed with decoded ones."""

    def __init__(self, trunk: Kernels, make: Make) -> None:
        """``trunk``: the kernels of the trunk, on the same device. ``make`` makes kernels for a block."""
        super().__init__(trunk.device)
        self._trunk = trunk
        self.block = make

    def on_out_of_memory(self, make_room: Callable[[], int]) -> None:
        """Register ``make_room`` for the trunk's kernels, too."""
        super().on_out_of_memory(make_room)
        self._trunk.on_out_of_memory(make_room)


def can_compute(layout: RecordLayout) -> bool:
    """Return whether the kernels compute with records of a layout: with 4 bits or 16, in no coding of a checkpoint."""
    return all(
        not p.coding
        and ((p.bits == 4 and p.pairs in (*PAIR_TYPES, *ZERO_POINTS)) or (p.bits == 16 and p.dtype in WEIGHT_TYPES))
        for p in layout.projections
    )


def slot_kernels(trunk: Kernels, layouts: Collection[RecordLayout], make: Make) -> SlotKernels | None:
    """Return SlotKernels if they can compute with all ``layouts``, and compute small blocks correctly; else None.

    Warns if they should compute small blocks, and do not.
    """
    if not all(map(can_compute, layouts)):
        return None
    try:
        why = "" if all(_computes(trunk.device, make, *trial) for trial in TRIED) else "their results are wrong"
    except Exception as error:  # a compiler raises errors of many types
        why = f"{type(error).__name__}: {error}"
    if not why:
        return SlotKernels(trunk, make)
    warnings.warn(
        f"The kernels for a block's experts can't be used on {trunk.device} ({why}): experts are computed one by one.",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def _computes(device: torch.device, make: Make, bits: Bits, tokens: int) -> bool:
    """Return whether a small block equals that with decoded weights, except for rounding."""
    hidden, inner, experts = 128, 64, 2
    shapes = {"gate_up_proj": ((2 * inner, hidden), "bfloat16"), "down_proj": ((hidden, inner), "bfloat16")}
    layout, generator = layout_for(shapes, bits=bits), torch.Generator().manual_seed(tokens)
    slots = torch.zeros((experts, layout.slot_bytes), dtype=torch.uint8)
    for slot in slots:
        weights = {name: torch.randn(shape, generator=generator) for name, (shape, _) in shapes.items()}
        out = np.zeros(layout.record_bytes, np.uint8)
        encode(weights, layout, out, fast=True)
        slot[: len(out)] = torch.from_numpy(out)
    slots = slots.to(device)
    x = torch.randn((tokens, hidden), generator=generator).to(device, torch.bfloat16)
    index = torch.arange(experts, device=device).expand(tokens, experts).contiguous()
    sums = make(layout, Activation(), experts).begin(x, index, torch.ones((tokens, experts), device=device))
    plain, ideal = Kernels(device), torch.zeros((tokens, hidden), device=device)
    for expert, slot in enumerate(slots):
        table = torch.zeros(experts, dtype=torch.int64, device=device)
        table[expert] = slot.data_ptr()
        sums.add(table)
        gate, up = plain.project(x.float(), slot, layout, "gate_up_proj").chunk(2, -1)
        ideal += plain.project(F.silu(gate) * up, slot, layout, "down_proj")
    return float((sums.result().float() - ideal).norm()) < 0.01 * float(ideal.norm())
