"""Kernels of the CPU: products of tensors with matrices as they are stored."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from moetier.runtime.kernels.jit.processor import Processor, this_processor
from moetier.runtime.kernels.jit.team import KernelTask, Scratch, run_all, threads_for
from moetier.tiers.layout import RecordLayout

from .api import CPU, FLOATS, Kernels, has_memory
from .gemm import ProjectionProduct, Rounded, multiplies


class PackedKernels(Kernels):
    """CPU kernels that multiply with quantised weights directly from their records, without a dequantised copy."""

    def __init__(self, processor: Processor | None = None) -> None:
        super().__init__()
        self.processor: Processor = processor or this_processor()
        self._products: dict[tuple[int, str, torch.dtype], ProjectionProduct] = {}
        self._rounded = Scratch()

    def packs(self, layout: RecordLayout) -> bool:
        """Return whether these kernels multiply with all projections of the layout as they are stored."""
        return all(map(multiplies, layout.projections))

    def project(self, x: Tensor, record: Tensor, layout: RecordLayout, name: str, bias: Tensor | None = None) -> Tensor:
        """Multiply as ``Kernels.project`` does, [tokens, columns] -> [tokens, rows], but round x to 8 bits.

        With FP8 weights, x is not rounded. Projections that these kernels can't multiply with are decoded, as they are
        for an x without memory.

        A row of the result depends only on the same row of x and on the matrix.
        """
        if not multiplies(layout.projection(name)) or not has_memory(x):
            return super().project(x, record, layout, name, bias)
        y = self.multiply(x, (record,), (len(x),), layout, name)
        return y if bias is None else y.add_(bias)

    def multiply(
        self, x: Tensor, records: Sequence[Tensor], rows: Sequence[int], layout: RecordLayout, name: str
    ) -> Tensor:
        """Multiply rows of x with the quantised projection ``name`` of several records.

        Args:
            x: [R, K]: the first ``rows[0]`` rows go through the first record, the next ``rows[1]`` through the second,
                and so on; or [1, K]: the one row goes through every record, and each of ``rows`` is 1.
            records: uint8 [record bytes] each, all of one ``layout``.

        Returns:
            [R, N] in the type of x.
        """
        if x.dtype not in FLOATS:
            return self.multiply(x.float(), records, rows, layout, name).to(x.dtype)
        product = self.product(layout, name, x.dtype)
        own, columns = x.shape
        total = len(rows) if own == 1 else sum(rows)
        assert columns == product.columns, f"{name} takes {product.columns} numbers, not {columns}"
        assert own in (total, 1), f"{own} rows of x for {total} rows"
        if not x.is_contiguous():
            x = x.contiguous()
        y = torch.empty((total, product.rows), dtype=x.dtype, device=CPU)
        jobs, first = array("q"), 0
        for record, count in zip(records, rows, strict=True):
            jobs.extend((record.data_ptr(), first, count))
            first += count
        rounded = Rounded(self._rounded.take(own * product.row_bytes), own, product)
        context = product.context(len(records), jobs, rounded, y.data_ptr(), has_own_rows=own == total)
        run_all(
            [
                KernelTask(product.round, rounded.context(x.data_ptr()), threads_for(own * columns)),
                KernelTask(product.kernel, context, threads_for(product.rows * columns * total)),
            ]
        )
        return y

    def product(self, layout: RecordLayout, name: str, dtype: torch.dtype) -> ProjectionProduct:
        """Return the compiled product with the quantised projection ``name``. Its x and its y are of type ``dtype``."""
        if (product := self._products.get((id(layout), name, dtype))) is None:
            product = self._products[id(layout), name, dtype] = ProjectionProduct(
                layout, name, dtype, dtype, self.processor
            )
        return product
