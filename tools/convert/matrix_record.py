"""A matrix of the trunk on its way into a record: quantised in pieces of rows, by workers, when it is written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from moetier.runtime.checkpoint.recipe import Recipe
from moetier.runtime.checkpoint.safetensors import CHUNK_BYTES, Bytes, StoredTensor
from moetier.runtime.moe.linear import WEIGHT, matrix_layout
from moetier.tiers.errors import CheckpointError
from moetier.tiers.layout import ROW_TILE, RecordLayout
from moetier.tiers.manifest import TrunkRecords
from moetier.tiers.quant.codec import WeightError, encode, sections

from .encoder import one_thread_each

PIECE_WEIGHTS = 1 << 20  # quantised at a time by a worker


class MatrixRecord:
    """The record of ``recipe``'s matrix, as a tensor of the trunk. ``error`` is known once it was made."""

    dtype = "uint8"

    def __init__(self, path: str, recipe: Recipe, form: TrunkRecords, *, workers: int, fast: bool) -> None:
        rows, columns = recipe.model.get_parameter(recipe.target).shape
        self.layout: RecordLayout = matrix_layout(rows, columns, form)
        self.error = WeightError()
        self._path = path
        self._recipe = recipe
        self._form = form
        self._workers = workers
        self._fast = fast

    @property
    def shape(self) -> tuple[int]:
        return (self.layout.payload_bytes,)

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return tuple(self._recipe.parts)

    @property
    def peak_bytes(self) -> int:
        """About what making it takes: the record, the matrix where it is read whole, and what each worker holds."""
        (p,) = self.layout.projections
        whole = 0 if self._recipe.direct else 2 * p.rows * p.columns * self._recipe.dtype.itemsize
        return self.layout.payload_bytes + whole + self._workers * 16 * max(PIECE_WEIGHTS, ROW_TILE * p.columns)

    def chunks(self) -> Iterator[Bytes]:
        """Its bytes in order, made anew."""
        record = self._made().numpy()
        for start in range(0, len(record), CHUNK_BYTES):
            yield record[start : start + CHUNK_BYTES]

    def _made(self) -> torch.Tensor:
        (p,) = self.layout.projections
        record = torch.zeros(self.layout.payload_bytes, dtype=torch.uint8)
        whole = None if self._recipe.direct else self._recipe.make(None)
        step = max(1, PIECE_WEIGHTS // p.columns // ROW_TILE) * ROW_TILE

        def fill(start: int) -> WeightError:
            count = min(step, p.rows - start)
            weights = self._recipe.rows(start, count) if whole is None else whole[start : start + count]
            return self._fill(sections(record, self.layout), weights, start)

        self.error = WeightError()
        with (
            one_thread_each(),
            ThreadPoolExecutor(self._workers, "convert", lambda: torch.set_num_threads(1)) as pool,
        ):
            try:
                for error in pool.map(fill, range(0, p.rows, step)):
                    self.error += error
            finally:
                pool.shutdown(cancel_futures=True)
        return record

    def _fill(self, views: dict[str, torch.Tensor], weights: torch.Tensor, start: int) -> WeightError:
        """Quantises rows from ``start`` on, and puts them where they belong: groups don't reach over rows."""
        if not all(map(math.isfinite, torch.stack(weights.aminmax()).tolist())):
            raise CheckpointError(
                f"{self._path}.weight has weights that are not finite numbers.", "Get an intact copy of the checkpoint."
            )
        layout = matrix_layout(len(weights), weights.shape[1], self._form)
        piece = np.empty(layout.record_bytes, np.uint8)
        (error,) = encode({WEIGHT: weights}, layout, piece, fast=self._fast).values()
        (p,) = layout.projections
        rows = slice(start, start + p.padded_rows)
        for name, values in sections(torch.from_numpy(piece), layout).items():
            if name == f"{WEIGHT}.pairs":
                views[name][:, rows] = values  # [K / g, N, 2]
            else:
                views[name][rows] = values  # codes, [N, K / 2]
        return error
