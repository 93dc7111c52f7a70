"""Matrices that HQQ, AWQ or GPTQ has quantised. Their records keep codes, scales and zero points as they are.

A weight is (c - z) * s, with its code c, and with the scale s and the zero point z of its group, which are ``group``
neighbouring weights of a row. As in hqq, AWQ and GPTQ, the result of each operation is rounded to the type of s and z.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moetier.tiers.layout import ROW_TILE, Projection

from .packing import fold, to_kernel_order


class Levels(NamedTuple):
    """Codes of a matrix, uint8 [rows, columns]; scales and zero points, [rows, columns / group], of one type."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def weights(self) -> Tensor:
        """Return the weights, [rows, columns] in the type of the scales."""
        w = self.codes.reshape(*self.scales.shape, -1).to(self.scales.dtype)
        return w.sub_(self.zeros.unsqueeze(2)).mul_(self.scales.unsqueeze(2)).view(self.codes.shape)


def store(levels: Levels, p: Projection, views: Mapping[str, Tensor]) -> None:
    """Write a matrix into the sections of a projection.

    ``views`` is a dictionary from the names of its record's sections to tensors, which must be zeros.
    """
    pairs = views[f"{p.name}.pairs"]  # [columns / group, padded rows, 2]
    pairs[:, : p.rows, 0], pairs[:, : p.rows, 1] = levels.scales.T, levels.zeros.T
    padded = F.pad(levels.codes, (0, 0, 0, p.padded_rows - p.rows))
    codes = padded.view(-1, ROW_TILE, p.columns).transpose(1, 2)  # [padded rows / 64, columns, 64]
    if p.bits == 8:
        to_kernel_order(codes & 0xF, views[f"{p.name}.low"].view(-1))
        to_kernel_order(codes >> 4, views[f"{p.name}.high"].view(-1))
    elif p.bits == 4:
        to_kernel_order(codes, views[f"{p.name}.codes"].view(-1))
    else:
        nibbles = torch.empty(p.padded_rows * p.columns // 2, dtype=torch.uint8)
        to_kernel_order(codes, nibbles)
        fold(nibbles, 2, views[f"{p.name}.codes"])
        if p.bits == 3:
            fold(nibbles >> 2, 4, views[f"{p.name}.plane"])
