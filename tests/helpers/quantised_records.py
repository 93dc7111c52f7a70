"""Records with one quantised projection, for the kernels that multiply with them."""

from __future__ import annotations

import numpy as np
import torch

from moetier.tiers.layout import Bits, RecordLayout
from moetier.tiers.quant.codec import encode, layout_for


def quantised(bits: Bits, rows: int, columns: int, group: int, pairs: str) -> tuple[RecordLayout, torch.Tensor]:
    """A record of normally distributed weights "up_proj" [rows, columns], and its layout."""
    layout = layout_for({"up_proj": ((rows, columns), "bfloat16")}, bits=bits, group=group, pairs=pairs)
    weights = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits)) * 0.02
    out = np.empty(layout.record_bytes, np.uint8)
    encode({"up_proj": weights}, layout, out, fast=True)
    return layout, torch.from_numpy(out)
