"""An invented format, added as CONTRIBUTING.md says: by this module and a line in the registry.

A weight is a code of 8 bits times a power of two, which a row shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moetier.runtime.formats.registry import Format
from moetier.runtime.formats.tensors import SourceTensor, StoredTensor, check
from moetier.tiers.errors import UnsupportedModelError


@dataclass(frozen=True)
class Toy8Tensor(SourceTensor):
    """Matrix [rows, columns] of toy8."""

    codes: StoredTensor  # int8 [rows, columns]
    exponents: StoredTensor  # int8 [rows]
    dtype: str

    def __post_init__(self) -> None:
        check(self.codes, ("rows", "columns"), "int8")
        check(self.exponents, self.codes.shape[:1], "int8")

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return self.codes.shape

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """Codes and exponents."""
        return (self.codes, self.exponents)

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Read and decode rows: [count, columns]."""
        scales = self.exponents.read(first, count).float().exp2()
        return (self.codes.read(first, count) * scales[:, None]).to(getattr(torch, self.dtype))


class Toy8(Format):
    """toy8, with 8 bits only."""

    def sources(self, dtype: str) -> dict[str, SourceTensor]:
        """Return the source tensors. Raises UnsupportedModelError for other bits."""
        if self.quantization.get("bits") != 8:
            raise UnsupportedModelError("The checkpoint has not 8 bits.", "Give a checkpoint of toy8 with 8 bits.")

        def make(weight: str, own: dict[str, StoredTensor]) -> Toy8Tensor:
            return Toy8Tensor(own["weight_int8"], own["weight_exponent"], dtype)

        return self.joined("weight_int8", ("weight_exponent",), (), make)
