"""Quantise weights in compiled code, to the same bytes that ``tiers.quant`` computes with torch.

The compiled code does the operations of ``hqq`` and ``codec`` in the same order, and fuses none of them. So the bytes
are the same on every processor, and the same as those of torch. ``quantise_code`` and ``pairs_code`` emit
it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from moetier.runtime.kernels.jit.processor import Processor, refusal, this_processor
from moetier.tiers.layout import ROW_TILE, Projection, RecordLayout
from moetier.tiers.quant import codec
from moetier.tiers.quant.codec import WeightDeviation
from moetier.tiers.quant.packing import HALF, fold, load_pairs
from moetier.tiers.quant.zero_points import Levels

from .pairs_code import pairs_kernel
from .quantise_code import QuantiserPass, QuantiserVariant, quantising_kernel, solver_table


def encode(
    tensors: Mapping[str, Tensor | Levels], layout: RecordLayout, out: memoryview | np.ndarray, *, fast: bool = False
) -> dict[str, WeightDeviation]:
    """Encode one expert as ``codec.encode`` does, in compiled code if this machine can compile it.

    ``tensors`` has matrices [rows, columns], or [columns, rows] if transposed, or Levels, and biases [size].
    """
    return codec.encode(tensors, layout, out, fast=fast, quantise=None if refusal() else quantise)


def quantise(
    weights: Tensor, p: Projection, views: Mapping[str, Tensor], fast: bool, processor: Processor | None = None
) -> WeightDeviation:
    """Quantise ``weights`` [rows, columns] of one projection on one thread, and return the deviation of what is stored.

    The result is written into ``views``, which has the sections of the record by name. Raises CheckpointError as
    ``codec.encode`` does.
    """
    if 1 not in weights.stride():
        weights = weights.contiguous()
    work = _Work(weights, p, views, fast, processor or this_processor())
    if p.pairs == "bfloat16":
        work.run(QuantiserPass.ALL)
    else:
        # pairs are rounded in runs that cross row tiles, so each pass covers all rows before the next one begins
        for which, stage, values in ((0, QuantiserPass.SCALES, work.scales), (1, QuantiserPass.OFFSETS, work.offsets)):
            work.run(stage)
            work.store_pairs(values, which)
        work.run(QuantiserPass.CODES)
    deviation = work.deviation()
    # the squares of fp32 numbers don't overflow in fp64, so the second sum shows weights that are not finite
    if not (math.isfinite(deviation.squared) or (math.isfinite(deviation.squared_norm) and work.has_finite_pairs())):
        raise codec.not_finite(p)
    work.fold()
    return deviation


class _Work:
    """Memory for quantising one projection, and the runs of compiled functions over it."""

    def __init__(
        self, weights: Tensor, p: Projection, views: Mapping[str, Tensor], fast: bool, processor: Processor
    ) -> None:
        self._p, self._views = p, views
        self._processor = processor
        turned = weights.stride(1) != 1
        self._variant = QuantiserVariant(weights.dtype, turned, p.bits, p.group, fast, QuantiserPass.ALL)
        # if the last row tile is not full, it becomes a matrix of its own, padded with rows of zeros
        rest = p.rows % ROW_TILE
        self._parts = [(0, weights[: p.rows - rest])] if p.rows > rest else []
        if rest:
            last = torch.zeros((p.columns, ROW_TILE) if turned else (ROW_TILE, p.columns), dtype=weights.dtype)
            last = last.T if turned else last
            last[:rest] = weights[p.rows - rest :]
            self._parts.append((p.rows - rest, last))
        codes = (p.padded_rows, p.columns // 2)
        self._high = views.get(f"{p.name}.high")
        self._low = views[f"{p.name}.low" if p.bits == 8 else f"{p.name}.codes"]
        if p.bits in (3, 2):
            self._low = torch.empty(codes, dtype=torch.uint8)  # folded into the sections at the end
        self.scales, self.offsets = torch.empty(
            (2, p.columns // p.group, p.padded_rows) if p.pairs == "uint8" else (2, 0)
        )
        self._deviations = torch.empty(p.padded_rows // ROW_TILE, 2, dtype=torch.float64)
        self._table = solver_table()

    def run(self, stage: QuantiserPass) -> None:
        """Run the compiled function of a stage over all rows."""
        p, kernel = self._p, quantising_kernel(self._processor, self._variant._replace(stage=stage))
        for first, weights in self._parts:
            stride = weights.stride(1 if self._variant.turned else 0) * weights.dtype.itemsize
            tile, items = first // ROW_TILE, len(weights) // ROW_TILE
            codes = first * p.columns // 2
            context = array(
                "q",
                (
                    *(0, items, p.columns, weights.data_ptr(), stride, p.padded_rows),
                    self._views[f"{p.name}.pairs"].data_ptr() + 4 * first,
                    *(values.data_ptr() + 4 * first for values in (self.scales, self.offsets)),
                    self._low.data_ptr() + codes,
                    0 if self._high is None else self._high.data_ptr() + codes,
                    self._deviations.data_ptr() + 16 * tile,
                    self._table.buffer_info()[0],
                ),
            )
            kernel.run(context, 1)

    def store_pairs(self, values: Tensor, which: int) -> None:
        """Round scales (``which`` 0) or offsets (1) to 8 bits, and store them in the record.

        The bytes are those of ``packing.store_pairs``. ``values`` [columns / group, padded rows] is changed in place:
        it then holds the rounded values, as kernels will read them from the record. Padding rows become 0 in both.
        """
        p = self._p
        pairs, scales = (self._views[f"{p.name}.{section}"] for section in ("pairs", "pair_scales"))
        values[:, p.rows :] = values[:, p.rows - 1 : p.rows]
        addresses = (values.data_ptr(), pairs.data_ptr() + which, scales.data_ptr() + 4 * which)
        pairs_kernel(self._processor).run(array("q", (0, len(scales), values.numel(), *addresses)), 1)
        values[:, p.rows :] = 0
        pairs[:, p.rows :, which] = 0

    def deviation(self) -> WeightDeviation:
        """Return the deviation of the stored weights. Call this after the pass that finds the codes."""
        return WeightDeviation(*self._deviations.sum(0).tolist())

    def has_finite_pairs(self) -> bool:
        """Return whether the stored pairs are finite numbers."""
        return bool(load_pairs(self._p, self._views, 0, self._p.padded_rows).isfinite().all())

    def fold(self) -> None:
        """Set the codes of padding rows to 0, and fold codes of 3 and 2 bits into the record."""
        p = self._p
        if rest := p.rows % ROW_TILE:
            for plane in (self._low, self._high):
                if plane is not None:
                    last = plane.view(-1, p.columns, HALF)[-1]
                    last[:, max(rest - HALF, 0) :] &= 0x0F
                    last[:, min(rest, HALF) :] &= 0xF0
        if p.bits in (3, 2):
            fold(self._low.view(-1), 2, self._views[f"{p.name}.codes"])
        if p.bits == 3:
            fold(self._low.view(-1) >> 2, 4, self._views[f"{p.name}.plane"])
