"""Matrices of a checkpoint that HQQ, AWQ or GPTQ has quantised: what the three have in common.

A weight is (c - z) * s, with its code c, and the scale s and the zero point z of its group. Such a matrix is
dequantised when it is read, or its codes, scales and zero points are kept (``levels``). ``gptq_awq`` and
``hqq`` unpack them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from moetier.tiers.errors import DOWNLOAD_AGAIN, CheckpointError
from moetier.tiers.layout import ZERO_POINT_GROUPS, Bits, Projection

from .tensors import Numbers, Runs, SourceTensor

SCALES = ("float16", "bfloat16", "float32")  # torch's names of the types that scales may have


class AffineTensor(SourceTensor):
    """A quantised matrix [rows, columns]. As a source tensor it is dequantised, and rounded to ``dtype``."""

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        @abstractmethod
        def name(self) -> str:
            """Name of the weight."""

        @property
        @abstractmethod
        def bits(self) -> Bits:
            """Bits of a code."""

    reads_rows = False
    is_kept = True

    @property
    @abstractmethod
    def scale_type(self) -> str:
        """torch's name of the type of scales and zero points, in which weights are computed."""

    @property
    @abstractmethod
    def per_group(self) -> int:
        """Number of neighbouring weights of a row that share a scale; 0 if groups do not lie along rows."""

    @property
    def group(self) -> int:
        """The largest group size of records that divides ``per_group`` and the columns; 0 if there is none."""
        size = math.gcd(self.per_group, self.shape[1]) if self.per_group else 0
        return max(
            (size_of_group for size_of_group in ZERO_POINT_GROUPS if size and size % size_of_group == 0), default=0
        )

    @property
    @abstractmethod
    def groups_as_text(self) -> str:
        """Description of the groups, for a message, such as "of 64 weights along axis 0"."""

    @abstractmethod
    def probe(self, group: int) -> None:
        """Raise ValueError, which says why, if ``group`` neighbouring weights of a row may be in several groups.

        Reads at most the group of each column.
        """

    def record_projection(self, plain: Projection, runs: Runs) -> Projection:
        """Return the projection that has the most bits and the smallest groups of all matrices."""
        members = self.members_of(runs)
        scale_types = {member.scale_type for member in members}
        if len(scale_types) != 1 or plain.transposed:
            raise ValueError(f"{self.name} and the weights that belong to it are not stored alike")
        group = min(member.group for member in members)
        if not group:
            which = next(member for member in members if not member.group)
            raise ValueError(
                f"{which.name} has groups that no record can have ({which.groups_as_text}): a record has a scale for "
                "neighbouring weights of a row"
            )
        members[0].probe(group)
        bits = max(member.bits for member in members)
        return replace(plain, bits=bits, group=group, pairs=f"{scale_types.pop()}_zeros")

    @abstractmethod
    def weights(self) -> torch.Tensor:
        """Read and dequantise the matrix [rows, columns], in the type of its scales. Raises CheckpointError."""

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Read and dequantise ``count`` rows from row ``first`` on, [count, columns]. The whole matrix is read."""
        return self.weights()[first : None if count is None else first + count].to(getattr(torch, self.dtype))

    def damaged(self, what: str) -> CheckpointError:
        """Return the error for a damaged matrix; ``what`` says what is wrong, after the matrix's name and a colon."""
        return CheckpointError(f"{self.name}: {what}.", DOWNLOAD_AGAIN)

    def finite(self, tensor: Numbers) -> torch.Tensor:
        """Read scales or zero points, as [groups, ...] or [1, groups]. Raises CheckpointError if one is not finite."""
        values = tensor.read()
        if not values.isfinite().all():
            raise self.damaged(f"{tensor.name} has numbers that are not finite")
        return values
