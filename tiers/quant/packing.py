"""Where each code lies: the byte order of torch's AVX-512 int4 kernel, and fewer than four bits folded out of it.

*Kernel order*: codes of 4 bits, [N, K] with N a multiple of 64. For each block of 64 rows, for each column k, 32 bytes;
byte i holds row i in its low nibble and row i + 32 in its high one. It is what
``torch.ops.aten._convert_weight_to_int4pack_for_cpu`` makes on a CPU with AVX-512.

*Folded*: 4 / parts bits of each nibble are kept, parts = 2 or 4. The bytes in kernel order are cut into that many
consecutive parts of equal length; stored byte j unites byte j of every part, moved up by its number times the width.
So unfolding is elementwise, never a permutation. With parts = 1 nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from moetier.tiers.layout import PAIR_BLOCK, ROW_TILE, Projection

HALF = ROW_TILE // 2
BAND_WEIGHTS = 2**19  # where there are as many: 2 MiB in fp32. Fewer, and workers queue for the interpreter's lock
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


def store_pairs(
    values: Tensor, which: int, projection: Projection, sections: Mapping[str, Tensor], start: int
) -> Tensor:
    """Writes s (``which`` 0) or b (1) of the rows from ``start`` on, fp32 [K / g, rows], into the pair sections.

    Padding rows are among them: zeros are written for these. 8-bit pairs take all rows at once.
    Returns what will be read, fp32 [K / g, rows]; zeros for padding rows.
    """
    groups, rows = values.shape
    real = min(rows, projection.rows - start)  # rows that are no padding
    component = sections[f"{projection.name}.pairs"][:, start : start + rows, which]  # [K / g, rows]
    if projection.pairs == "bfloat16":
        component[:, :real] = values[:, :real]
    else:
        assert rows == projection.padded_rows
        # padding repeats a real value: it must not widen the range of its run
        padded = F.pad(values[:, :real], (0, rows - real), mode="replicate").reshape(1, -1)
        scales = sections[f"{projection.name}.pair_scales"]
        runs = F.pad(padded, (0, len(scales) * PAIR_BLOCK - padded.shape[1]), mode="replicate").view(-1, PAIR_BLOCK)
        low, high = runs.aminmax(dim=1)
        scales[:, which, 0] = (high - low) / 255
        scales[:, which, 1] = low
        scale, minimum = scales[:, which].float().unsqueeze(2).unbind(1)  # [runs, 1] each
        codes = torch.where(scale > 0, (runs - minimum) / scale, 0.0).round_().clamp_(0, 255)
        component[:, :real] = codes.view(-1)[: padded.shape[1]].view(groups, -1)[:, :real]
    component[:, real:] = 0
    read = load_pairs(projection, sections, start, start + rows)[:, :, which].float()
    read[:, real:] = 0
    return read


def load_pairs(projection: Projection, sections: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
    """bf16 [K / g, stop - start, 2]: the pairs of these rows, as torch's int4 kernel takes them for all rows."""
    pairs = sections[f"{projection.name}.pairs"]
    if projection.pairs == "bfloat16":
        return pairs[:, start:stop]
    scales = sections[f"{projection.name}.pair_scales"].float()  # [runs, 2, 2]
    groups, rows, _ = pairs.shape
    first = torch.arange(groups, device=pairs.device)[:, None] * rows
    run = (first + torch.arange(start, stop, device=pairs.device)) // PAIR_BLOCK  # [K / g, rows]
    scale, minimum = scales[run].unbind(3)  # [K / g, rows, 2] each
    return (pairs[:, start:stop].float().mul_(scale).add_(minimum)).bfloat16()


def band_bytes(projection: Projection, itemsize: int) -> int:
    """What quantising a projection of weights of ``itemsize`` bytes takes beside them and its record: Bands, and the
    codes of one band as int16 and as bytes."""
    return _blocks_of(projection) * projection.columns * ROW_TILE * (itemsize + 4 * 4 + 2 + 1)


def _blocks_of(projection: Projection) -> int:
    """Of a band, at most."""
    blocks = projection.padded_rows // ROW_TILE
    return min(blocks, max(1, BAND_WEIGHTS // (projection.columns * ROW_TILE)))


class Bands:
    """Cuts ``weights`` [N, K], padded with rows of zeros to a multiple of ROW_TILE, into bands: ranges of blocks."""

    def __init__(self, weights: Tensor, projection: Projection) -> None:
        self._weights = weights
        self._group = projection.group
        self._groups = projection.columns // projection.group
        self._blocks = projection.padded_rows // ROW_TILE
        self._size = _blocks_of(projection)
        self._stored = torch.empty(self._size, projection.columns, ROW_TILE, dtype=weights.dtype)
        self._buffers = torch.empty(4, self._size * self._groups, self._group, ROW_TILE)
        self._transposed: range | None = None  # whose weights the first buffer holds

    def __iter__(self) -> Iterator[range]:
        for first in range(0, self._blocks, self._size):
            yield range(first, min(first + self._size, self._blocks))

    def transpose(self, band: range) -> Tensor:
        """fp32 [n, g, ROW_TILE], valid until another band is turned; not to be written to."""
        turned = self._buffers[0, : len(band) * self._groups]
        if band != self._transposed:
            stored = self._stored[: len(band)]
            for place, block in zip(stored, band, strict=True):
                rows = self._weights[block * ROW_TILE : (block + 1) * ROW_TILE]
                place[:, : len(rows)] = rows.T  # of one type, and whole rows: torch is five times faster so
                place[:, len(rows) :] = 0
            turned.copy_(stored.view(turned.shape))
            self._transposed = band
        return turned

    def scratch(self, band: range) -> Tensor:
        """fp32 [3, n, g, ROW_TILE], for whatever is done to a band. Allocated once, as pages are slow to come."""
        return self._buffers[1:, : len(band) * self._groups]

    def by_rows(self, values: Tensor) -> Tensor:
        """One value for each group, [n, 1, ROW_TILE] -> [K / g, rows of the band]."""
        return values.view(-1, self._groups, ROW_TILE).transpose(0, 1).reshape(self._groups, -1)

    def by_blocks(self, values: Tensor) -> Tensor:
        """The inverse of ``by_rows``."""
        return values.reshape(self._groups, -1, ROW_TILE).transpose(0, 1).reshape(-1, 1, ROW_TILE)
