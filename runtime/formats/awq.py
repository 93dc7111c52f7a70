"""Checkpoints of AWQ, in the format of AutoAWQ's ``gemm`` kernels."""

from __future__ import annotations

from moetier.tiers.errors import UnsupportedModelError
from moetier.tiers.fields import shown

from .registry import Format
from .tensors import SourceTensor, StoredTensor
from .words import AWQ, WordsTensor, group_size


class Awq(Format):
    """AWQ in 4 bits."""

    def sources(self, dtype: str) -> dict[str, SourceTensor]:
        """Return the source tensors. Raises UnsupportedModelError for another format than gemm, or other bits."""
        named = str(self.quantization.get("version") or self.quantization.get("format") or "gemm").lower()
        bits, group = self.quantization.get("bits", 4), group_size(self.quantization)
        if named != "gemm" or bits != 4:
            raise UnsupportedModelError(
                f"The checkpoint has AWQ's format {shown(named)} with {shown(bits)} bits, which moetier can't read.",
                "Give a checkpoint in AWQ's format gemm with 4 bits.",
            )

        def make(weight: str, own: dict[str, StoredTensor]) -> WordsTensor:
            return WordsTensor(weight, dtype, AWQ, 4, own["qweight"], own["qzeros"], own["scales"], group_size=group)

        return self.joined("qweight", ("qzeros", "scales"), (), make)
