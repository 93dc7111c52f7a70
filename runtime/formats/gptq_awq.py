"""Checkpoints of GPTQ and AWQ, in which codes and zero points are packed in words of 32 bits.

    GPTQ  qweight [columns * bits / 32, rows], qzeros [groups, rows * bits / 32], scales [groups, rows], g_idx [columns]
    AWQ   qweight [columns, rows / 8], qzeros [groups, rows / 8], scales [groups, rows]; rows in another order

Weights of GPTQ are computed as GPTQModel's torch kernel does, and those of AWQ as AutoAWQ's ``dequantize_gemm`` does.
Other tools use the same formulas, with another order of operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moetier.tiers.errors import CheckpointError, UnsupportedModelError
from moetier.tiers.fields import shown
from moetier.tiers.layout import Bits
from moetier.tiers.quant.zero_points import Levels

from .affine import SCALES, AffineTensor
from .registry import NEEDS_BITS, Format
from .tensors import SourceTensor, StoredTensor, check

WORD = 32  # bits of a word
AWQ, GPTQ, GPTQ_V2 = "awq", "gptq", "gptq_v2"  # values of ``WordsTensor.packing``
WIDTHS: tuple[Bits, ...] = (8, 4, 3, 2)  # bits of GPTQ's codes
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # for each of eight neighbouring rows, the place of its code in a word


@dataclass(frozen=True, slots=True)
class WordsTensor(AffineTensor):
    """Matrix of GPTQ or AWQ. ``order`` has the group of each column; None if groups are neighbouring columns."""

    name: str
    dtype: str
    packing: str  # AWQ, GPTQ or GPTQ_V2
    bits: Bits  # of a code
    packed: StoredTensor
    zeros: StoredTensor
    scale: StoredTensor
    order: StoredTensor | None = None
    group_size: int = -1  # by the config; -1 for whole rows
    symmetric: bool = False

    def __post_init__(self) -> None:
        if len(self.packed.shape) != 2 or self.packed.shape[0] * WORD % self.bits:
            raise self.damaged(f"{self.packed.name} is {list(self.packed.shape)}, which is no matrix of whole codes")
        rows, columns = self.shape
        groups = self.scale.shape[0] if self.scale.shape else 0
        check(self.packed, self.packed.shape, "int32")
        check(self.scale, (groups, rows), *SCALES)
        check(self.zeros, (groups, rows * self.bits // WORD), "int32")
        if rows * self.bits % WORD:
            raise self.damaged(f"{rows} rows do not fill words of {WORD} bits")
        if self.order is not None:
            check(self.order, (columns,), "int32", "int64")
        if -(-columns // self.per_group) != groups:
            raise self.damaged(f"{self.scale.name} has {groups} groups, which do not fit {columns} columns")

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        first, second = self.packed.shape
        return (second * WORD // self.bits, first) if self.packing == AWQ else (second, first * WORD // self.bits)

    @property
    def scale_type(self) -> str:
        """torch's name of the type of scales and zero points, in which weights are computed."""
        return self.scale.dtype

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """Packed codes, packed zero points, scales, and the groups of columns."""
        return (self.packed, self.zeros, self.scale, *([self.order] if self.order else []))

    @property
    def per_group(self) -> int:
        """Number of neighbouring weights of a row that share a scale."""
        columns, groups = self.shape[1], self.scale.shape[0]
        return (
            self.group_size
            if self.group_size > 0 and -(-columns // self.group_size) == groups
            else -(-columns // groups)
        )

    @property
    def groups_as_text(self) -> str:
        """A few words about its groups, for a message."""
        return f"of {self.per_group} weights in {self.shape[1]} columns"

    def probe(self, group: int) -> None:
        """Raise ValueError if groups have columns from all over the matrix. Reads the group of each column."""
        if self.order is not None and self.order.file.exists():
            self._first(group)

    def _first(self, group: int) -> torch.Tensor:
        """Return the checkpoint's group of each run of ``group`` columns, [columns / group].

        Raises ValueError if the columns of a run are in several groups.
        """
        groups = self._column_groups()
        first = groups[::group]
        if bool((groups.view(-1, group) != first[:, None]).any()):
            raise ValueError(
                f"{self.name} has groups of columns from all over the matrix (desc_act), but a record has a scale for "
                "neighbouring columns"
            )
        return first

    def levels(self, group: int) -> Levels:
        """Read what is stored, with a scale and zero point for each ``group`` weights, a divisor of ``self.group``.

        Raises CheckpointError if a group of the checkpoint has columns from all over the matrix, too.
        """
        try:
            first = self._first(group)
        except ValueError as error:
            raise CheckpointError(f"Experts can't be stored as in this checkpoint: {error}.", NEEDS_BITS) from error
        levels = self._stored()
        return levels._replace(scales=levels.scales[:, first], zeros=levels.zeros[:, first])

    def weights(self) -> torch.Tensor:
        """Read and dequantise the matrix [rows, columns], in the type of its scales. Raises CheckpointError."""
        levels, groups = self._stored(), self._column_groups()
        return levels._replace(scales=levels.scales[:, groups], zeros=levels.zeros[:, groups]).weights()

    def _column_groups(self) -> torch.Tensor:
        """Return the group of each column, [columns]."""
        if self.order is None:
            return torch.arange(self.shape[1]) // self.per_group
        order = self.order.read().long()
        if int(order.min()) < 0 or int(order.max()) >= self.scale.shape[0]:
            raise self.damaged(f"{self.order.name} names groups that {self.scale.name} does not have")
        return order

    def _stored(self) -> Levels:
        """Read the matrix, with scales and zero points [rows, groups of the checkpoint]."""

        scales, words = self.finite(self.scale), self.packed.read()
        if self.packing == AWQ:
            codes, zeros = (_in_order(unpacked(words_of_one, self.bits)) for words_of_one in (words, self.zeros.read()))
            codes = codes.T.contiguous()
        else:
            codes, zeros = unpacked(words.T.contiguous(), self.bits), self._gptq_zeros()
        return Levels(codes, scales.T, zeros.T.to(scales.dtype))

    def _gptq_zeros(self) -> torch.Tensor:
        """Return zero points, uint8 [groups, rows].

        GPTQ_V2 stores zero points as they are, and GPTQ stores them less 1. But some checkpoints of GPTQ have them as
        they are, and GPTQModel once subtracted 1 at the wrong bits of codes of 3 bits. In a symmetric checkpoint all
        zero points are 2^(bits - 1). So if one of these other readings gives that number, it is the right one.
        """
        words = self.zeros.read()
        stored = unpacked(words, self.bits)
        one = sum(1 << at for at in range(0, WORD, self.bits))

        def added(*ones: int) -> torch.Tensor:
            """Add ``ones`` to the words, and return the codes, uint8 [groups, rows].

            This adds 1 to all codes of a word at once, as GPTQModel does: a carry goes to the next code.
            """
            integers = words.long().view(len(words), -1, len(ones)) + torch.tensor(ones)
            return unpacked(integers.to(torch.int32).view(words.shape), self.bits)

        if self.bits == 3:
            plain, readings = (stored + 1) & 7, [stored, added(one << 2, one << 1, one)]
        else:
            plain, readings = added(one), [stored]
        if self.packing == GPTQ_V2:
            plain = stored
        if self.symmetric:
            for zeros in readings:
                if bool((zeros == 2 ** (self.bits - 1)).all()):
                    return zeros
        return plain


def _in_order(values: torch.Tensor) -> torch.Tensor:
    """Put AWQ's numbers, one for each row along the second dimension, into the order of the rows."""
    return values.view(len(values), -1, len(AWQ_ORDER))[:, :, list(AWQ_ORDER)].reshape(values.shape)


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes in ``words``, int32 [n, words], from the lowest bit on: uint8 [n, words * 32 / bits].

    Three words hold 32 codes of 3 bits. Two of these codes begin in one word and end in the next.
    """
    if bits != 3:
        return torch.stack([((words >> at) & (2**bits - 1)).byte() for at in range(0, WORD, bits)], 2).flatten(1)
    low, middle, high = (words.long() & 0xFFFFFFFF).view(len(words), -1, 3).unbind(2)
    begun, ended = low | (middle << 32), (middle >> 31) | (high << 1)  # bits of codes 0 to 20, and of codes 21 to 31
    codes = [begun >> at for at in range(0, 63, 3)] + [ended >> at for at in range(0, 33, 3)]
    return torch.stack([(code & 7).byte() for code in codes], 2).flatten(1)


def group_size(quantization: Mapping[str, Any]) -> int:
    """Return the group size that a quantization_config names; -1 if it names none."""
    size = quantization.get("group_size", -1)
    return size if isinstance(size, int) else -1


class Gptq(Format):
    """GPTQ in 8, 4, 3 or 2 bits, which may differ between modules, in either version of its zero points."""

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


class Awq(Format):
    """AWQ in 4 bits, in the format of AutoAWQ's ``gemm`` kernels."""

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
