"""Matrices of a checkpoint that HQQ, AWQ or GPTQ has quantised: what the three have in common.

A weight is (c - z) * s, with its code c, and the scale s and the zero point z of its group. Such a matrix is
dequantised when it is read (``Grouped.read``), or its codes, scales and zero points are kept (``Grouped.levels``).
``gptq`` and ``hqq`` unpack them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from moetier.tiers.errors import CheckpointError
from moetier.tiers.layout import ZERO_POINT_GROUPS, Bits

from .tensors import SourceTensor, StoredTensor

if TYPE_CHECKING:
    import torch

    from moetier.tiers.quant.zero_points import Levels

DAMAGED = "Download the checkpoint again."
# advice where records can't hold the weights as a checkpoint stores them
NEEDS_BITS = "Give --bits 16 for the values as they are, or 8, 4, 3 or 2 to quantise them anew."
SCALES = ("float16", "bfloat16", "float32")  # torch's names of the types that scales may have


class Numbers(Protocol):
    """Scales or zero points in a checkpoint: a stored tensor, or numbers that are computed from several."""

    @property
    def name(self) -> str:
        """Name of the stored tensor, or of the first of several."""

    @property
    def dtype(self) -> str:
        """torch's name of the type that ``read`` returns."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what ``read`` returns."""

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """Stored tensors that the numbers are read from."""

    def read(self) -> torch.Tensor:
        """Read all numbers, in ``shape``: [groups, rows], [groups, 1] or [1, groups]."""


class Grouped(ABC):
    """A quantised matrix [rows, columns]. As a source tensor it is dequantised, and rounded to ``dtype``."""

    name: str  # of the weight
    dtype: str

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""

    @property
    @abstractmethod
    def parts(self) -> tuple[StoredTensor, ...]:
        """Stored tensors that the matrix is read from."""

    @property
    @abstractmethod
    def bits(self) -> Bits:
        """Bits of a code."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """torch's name of the type of scales and zero points, in which weights are computed."""

    @property
    @abstractmethod
    def per_group(self) -> int:
        """Number of neighbouring weights of a row that share a scale; 0 if groups do not lie along rows."""

    @property
    def group(self) -> int:
        """The largest group size of records that divides ``per_group`` and the columns; 0 if there is none."""
        size = math.gcd(self.per_group, self.shape[1]) if self.per_group else 0
        return max((each for each in ZERO_POINT_GROUPS if size and size % each == 0), default=0)

    @property
    @abstractmethod
    def groups_as_text(self) -> str:
        """Description of the groups, for a message, such as "of 64 weights along axis 0"."""

    @abstractmethod
    def probe(self, group: int) -> None:
        """Raise ValueError, which says why, if ``group`` neighbouring weights of a row may be in several groups.

        Reads at most the group of each column.
        """

    @abstractmethod
    def levels(self, group: int) -> Levels:
        """Read the codes, and a scale and a zero point for each ``group`` weights of a row.

        ``group`` is a divisor of ``self.group``. Raises CheckpointError if the checkpoint is damaged, or if it turns
        out that these weights are in several groups.
        """

    @abstractmethod
    def weights(self) -> torch.Tensor:
        """Read and dequantise the matrix [rows, columns], in the type of its scales. Raises CheckpointError."""

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Read and dequantise ``count`` rows from row ``first`` on, [count, columns]. The whole matrix is read."""
        import torch

        stop = None if count is None else first + count
        return self.weights()[first:stop].to(getattr(torch, self.dtype))

    def damaged(self, what: str) -> CheckpointError:
        """Return the error for a damaged matrix; ``what`` says what is wrong, after the matrix's name and a colon."""
        return CheckpointError(f"{self.name}: {what}.", DAMAGED)

    def check(self, tensor: Numbers, shape: tuple[int, ...], *types: str) -> None:
        """Raise CheckpointError unless ``tensor`` has the shape ``shape``, is not empty, and has one of ``types``."""
        if tensor.shape != shape or tensor.dtype not in types or 0 in shape:
            raise self.damaged(
                f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, not {' or '.join(types)} {list(shape)}"
            )

    def finite(self, tensor: Numbers) -> torch.Tensor:
        """Read scales or zero points, as [groups, ...] or [1, groups]. Raises CheckpointError if one is not finite."""
        values = tensor.read()
        if not values.isfinite().all():
            raise self.damaged(f"{tensor.name} has numbers that are not finite")
        return values


def with_weights(
    tensors: Mapping[str, StoredTensor],
    main: str,
    needed: tuple[str, ...],
    others: tuple[str, ...],
    make: Callable[[str, dict[str, StoredTensor]], Grouped],
) -> dict[str, SourceTensor]:
    """Return a dictionary from names to source tensors, in which each quantised module has a "weight".

    Args:
        tensors: a dictionary from names to the checkpoint's tensors; without shapes if only names are known.
        main: name of a tensor that only quantised modules have.
        needed: names of further tensors that each of them has.
        others: names of tensors that some of them have, and that the model does not.
        make: makes the weight from its name, and a dictionary from the names above to its module's tensors.

    Raises CheckpointError if a module lacks one of ``needed``, or also has the weight itself.
    """
    own = (main, *needed, *others)
    paths = [name.removesuffix(f".{main}") for name in tensors if name.endswith(f".{main}")]
    taken = {f"{path}.{name}" for path in paths for name in own}
    made: dict[str, SourceTensor] = {name: tensor for name, tensor in tensors.items() if name not in taken}
    for path in paths:
        weight, found = (
            f"{path}.weight",
            {name: tensors[f"{path}.{name}"] for name in own if f"{path}.{name}" in tensors},
        )
        if missing := [name for name in needed if name not in found]:
            raise CheckpointError(f"{weight} is quantised, but {path}.{missing[0]} is missing.", DAMAGED)
        if weight in made:
            raise CheckpointError(f"{weight} is in the checkpoint twice, once quantised.", DAMAGED)
        made[weight] = make(weight, found) if found[main].shape else replace(found[main], name=weight)
    return made
