"""Records with one quantised projection, for the kernels that multiply with them."""

from __future__ import annotations

import numpy as np
import torch

from moetier.tiers.layout import ZERO_POINTS, Bits, Projection, RecordLayout
from moetier.tiers.quant.codec import encode, layout_for
from moetier.tiers.quant.zero_points import Levels


def quantised(bits: Bits, rows: int, columns: int, group: int, pairs: str) -> tuple[RecordLayout, torch.Tensor]:
    """A record of normally distributed weights "up_proj" [rows, columns], and its layout."""
    if pairs in ZERO_POINTS:
        return with_zero_points(levels_at_random(bits, rows, columns, group, getattr(torch, ZERO_POINTS[pairs])), bits)
    layout = layout_for({"up_proj": ((rows, columns), "bfloat16")}, bits=bits, group=group, pairs=pairs)
    weights = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits)) * 0.02
    out = np.empty(layout.record_bytes, np.uint8)
    encode({"up_proj": weights}, layout, out, fast=True)
    return layout, torch.from_numpy(out)


def levels_at_random(bits: int, rows: int, columns: int, group: int, dtype: torch.dtype) -> Levels:
    """Any codes; scales of all signs and sizes, also 0 and denormal ones; zero points that are no integers."""
    random = torch.Generator().manual_seed(bits)
    groups = columns // group
    scales = torch.randn(rows, groups, generator=random) * 0.04 / 2**bits
    scales[::3, 0] = 3e-6
    scales[1::5, -1] = 0
    zeros = torch.rand(rows, groups, generator=random) * (2**bits + 1)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=random, dtype=torch.uint8)
    return Levels(codes, scales.to(dtype), zeros.to(dtype))


def with_zero_points(levels: Levels, bits: Bits, name: str = "up_proj") -> tuple[RecordLayout, torch.Tensor]:
    """The record of a matrix that was quantised with zero points, and its layout."""
    rows, columns = levels.codes.shape
    dtype = str(levels.scales.dtype).removeprefix("torch.")
    group = columns // levels.scales.shape[1]
    layout = RecordLayout((Projection(name, rows, columns, bits, dtype, False, group, f"{dtype}_zeros"),))
    out = np.full(layout.record_bytes, 0xA5, np.uint8)  # what was there before must not show
    encode({name: levels}, layout, out)
    return layout, torch.from_numpy(out)
