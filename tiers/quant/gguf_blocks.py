"""Decode weights that lie in the blocks of GGUF files, bit for bit as the package gguf's ``dequantize`` does.

Only a scale of MXFP4 that is NaN stays NaN.

A block has 32 or 256 consecutive weights of a row, and their scales. The layouts are those of ggml-common.h in
https://github.com/ggml-org/ggml. Each operation is rounded to fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moetier.tiers.layout import GGUF_BLOCKS

DOUBLED_E2M1 = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)


def _fp16(blocks: Tensor, at: int) -> Tensor:
    """Return the fp16 number at byte ``at`` of each block, as fp32 [blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(codes: Tensor, run: int) -> Tensor:
    """Return the low halves of each ``run`` of bytes, then their high halves: [blocks, bytes] -> [blocks, n, run]."""
    runs = codes.view(len(codes), -1, 1, run)
    return torch.cat([runs & 15, runs >> 4], 2).view(len(codes), -1, run)


def _q4_0(blocks: Tensor) -> Tensor:
    return _fp16(blocks, 0) * (_nibbles(blocks[:, 2:].contiguous(), 16).flatten(1).float() - 8)


def _q8_0(blocks: Tensor) -> Tensor:
    return _fp16(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8).float()


def _mxfp4(blocks: Tensor) -> Tensor:
    exponent = blocks[:, :1].int()
    # half of 2^(exponent - 127), with the two smallest as subnormal numbers
    bits = torch.where(exponent < 2, torch.full_like(exponent, 0x00200000) << exponent, (exponent - 1) << 23)
    bits.masked_fill_(exponent == 255, 0x7FC00000)  # NaN (OCP Microscaling Formats 1.0); gguf reads a number
    codes = _nibbles(blocks[:, 1:].contiguous(), 16).flatten(1)
    return bits.view(torch.float32) * torch.tensor(DOUBLED_E2M1, device=blocks.device)[codes.int()]


def _scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and minimum of the eight groups of each block, [blocks, 8, 1] each, from 6-bit numbers."""
    low, middle, high = blocks[:, 4:16].view(len(blocks), 3, 4).unbind(1)
    scale = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], 1)
    least = torch.cat([middle & 63, (high >> 4) | ((middle >> 2) & 48)], 1)
    return (_fp16(blocks, 0) * scale.float())[:, :, None], (_fp16(blocks, 2) * least.float())[:, :, None]


def _q4_k(blocks: Tensor) -> Tensor:
    scale, least = _scales(blocks)
    return (scale * _nibbles(blocks[:, 16:].contiguous(), 32).float() - least).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scale, least = _scales(blocks)
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[:, None, 16:48] >> shifts) & 1
    return (scale * (_nibbles(blocks[:, 48:].contiguous(), 32) | (high << 4)).float() - least).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].contiguous(), 64).view(len(blocks), 8, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[:, 128:192].view(len(blocks), 2, 1, 32) >> shifts) & 3
    codes = (low | (high.view(len(blocks), 8, 32) << 4)).float() - 32
    scale = _fp16(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (scale[:, :, None] * codes.view(len(blocks), 16, 16)).flatten(1)


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {  # by coding: uint8 [blocks, bytes] -> fp32 [blocks, weights]
    "q4_0": _q4_0, "q8_0": _q8_0, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k, "mxfp4": _mxfp4,
}  # fmt: skip


def decode_blocks(rows: Tensor, coding: str) -> Tensor:
    """Return the weights of rows of blocks: uint8 [rows, bytes of a row] -> fp32 [rows, columns]."""
    return _DECODERS[coding](rows.contiguous().view(-1, GGUF_BLOCKS[coding].nbytes)).view(len(rows), -1)
