"""Decode matrices in the codings in which checkpoints store them (``Projection.coding``).

A weight is a number of the coding times the scale of its group, computed in fp32 as the format's own decoder does:

    e2m1    FP4 numbers, two in a byte, the low half first. With scales e8m0 this is MXFP4; with e4m3 and an fp32 number
            for each part it is NVFP4: the scale is first multiplied or divided by that number
    int4    u - 8 for a code u of 4 bits, in the same order: compressed-tensors' "pack-quantized"
    e4m3    FP8 numbers (float8_e4m3fn)

The codings of GGUF files have their scales among the codes. ``gguf_blocks`` decodes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moetier.tiers.layout import GGUF_BLOCKS, Projection

from .gguf_blocks import decode_blocks

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_STORED_AS = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}  # torch's types of scales that are bytes


def _nibbles(codes: Tensor) -> Tensor:
    """Return the halves of bytes, the low half first: [rows, bytes] -> [rows, columns]."""
    return torch.stack((codes & 15, codes >> 4), 2).flatten(1)


_NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {  # by coding: uint8 [rows, bytes] -> fp32 [rows, columns]
    "e2m1": lambda codes: torch.tensor(E2M1, device=codes.device)[_nibbles(codes).int()],
    "int4": lambda codes: _nibbles(codes).float() - 8,
    "e4m3": lambda codes: codes.view(torch.float8_e4m3fn).float(),
}


def decode_rows(views: Mapping[str, Tensor], p: Projection, start: int, stop: int) -> Tensor:
    """Return the weights of rows ``start`` to ``stop`` of a projection with a coding, fp32 [stop - start, columns].

    ``views`` has the projection's sections by their names.
    """
    codes = views[f"{p.name}.codes"][start:stop]
    if p.coding in GGUF_BLOCKS:
        return decode_blocks(codes, p.coding)
    scales = _scales(views, p, start, stop).repeat_interleave(p.group, 1)
    return _NUMBERS[p.coding](codes).mul_(scales[:, : p.columns])


def _scales(views: Mapping[str, Tensor], p: Projection, start: int, stop: int) -> Tensor:
    """Return the scales of rows ``start`` to ``stop``, fp32 [stop - start, groups of a row]."""
    stored = views[f"{p.name}.scales"]
    rows = torch.arange(start, stop, device=stored.device)
    part, row = rows // p.part_rows, rows % p.part_rows
    scales = stored[part * p.grid[0] + row // p.block_rows]
    scales = scales.view(_STORED_AS.get(p.scales, scales.dtype)).float()
    if p.globals:
        factors = views[f"{p.name}.globals"][part].unsqueeze(1)
        scales = scales * factors if p.globals == "multiply" else scales / factors
    return scales
