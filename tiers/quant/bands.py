"""The weights of a projection as they are quantised: band by band, turned so that rows lie innermost.

A band is a few blocks of ROW_TILE rows, small enough for the processor's caches, as [blocks, K, ROW_TILE]. That is the
order in which a record holds codes, and seen as [n, g, ROW_TILE], n = blocks * K / g, the one in which hqq.py works.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moetier.tiers.layout import ROW_TILE, Projection

BAND_WEIGHTS = 2**19  # where there are as many: 2 MiB in fp32. Fewer, and workers queue for the interpreter's lock


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
        self._turned: range | None = None  # whose weights the first buffer holds

    def __iter__(self) -> Iterator[range]:
        for first in range(0, self._blocks, self._size):
            yield range(first, min(first + self._size, self._blocks))

    def turn(self, band: range) -> Tensor:
        """fp32 [n, g, ROW_TILE], valid until another band is turned; not to be written to."""
        turned = self._buffers[0, : len(band) * self._groups]
        if band != self._turned:
            stored = self._stored[: len(band)]
            for place, block in zip(stored, band, strict=True):
                rows = self._weights[block * ROW_TILE : (block + 1) * ROW_TILE]
                place[:, : len(rows)] = rows.T  # of one type, and whole rows: torch is five times faster so
                place[:, len(rows) :] = 0
            turned.copy_(stored.view(turned.shape))
            self._turned = band
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
