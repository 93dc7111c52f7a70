"""What the code of a product is compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from moetier.tiers.layout import Bits, Projection


class Number(Enum):
    """A type that numbers are given and wanted in."""

    F32 = "float32"
    BF16 = "bfloat16"

    @property
    def nbytes(self) -> int:
        return 4 if self is Number.F32 else 2


@dataclass(frozen=True)
class Form:
    """Of the matrices, and of what comes out."""

    bits: Bits
    group: int
    pairs: str
    out: Number

    @classmethod
    def of(cls, p: Projection, out: Number) -> Form:
        return cls(p.bits, p.group, p.pairs, out)
