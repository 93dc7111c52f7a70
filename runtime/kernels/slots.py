"""Kernels of a device that compute a block's experts together, from records as they lie in slots.

``SlotKernels`` offers them for a model's experts, in the place of the kernels that multiply with one matrix at a time.
They are used only if they compute small blocks of the model's own forms correctly at the start.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moetier.runtime.kernels.experts.expert_code import Activation
from moetier.runtime.kernels.products.api import Kernels
from moetier.tiers.layout import PAIR_TYPES, WEIGHT_TYPES, ZERO_POINTS, RecordLayout
from moetier.tiers.quant.codec import encode, sections
from moetier.tiers.quant.zero_points import Levels

TOKENS = (1, 17)  # numbers of tokens of the trials


class Form(NamedTuple):
    """Layout, activation and type for which the kernels of a block are compiled."""

    layout: RecordLayout
    activation: Activation
    dtype: torch.dtype  # of the hidden states

    @property
    def first(self) -> str:
        """The name of an expert's first projection."""
        return "gate_up_proj" if self.activation.gated else "up_proj"


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

        ``index`` is int64 [tokens, top_k], without negative numbers; those that are not of the block's experts are
        ignored. All are contiguous.
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


def slot_kernels(trunk: Kernels, forms: Collection[Form], make: Make) -> SlotKernels | None:
    """Return SlotKernels if they can compute with all ``forms``, and compute small blocks of each correctly; else None.

    Warns if they should compute small blocks, and do not.
    """
    if not all(can_compute(form.layout) for form in forms):
        return None
    try:
        small = {form._replace(layout=_small(form)) for form in forms}
        is_right = all(_computes(trunk.device, make, form, tokens) for form in small for tokens in TOKENS)
        why = "" if is_right else "their results are wrong"
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


def _small(form: Form) -> RecordLayout:
    """Return the layout of a form with few rows and columns, and all else as it is."""
    hidden, inner = (max(128, form.layout.projection(name).group) for name in (form.first, "down_proj"))
    rows = {form.first: inner * (2 if form.activation.gated else 1), "down_proj": hidden}
    columns = {form.first: hidden, "down_proj": inner}
    return RecordLayout(
        tuple(replace(p, rows=rows[p.name], columns=columns[p.name]) for p in form.layout.projections),
        tuple(replace(bias, size=rows[bias.name.removesuffix("_bias")]) for bias in form.layout.biases),
    )


def _record(layout: RecordLayout, generator: torch.Generator) -> Tensor:
    """Return a slot with a record of random weights, uint8 [slot bytes]."""
    tensors: dict[str, Tensor | Levels] = {
        bias.name: torch.randn(bias.size, generator=generator) for bias in layout.biases
    }
    for p in layout.projections:
        tensors[p.name] = torch.randn(p.shape, generator=generator)
        if p.pairs in ZERO_POINTS:
            codes = torch.randint(16, (p.rows, p.columns), generator=generator, dtype=torch.uint8)
            scales, zeros = torch.rand((2, p.rows, p.columns // p.group), generator=generator)
            dtype = getattr(torch, ZERO_POINTS[p.pairs])
            tensors[p.name] = Levels(codes, (scales / 4).to(dtype), (zeros * 15).to(dtype))
    slot = np.zeros(layout.slot_bytes, np.uint8)
    encode(tensors, layout, slot[: layout.record_bytes], fast=True)
    return torch.from_numpy(slot)


def _computes(device: torch.device, make: Make, form: Form, tokens: int) -> bool:
    """Return whether a small block equals that with decoded weights, except for rounding."""
    experts, (layout, activation, dtype) = 2, form
    hidden, generator = layout.projection("down_proj").rows, torch.Generator().manual_seed(tokens)
    slots = torch.stack([_record(layout, generator) for _ in range(experts)]).to(device)
    x = (torch.randn((tokens, hidden), generator=generator) / 4).to(device, dtype)  # fp16 holds all results
    index = torch.arange(experts, device=device).expand(tokens, experts).contiguous()
    sums = make(layout, activation, experts).begin(x, index, torch.ones((tokens, experts), device=device))
    plain, ideal = Kernels(device), torch.zeros((tokens, hidden), device=device)

    def project(y: Tensor, slot: Tensor, name: str) -> Tensor:
        bias = sections(slot, layout).get(f"{name}_bias")
        product = plain.project(y, slot, layout, name)
        return product if bias is None else product + bias.float()

    for expert, slot in enumerate(slots):
        table = torch.zeros(experts, dtype=torch.int64, device=device)
        table[expert] = slot.data_ptr()
        sums.add(table)
        ideal += project(activate(activation, project(x.float(), slot, form.first)), slot, "down_proj")
    return float((sums.result().float() - ideal).norm()) < 0.01 * float(ideal.norm())


def activate(activation: Activation, x: Tensor) -> Tensor:
    """Apply an activation to x: [rows, 2 * columns], or without gates [rows, columns] -> [rows, columns]."""
    if not activation.gated:
        return _function(activation, x)
    gate, up = (x[:, ::2], x[:, 1::2]) if activation.interleaved else x.chunk(2, -1)
    gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return _function(activation, gate) * (up + activation.shift)


def _function(activation: Activation, x: Tensor) -> Tensor:
    match activation.function:
        case "silu":
            return x * torch.sigmoid(activation.alpha * x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu2":
            return F.relu(x).square()
