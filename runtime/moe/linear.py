"""Linear modules that replace nn.Linear where a matrix of the trunk is stored as a record."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moetier.runtime.kernels.products.api import Kernels, moved_error
from moetier.runtime.kernels.products.packed import PackedKernels
from moetier.runtime.kernels.products.row import RowMatrix
from moetier.runtime.libraries.torch_internals import buffers_of
from moetier.tiers.errors import StoreFormatError
from moetier.tiers.layout import RecordLayout
from moetier.tiers.manifest import TrunkRecords
from moetier.tiers.quant.codec import layout_for
from moetier.tiers.quant.gguf_blocks import decode_blocks

from .gradients import without_gradient

WEIGHT = "weight"  # name of the only projection in a trunk record


def matrix_layout(rows: int, columns: int, stored: TrunkRecords) -> RecordLayout:
    """Return the layout of the record of a matrix [rows, columns]. It has 16 bits if no group divides the columns."""
    shape = {WEIGHT: ((rows, columns), "bfloat16")}
    return layout_for(shape, bits=stored.bits, group=stored.group, pairs=stored.pairs)


class QuantizedLinear(nn.Module):
    """Linear module y = x @ W.T + bias, with W in a record. On a CPU the record stays in the mapped file.

    With exact kernels the result has the same bits as that of nn.Linear with the decoded weights. There is no attribute
    ``weight``, so that code that multiplies with ``weight`` itself fails instead of using wrong numbers.
    """

    record: Tensor  # uint8 [layout.payload_bytes]
    kernels: Kernels
    matrix: RowMatrix | None = None  # for single rows; None if they are computed as others are

    def __init__(self, linear: nn.Linear, layout: RecordLayout) -> None:
        """Make a module that replaces ``linear`` and takes over its bias. The record is on the meta device at first."""
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.layout = layout
        self.bias = linear.bias
        self.register_buffer("record", torch.empty(layout.payload_bytes, dtype=torch.uint8, device="meta"))

    def compute_with(self, kernels: Kernels) -> None:
        """Set the kernels that multiply. The record must be on their device already."""
        self.kernels = kernels
        if kernels.arrange is not None:
            kernels.arrange(self.record, self.layout)
        if isinstance(kernels, PackedKernels) and kernels.packs(self.layout):
            product = partial(kernels.product, self.layout, WEIGHT)
            self.matrix = RowMatrix(self.record, self.out_features, self.in_features, product)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [tokens, in_features] -> [tokens, out_features] in the type of x.

        x may have other leading dimensions. Raises ConfigError if the module was moved to another device.
        """
        record = buffers_of(self)["record"]
        assert record is not None
        if self.matrix is not None and self.matrix.weight is record and (y := self.matrix.multiply(x)) is not None:
            return y if self.bias is None else y.add_(self.bias)
        if not x.device == record.device == self.kernels.device:
            raise moved_error(record.device, self.kernels.device)
        # like torch's own linear, which adds the bias afterwards if x is neither a matrix nor contiguous
        fused = self.bias is not None and (x.dim() == 2 or x.is_contiguous())
        with torch.no_grad():
            rows = x.reshape(-1, self.in_features)
            bias = self.bias if fused else None
            y = self.kernels.with_room(partial(self.kernels.project, rows, record, self.layout, WEIGHT, bias))
            y = y.view(*x.shape[:-1], self.out_features)
            if self.bias is not None and not fused:
                y += self.bias
        return without_gradient(y, x)

    def extra_repr(self) -> str:
        """Return sizes, bias, bits and group size for the module's repr."""
        (p,) = self.layout.projections
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, bits={p.bits}, group={p.group}"


def quantized_linears(model: nn.Module) -> list[QuantizedLinear]:
    """Return the QuantizedLinear modules of a model, in module order."""
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


class QuantizedEmbedding(nn.Module):
    """Embedding whose table is in a record, in the coding of a checkpoint. Rows are decoded when they are looked up."""

    record: Tensor  # uint8 [layout.payload_bytes]

    def __init__(self, layout: RecordLayout, dtype: torch.dtype) -> None:
        """``dtype``: the type of the numbers that are looked up. The record is on the meta device at first."""
        super().__init__()
        (self.projection,) = layout.projections
        self.num_embeddings = self.projection.rows  # as in nn.Embedding
        self.dtype = dtype
        self.register_buffer("record", torch.empty(layout.payload_bytes, dtype=torch.uint8, device="meta"))

    def forward(self, ids: Tensor) -> Tensor:
        """Look up token ids: [tokens] -> [tokens, columns]. There may be other leading dimensions."""
        rows = self.record.view(self.projection.rows, -1)[ids.reshape(-1)]
        return decode_blocks(rows, self.projection.coding).to(self.dtype).view(*ids.shape, -1)

    def extra_repr(self) -> str:
        """Return sizes and coding for the module's repr."""
        return f"{self.projection.rows}, {self.projection.columns}, coding={self.projection.coding}"


def replace_modules(model: Any, layouts: Mapping[str, RecordLayout]) -> None:
    """Replace linear modules and embeddings by modules whose weights are in records, on the meta device.

    ``layouts`` has the layout of each module's record, by the module's path.
    """
    for path, layout in layouts.items():
        module = model.get_submodule(path)
        is_linear = type(module) is nn.Linear
        replacement = QuantizedLinear(module, layout) if is_linear else QuantizedEmbedding(layout, module.weight.dtype)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, replacement)
        model.all_tied_weights_keys.pop(f"{path}.{WEIGHT}", None)


def replace_linears(model: Any, records: Mapping[str, int], stored: TrunkRecords) -> None:
    """Replace the linear modules at the paths in ``records`` by QuantizedLinear modules on the meta device.

    ``records`` has the size of each module's record in bytes. A head that was tied to the embedding is no longer tied:
    it has a record, and the embedding is not changed. Raises StoreFormatError if the model has no linear module at a
    path, or one of another size.
    """
    linears = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    layouts = {}
    for path, nbytes in records.items():
        linear = linears.get(path)
        layout = None if linear is None else matrix_layout(linear.out_features, linear.in_features, stored)
        if linear is None or layout is None or layout.payload_bytes != nbytes:
            what = f"{linear.out_features} x {linear.in_features} there" if linear else "not there"
            raise StoreFormatError(
                f"The trunk has a record of {nbytes:,} bytes for {path}, which in {type(model).__name__} is {what}.",
                "Check that config.json belongs to this directory, or convert the model again.",
            )
        layouts[path] = layout
    replace_modules(model, layouts)
