"""An invented format whose bytes lie as those of a coding that kernels multiply with, so that it is used as it is.

Codes of 4 bits, eight in a word, and a scale for each 16 weights of a row.
"""

from __future__ import annotations

from moetier.runtime.formats.registry import Format
from moetier.runtime.formats.scaled import ScaledTensor
from moetier.runtime.formats.tensors import SourceTensor, StoredTensor


class Toy4(Format):
    """toy4: INT4 under other names than those of compressed-tensors."""

    def sources(self, dtype: str) -> dict[str, SourceTensor]:
        """Return the source tensors."""

        def make(weight: str, own: dict[str, StoredTensor]) -> ScaledTensor:
            return ScaledTensor.of(own["weight_words"], own["weight_steps"], None, dtype=dtype)

        return self.joined("weight_words", ("weight_steps",), (), make)
