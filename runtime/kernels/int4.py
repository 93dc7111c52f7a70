"""Kernels that multiply with quantised records by an int4 matrix product of torch.

A weight is w = (q - 8) * s + b, in bf16, with a code q of 4 bits and a pair (s, b) for each group. Codes of 4 and 8
bits are arranged once in the order that the product needs, in the device's slots, after they were copied there. Codes
of 3 and 2 bits are arranged for each product, in scratch memory, because expanded they would not fit their slot.
"""

from __future__ import annotations

import warnings
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moetier.runtime.kernels.products.api import Kernels
from moetier.tiers.layout import PAIR_TYPES, ROW_TILE, Projection, RecordLayout
from moetier.tiers.quant.codec import decode, encode, expand, layout_for, sections
from moetier.tiers.quant.packing import load_pairs

GROUPS = (32, 64, 128, 256)  # group sizes that torch's int4 product supports
TILE_WEIGHTS = 2**24  # most weights arranged at a time, which takes some tens of MiB of temporary memory
_PLANES = {8: ("high", "low"), 4: ("codes",)}  # bits -> planes of codes that are arranged in place


class Int4(Protocol):
    """An int4 matrix product of torch, on one kind of device."""

    def arrange(self, nibbles: Tensor, columns: int) -> Tensor:
        """Arrange codes in the order that the product needs.

        ``nibbles`` are the codes in kernel order (tiers/quant/packing.py), uint8 [rows * columns / 2], with rows a
        multiple of 64. Returns as many bytes; those of the first rows come first.
        """

    def multiply(self, x: Tensor, arranged: Tensor, group: int, pairs: Tensor) -> Tensor:
        """Multiply x bf16 [tokens, columns] -> bf16 [tokens, rows].

        ``arranged`` are codes uint8 [rows * columns / 2], as ``arrange`` returns them; ``pairs`` are bf16 [columns /
        group, rows, 2].
        """


class _Int4Plan:
    """Locations of a projection's codes and of its groups' (scale, offset) pairs in a record."""

    __slots__ = ("codes", "fused", "layout", "pairs", "projection")

    def __init__(self, layout: RecordLayout, name: str) -> None:
        self.layout = layout  # kept alive, because plans are found by its id()
        self.projection = p = layout.projection(name)
        self.fused = _is_fused(p)
        planes = _PLANES.get(p.bits, ()) if self.fused else ()
        self.codes = [layout.section(f"{name}.{plane}") for plane in planes]
        # None: pairs are stored in 8 bits and decoded for each product, or the product is not used
        self.pairs = layout.section(f"{name}.pairs") if self.fused and p.pairs == "bfloat16" else None

    def pairs_of(self, record: Tensor) -> Tensor:
        """Return the pairs in a record, bf16 [columns / group, rows, 2]."""
        p, s = self.projection, self.pairs
        if s is None:
            return load_pairs(p, sections(record, self.layout, of=p.name), 0, p.padded_rows)
        return record[s.offset : s.offset + s.nbytes].view(torch.bfloat16).view(s.shape)


class FusedKernels(Kernels):
    """Kernels of a device with an int4 product. x is rounded to bf16.

    Projections in the coding of a checkpoint, with zero points, or with a group size that the product does not support,
    are decoded.
    """

    def __init__(self, device: torch.device | str, int4: Int4) -> None:
        super().__init__(device)
        self.arrange = self._arrange
        self._int4 = int4
        self._plans: dict[tuple[int, str], _Int4Plan] = {}
        # a matrix with codes of 8 bits is the sum of two with codes of 4 bits, whose pairs are (16 s, b) and (s, 8 s)
        self._of_pairs = torch.tensor([16.0, 1.0], dtype=torch.bfloat16, device=self.device)
        self._of_steps = torch.tensor([1.0, 8.0], dtype=torch.bfloat16, device=self.device)

    def project(self, x: Tensor, record: Tensor, layout: RecordLayout, name: str, bias: Tensor | None = None) -> Tensor:
        """Multiply as ``Kernels.project`` does, [tokens, columns] -> [tokens, rows], but not bit for bit.

        ``record`` must have been prepared by ``arrange``.
        """
        plan = self._plans.get((id(layout), name))
        if plan is None:
            plan = self._plans[id(layout), name] = _Int4Plan(layout, name)
        p = plan.projection
        if not plan.fused:
            return super().project(x, record, layout, name, bias)
        assert x.shape[1] == p.columns, f"{name} takes {p.columns} numbers, not {x.shape[1]}"
        rounded = x.to(torch.bfloat16).contiguous()
        codes, pairs = [record[s.offset : s.offset + s.nbytes] for s in plan.codes], plan.pairs_of(record)
        if p.bits == 8:
            y = self._int4.multiply(rounded, codes[0], p.group, pairs * self._of_pairs).to(x.dtype)
            y += self._int4.multiply(rounded, codes[1], p.group, pairs[:, :, :1] * self._of_steps)
        else:
            codes = codes or [self._expanded(sections(record, layout, of=name), p)]
            y = self._int4.multiply(rounded, codes[0], p.group, pairs).to(x.dtype)
        if p.rows < p.padded_rows:
            y = y[:, : p.rows].contiguous()
        return y if bias is None else y.add_(bias)

    def _arrange(self, record: Tensor, layout: RecordLayout) -> None:
        """Arrange the codes of a record in place, on the current stream. Call it once for a record."""
        for p in filter(_is_fused, layout.projections):
            views = sections(record, layout, of=p.name)
            for plane in _PLANES.get(p.bits, ()):
                codes = views[f"{p.name}.{plane}"].view(p.padded_rows, -1)
                for tile in _tiles(p):
                    codes[tile] = self._int4.arrange(codes[tile].view(-1), p.columns).view(-1, p.columns // 2)

    def _expanded(self, views: dict[str, Tensor], p: Projection) -> Tensor:
        """Expand and arrange codes of 3 or 2 bits -> uint8 [rows * columns / 2]."""
        codes = self._scratch((p.padded_rows, p.columns // 2), torch.uint8)
        for tile in _tiles(p):
            nibbles = expand(views, p, tile.start, tile.stop)
            codes[tile] = self._int4.arrange(nibbles, p.columns).view(-1, p.columns // 2)
        return codes.view(-1)


def _is_fused(p: Projection) -> bool:
    return p.bits != 16 and p.pairs in PAIR_TYPES and p.group in GROUPS


def _tiles(p: Projection) -> list[slice]:
    """Divide the rows of a projection into slices, each a multiple of ROW_TILE long."""
    rows = max(1, TILE_WEIGHTS // p.columns // ROW_TILE) * ROW_TILE
    return [slice(start, min(start + rows, p.padded_rows)) for start in range(0, p.padded_rows, rows)]


def fused_or_plain(device: torch.device, int4: Int4) -> Kernels:
    """Return FusedKernels if they multiply small matrices correctly, else Kernels, with a warning."""
    kernels = FusedKernels(device, int4)
    try:
        why = "" if all(_multiplies(kernels, group) for group in GROUPS) else "its results are wrong"
    except (RuntimeError, AttributeError) as error:
        why = str(error)
    if not why:
        return kernels
    warnings.warn(
        f"torch's product with 4-bit codes can't be used on {device} ({why}): experts are decoded for each product, "
        "which is slow.",
        RuntimeWarning,
        stacklevel=3,
    )
    return Kernels(device)


def _multiplies(kernels: FusedKernels, group: int) -> bool:
    """Return whether a product with a small matrix equals that with its decoded weights, except for rounding."""
    name, rows, columns = "weight", ROW_TILE, 2 * group
    layout = layout_for({name: ((rows, columns), "bfloat16")}, bits=4, group=group, pairs="bfloat16")
    generator = torch.Generator().manual_seed(group)
    out = np.empty(layout.record_bytes, np.uint8)
    encode({name: torch.randn(rows, columns, generator=generator)}, layout, out, fast=True)
    record = torch.from_numpy(out).to(kernels.device)
    weights = decode(record, layout, name, torch.empty(rows, columns, device=kernels.device))
    kernels._arrange(record, layout)
    # 17 tokens: more than one tile of them
    x = torch.randn(17, columns, generator=generator).to(kernels.device, torch.bfloat16)
    ideal = x.float() @ weights.T
    found = (kernels.project(part, record, layout, name).float() for part in (x, x[:1]))
    return all(float((y - ideal[: len(y)]).norm()) < 0.01 * float(ideal[: len(y)].norm()) for y in found)
