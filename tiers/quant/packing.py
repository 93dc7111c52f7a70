"""Where each code lies: the byte order of torch's AVX-512 int4 kernel, and fewer than four bits folded out of it.

*Kernel order*: codes of 4 bits, [N, K] with N a multiple of 64. For each block of 64 rows, for each column k, 32 bytes;
byte i holds row i in its low nibble and row i + 32 in its high one. It is what
``torch.ops.aten._convert_weight_to_int4pack_for_cpu`` makes on a CPU with AVX-512.

*Folded*: 4 / parts bits of each nibble are kept, parts = 2 or 4. The bytes in kernel order are cut into that many
consecutive parts of equal length; stored byte j unites byte j of every part, moved up by its number times the width.
So unfolding is elementwise, never a permutation. With parts = 1 nothing changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetier.tiers.layout import ROW_TILE

HALF = ROW_TILE // 2
MASKS = {1: 0xFF, 2: 0x33, 4: 0x11}  # by parts: the low 4 / parts bits of both nibbles


def to_kernel_order(codes: Tensor, out: Tensor) -> None:
    """uint8 [N / 64, K, 64], values 0..15, rows innermost -> ``out`` uint8 [N * K / 2]."""
    blocks, columns, _ = codes.shape
    torch.add(codes[..., :HALF], codes[..., HALF:], alpha=16, out=out.view(blocks, columns, HALF))


def from_kernel_order(nibbles: Tensor, columns: int) -> Tensor:
    """uint8 [N * K / 2] -> uint8 [N, K]."""
    packed = nibbles.view(-1, columns, HALF).transpose(1, 2)  # [N / 64, 32, K]
    return torch.stack((packed & 0xF, packed >> 4), 1).view(-1, columns)


def pair_columns(nibbles: Tensor, columns: int) -> Tensor:
    """uint8 [N * K / 2] -> uint8 [N, K / 2], row by row: a byte holds an even column in its high nibble, the next one
    in its low."""
    even, odd = nibbles.view(-1, columns // 2, 2, HALF).unbind(2)  # [N / 64, K / 2, 32] each
    upper, lower = (even << 4) | (odd & 0xF), (even & 0xF0) | (odd >> 4)  # of rows 0 to 31, and 32 to 63, of each block
    return torch.stack((upper, lower), 1).transpose(2, 3).reshape(-1, columns // 2)


def fold(nibbles: Tensor, parts: int, out: Tensor) -> None:
    """uint8 [n] in kernel order -> ``out`` uint8 [n / parts]: the low 4 / parts bits of each nibble."""
    width = 4 // parts
    out.zero_()
    for number, part in enumerate(nibbles.view(parts, -1)):
        out |= (part & MASKS[parts]) << (width * number)


def unfold(folded: Tensor, parts: int, start: int, stop: int) -> Tensor:
    """uint8 [n / parts] -> uint8 [stop - start]: those bytes of the n in kernel order."""
    width, length = 4 // parts, len(folded)
    pieces = []
    for number in range(start // length, -(-stop // length)):
        first, last = max(start - number * length, 0), min(stop - number * length, length)
        pieces.append((folded[first:last] >> (width * number)) & MASKS[parts])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
