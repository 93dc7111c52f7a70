"""Packing: the byte order of codes in a record, the storage of pairs, and the bands in which weights are quantised.

A *code* is the small integer to which a weight is quantised. Each group of weights has a *pair* (s, b) of scale and
offset. The docstring of ``codec`` has the formula.

*Kernel order* is the byte order of 4-bit codes [rows, columns] in torch's AVX-512 int4 kernel. The rows, a multiple of
64, are cut into row tiles of 64. A row tile has 32 bytes for each column: byte i holds the code of row i in its low
nibble, and the code of row i + 32 in its high nibble. On a CPU with AVX-512,
``torch.ops.aten._convert_weight_to_int4pack_for_cpu`` produces this order.

*Folding* removes unused bits. In kernel order a code has a nibble, of which a code of 2 bits or 1 bit uses only a part.
The bytes in kernel order are cut into ``parts`` consecutive parts of equal length: 2 parts for codes of 2 bits, 4 parts
for codes of 1 bit. In part p, each byte is shifted left by p times the bits of a code. Then the parts are combined into
one by bitwise OR. So unfolding needs only shifts and masks, no permutation.

Pairs are stored in bf16 or in 8 bits. For 8 bits, the groups, in [group, row] order, are cut into runs of PAIR_RUN. A
run has a scale and a minimum for its values of s, and others for its values of b, all in bf16. Each value is code *
scale + minimum, rounded to bf16. So kernels get bf16 pairs in either case.

A *band* is a few row tiles of a projection, which fit the processor's caches. Its weights are transposed to [row
tiles, columns, ROW_TILE], so that rows are the innermost dimension, as in kernel order. ``hqq`` takes them as [n, g,
ROW_TILE], where g is the group size and n is the number of row tiles times columns / g.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from moetier.tiers.layout import PAIR_RUN, ROW_TILE, Projection

HALF = ROW_TILE // 2
BAND_WEIGHTS = 2**19  # weights per band: 2 MiB in fp32; with fewer weights, worker threads would wait for the GIL
MASKS = {1: 0xFF, 2: 0x33, 4: 0x11}  # from the number of parts to a mask of the low 4 / parts bits of both nibbles


def to_kernel_order(codes: Tensor, out: Tensor) -> None:
    """Write ``codes`` in kernel order to ``out``, uint8 [rows * columns / 2].

    ``codes`` is uint8 [rows / 64, columns, 64], with values from 0 to 15.
    """
    tiles, columns, _ = codes.shape
    torch.add(codes[..., :HALF], codes[..., HALF:], alpha=16, out=out.view(tiles, columns, HALF))


def from_kernel_order(nibbles: Tensor, columns: int) -> Tensor:
    """Return the codes, uint8 [rows, columns], of ``nibbles``, uint8 [rows * columns / 2] in kernel order."""
    packed = nibbles.view(-1, columns, HALF).transpose(1, 2)  # [rows / 64, 32, columns]
    return torch.stack((packed & 0xF, packed >> 4), 1).view(-1, columns)


def pair_columns(nibbles: Tensor, columns: int) -> Tensor:
    """Return 4-bit codes in row-major order, uint8 [rows, columns / 2].

    ``nibbles`` is uint8 [rows * columns / 2] in kernel order. A byte of the result holds the code of an even column in
    its high nibble, and that of the next column in its low nibble.
    """
    even, odd = nibbles.view(-1, columns // 2, 2, HALF).unbind(2)  # [rows / 64, columns / 2, 32] each
    # rows 0 to 31 of each row tile, and its rows 32 to 63
    upper, lower = (even << 4) | (odd & 0xF), (even & 0xF0) | (odd >> 4)
    return torch.stack((upper, lower), 1).transpose(2, 3).reshape(-1, columns // 2)


def fold(nibbles: Tensor, parts: int, out: Tensor) -> None:
    """Fold ``nibbles``, uint8 [n] in kernel order, into ``out``, uint8 [n / parts].

    Only the low 4 / parts bits of each nibble are kept.
    """
    width = 4 // parts
    out.zero_()
    for number, part in enumerate(nibbles.view(parts, -1)):
        out |= (part & MASKS[parts]) << (width * number)


def unfold(folded: Tensor, parts: int, start: int, stop: int) -> Tensor:
    """Return bytes ``start`` to ``stop`` of the n bytes in kernel order that ``fold`` has folded into ``folded``.

    ``folded`` is uint8 [n / parts]. The result is uint8 [stop - start].
    """
    width, length = 4 // parts, len(folded)
    pieces = []
    for number in range(start // length, -(-stop // length)):
        first, last = max(start - number * length, 0), min(stop - number * length, length)
        pieces.append((folded[first:last] >> (width * number)) & MASKS[parts])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def store_pairs(
    values: Tensor, which: int, projection: Projection, sections: Mapping[str, Tensor], start: int
) -> Tensor:
    """Store s or b of consecutive rows of a projection, beginning with row ``start``.

    Args:
        values: s or b of each group, fp32 [columns / group, rows], padding rows included. For padding rows, zeros are
            stored. If pairs are stored in 8 bits, ``values`` must have all rows of the projection.
        which: 0 for s, 1 for b.
        projection: the projection.
        sections: a dictionary from the name of each section of the projection to a view of the section.
        start: number of the first row.

    Returns:
        The values as they will be read, fp32 [columns / group, rows], with zeros for padding rows.
    """
    groups, rows = values.shape
    real = min(rows, projection.rows - start)  # rows without padding
    component = sections[f"{projection.name}.pairs"][:, start : start + rows, which]  # [columns / group, rows]
    if projection.pairs == "bfloat16":
        component[:, :real] = values[:, :real]
        read = component.float()
    else:
        assert rows == projection.padded_rows
        # Padding repeats a value of a real row, so that it does not widen the range of its run.
        padded = F.pad(values[:, :real], (0, rows - real), mode="replicate").reshape(1, -1)
        scales = sections[f"{projection.name}.pair_scales"]
        runs = F.pad(padded, (0, len(scales) * PAIR_RUN - padded.shape[1]), mode="replicate").view(-1, PAIR_RUN)
        low, high = runs.aminmax(dim=1)
        scales[:, which, 0] = (high - low) / 255
        scales[:, which, 1] = low
        scale, minimum = scales[:, which].float().unsqueeze(2).unbind(1)  # [runs, 1] each
        codes = torch.where(scale > 0, (runs - minimum) / scale, 0.0).round_().clamp_(0, 255)
        component[:, :real] = codes.view(-1)[: padded.shape[1]].view(groups, -1)[:, :real]
        read = (codes * scale + minimum).bfloat16().float().view(-1)[: padded.shape[1]].view(groups, -1)
    component[:, real:] = 0
    read[:, real:] = 0
    return read


def load_pairs(projection: Projection, sections: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
    """Return the pairs of rows ``start`` to ``stop`` as torch's int4 kernel takes them.

    The result is bf16 [columns / group, stop - start, 2]. ``sections`` is a dictionary from the name of each section of
    the projection to a view of the section.
    """
    pairs = sections[f"{projection.name}.pairs"]
    if projection.pairs == "bfloat16":
        return pairs[:, start:stop]
    scales = sections[f"{projection.name}.pair_scales"].float()  # [runs, 2, 2]
    groups, rows, _ = pairs.shape
    first = torch.arange(groups, device=pairs.device)[:, None] * rows
    run = (first + torch.arange(start, stop, device=pairs.device)) // PAIR_RUN  # [columns / group, rows]
    scale, minimum = scales[run].unbind(3)  # [columns / group, rows, 2] each
    return (pairs[:, start:stop].float().mul_(scale).add_(minimum)).bfloat16()


def band_bytes(projection: Projection, itemsize: int) -> int:
    """Return how many bytes of memory quantising a projection needs besides its weights and its record.

    The memory is for ``Bands``, and for the codes of one band as int16 and as bytes. ``itemsize`` is the size of a
    weight before quantisation, in bytes.
    """
    return _tiles_of(projection) * projection.columns * ROW_TILE * (itemsize + 4 * 4 + 2 + 1)


def _tiles_of(projection: Projection) -> int:
    """Return the largest number of row tiles in a band of a projection."""
    tiles = projection.padded_rows // ROW_TILE
    return min(tiles, max(1, BAND_WEIGHTS // (projection.columns * ROW_TILE)))


class Bands:
    """The bands of ``weights`` [rows, columns] of a projection, and memory to quantise one band after another.

    A band is a range of numbers of row tiles. The last row tile is padded with rows of zeros.
    """

    def __init__(self, weights: Tensor, projection: Projection) -> None:
        self._weights = weights
        self._group = projection.group
        self._groups = projection.columns // projection.group
        self._tiles = projection.padded_rows // ROW_TILE
        self._size = _tiles_of(projection)
        self._stored = torch.empty(self._size, projection.columns, ROW_TILE, dtype=weights.dtype)
        self._buffers = torch.empty(4, self._size * self._groups, self._group, ROW_TILE)
        self._transposed: range | None = None  # the band whose weights are in the first buffer

    def __iter__(self) -> Iterator[range]:
        for first in range(0, self._tiles, self._size):
            yield range(first, min(first + self._size, self._tiles))

    def transpose(self, band: range) -> Tensor:
        """Return the weights of a band, transposed, as fp32 [n, g, ROW_TILE].

        The caller must not change the tensor. It is valid until this method is called with another band.
        """
        transposed = self._buffers[0, : len(band) * self._groups]
        if band != self._transposed:
            stored = self._stored[: len(band)]
            for place, tile in zip(stored, band, strict=True):
                rows = self._weights[tile * ROW_TILE : (tile + 1) * ROW_TILE]
                # transpose without a change of type, which is five times faster; ``copy_`` below changes the type
                place[:, : len(rows)] = rows.T
                place[:, len(rows) :] = 0
            transposed.copy_(stored.view(transposed.shape))
            self._transposed = band
        return transposed

    def scratch(self, band: range) -> Tensor:
        """Return memory to work in, fp32 [3, n, g, ROW_TILE]. All bands share it, because allocating pages is slow."""
        return self._buffers[1:, : len(band) * self._groups]

    def by_rows(self, values: Tensor) -> Tensor:
        """Reorder ``values``, one for each group, from [n, 1, ROW_TILE] to [columns / group, rows of the band]."""
        return values.view(-1, self._groups, ROW_TILE).transpose(0, 1).reshape(self._groups, -1)

    def by_tiles(self, values: Tensor) -> Tensor:
        """Reorder ``values``, one for each group, from [columns / group, rows of the band] to [n, 1, ROW_TILE]."""
        return values.reshape(self._groups, -1, ROW_TILE).transpose(0, 1).reshape(-1, 1, ROW_TILE)
