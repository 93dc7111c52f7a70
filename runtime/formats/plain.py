"""Checkpoints that are not quantised."""

from __future__ import annotations

from .registry import Format
from .tensors import SourceTensor


class Plain(Format):
    """Weights in 16 or 32 bits."""

    is_plain = True

    def sources(self, dtype: str) -> dict[str, SourceTensor]:
        """Return the stored tensors."""
        return dict(self.tensors)
