"""Checkpoints of GPTQ, in either version of its zero points."""

from __future__ import annotations

import math
from typing import Any

from moetier.tiers.errors import UnsupportedModelError
from moetier.tiers.fields import shown
from moetier.tiers.layout import Bits

from .registry import Format
from .tensors import SourceTensor, StoredTensor
from .words import GPTQ, GPTQ_V2, WORD, WordsTensor, group_size

WIDTHS: tuple[Bits, ...] = (8, 4, 3, 2)


class Gptq(Format):
    """GPTQ in 8, 4, 3 or 2 bits, which may differ between modules."""

    def sources(self, dtype: str) -> dict[str, SourceTensor]:
        """Return the source tensors. Raises UnsupportedModelError for other formats than GPTQ's own, or other bits."""
        quantization = self.quantization
        named = str(quantization.get("checkpoint_format") or quantization.get("format") or GPTQ).lower()
        if named not in (GPTQ, GPTQ_V2):
            raise UnsupportedModelError(
                f"The checkpoint has GPTQ's format {shown(named)}, which moetier can't read.",
                f"Give a checkpoint in GPTQ's format {GPTQ} or {GPTQ_V2}.",
            )
        group, symmetric = group_size(quantization), bool(quantization.get("sym", True))

        def make(weight: str, own: dict[str, StoredTensor]) -> WordsTensor:
            packed, order = own["qweight"], own.get("g_idx")
            bits: Any = quantization.get("bits", 4)
            if order is not None and len(packed.shape) == 2 and (columns := math.prod(order.shape)):
                bits = packed.shape[0] * WORD / columns  # a module may have bits of its own (GPTQModel's "dynamic")
            if (width := next((width for width in WIDTHS if width == bits), None)) is None:
                raise UnsupportedModelError(
                    f"{weight} is quantised with GPTQ to {shown(bits)} bits, which moetier can't read.",
                    f"Give a checkpoint with {', '.join(map(str, WIDTHS))} bits.",
                )
            zeros, scales = own["qzeros"], own["scales"]
            return WordsTensor(weight, dtype, named, width, packed, zeros, scales, order, group, symmetric)

        return self.joined("qweight", ("qzeros", "scales"), ("g_idx",), make)
