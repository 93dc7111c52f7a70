"""Matrices that HQQ has quantised, as hqq's ``HQQLinear`` saves them. The package hqq is not needed to read them.

A group of hqq is a run of neighbouring weights, row after row (axis 1), or every n-th weight of the whole matrix, where
n is the number of groups (axis 0). Records can't have groups of axis 0.

mixtral-offloading published a checkpoint of Mixtral in a format of its own. Its groups are of axis 0, and its scales
and zero points are quantised, too. It lacks the tensors that describe a matrix (DESCRIBING): the model's config and the
sizes of the other tensors replace them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moetier.tiers.errors import DOWNLOAD_AGAIN, CheckpointError, UnsupportedModelError
from moetier.tiers.layout import Bits
from moetier.tiers.quant.zero_points import Levels

from .affine import SCALES, AffineTensor
from .registry import Format
from .tensors import Numbers, SourceTensor, StoredTensor, check

MAIN = "W_q"  # name of a module's packed codes
DESCRIBING = ("shape", "nbits", "group_size", "axis")  # names of the tensors that describe a matrix
OTHERS = (
    "packing", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "compute_dtype", "offload_meta",
    "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip
STORED_BITS: dict[float, Bits] = {8: 8, 6: 8, 5: 8, 4: 4, 3: 3, 2: 2, 1.58: 2}  # from hqq's bits to those of a code
PER_WORD = 10  # codes of 3 bits in a word of 32
# the names of mixtral-offloading: codes of a scale or zero point, and the scale and zero point of these
OFFLOADED = {
    name: (f"meta.{name}_q", f"meta.meta_{name}.scale", f"meta.meta_{name}.zero") for name in ("scale", "zero")
}


@dataclass(frozen=True, slots=True)
class Requantised:
    """Scales or zero points of a matrix that HQQ has quantised to 8 bits, too. ``shape`` is that of the numbers."""

    codes: StoredTensor
    scale: StoredTensor
    zero: StoredTensor
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the stored codes."""
        return self.codes.name

    @property
    def dtype(self) -> str:
        """torch's name of the type that ``read`` returns."""
        return self.scale.dtype

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """Codes, their scales and their zero points."""
        return (self.codes, self.scale, self.zero)

    def read(self) -> torch.Tensor:
        """Read and dequantise the numbers, in ``shape``: [1, groups]."""
        scale, zero = self.scale.read().view(-1), self.zero.read().view(-1)  # one for each column of codes, or for all
        return self.codes.read().to(scale.dtype).sub_(zero).mul_(scale).view(self.shape)


@dataclass(frozen=True, slots=True)
class HqqTensor(AffineTensor):
    """Matrix of HQQ. ``nbits`` are hqq's bits, a key of STORED_BITS."""

    name: str
    dtype: str
    packed: StoredTensor
    scale: Numbers
    zero: Numbers
    shape: tuple[int, int]
    nbits: float
    group_size: int
    axis: int

    def __post_init__(self) -> None:
        if self.nbits not in STORED_BITS:
            raise UnsupportedModelError(
                f"{self.name} is quantised with HQQ to {self.nbits:g} bits, which moetier can't read.",
                f"Give a checkpoint with {', '.join(f'{bits:g}' for bits in STORED_BITS)} bits.",
            )
        if self.axis not in (0, 1) or min(*self.shape, self.group_size) < 1 or math.prod(self.shape) % self.group_size:
            raise self.damaged(f"groups of {self.group_size} along axis {self.axis} do not fit {list(self.shape)}")
        long, wide = self._grid
        rows, unit = (-(-long // PER_WORD), 4) if self.bits == 3 else (long * self.bits // 8, 1)
        if len(self.packed.shape) != 2 or self.packed.shape[0] != rows or self.packed.nbytes != rows * wide * unit:
            raise self.damaged(
                f"{self.packed.name} is {self.packed.dtype} {list(self.packed.shape)}, which does not fit "
                f"{list(self.shape)} with {self.nbits:g} bits"
            )
        groups = (long, 1) if self.axis == 1 else (1, wide)
        check(self.scale, groups, *SCALES)
        check(self.zero, groups, self.scale.dtype)

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """Packed codes, scales and zero points."""
        return (self.packed, *self.scale.parts, *self.zero.parts)

    @property
    def bits(self) -> Bits:
        """Bits of a code."""
        return STORED_BITS[self.nbits]

    @property
    def scale_type(self) -> str:
        """torch's name of the type of scales and zero points, in which weights are computed."""
        return self.scale.dtype

    @property
    def per_group(self) -> int:
        """Number of neighbouring weights of a row that share a scale; 0 if groups do not lie along rows."""
        return self.group_size if self.axis == 1 and self.shape[1] % self.group_size == 0 else 0

    @property
    def groups_as_text(self) -> str:
        """A few words about its groups, for a message."""
        return f"of {self.group_size} weights along axis {self.axis}"

    def probe(self, group: int) -> None:
        """Do nothing: how groups lie follows from ``axis``."""

    @property
    def _grid(self) -> tuple[int, int]:
        """The shape in which hqq stores the codes: a group is a row of it, or with axis 0 a column."""
        groups = math.prod(self.shape) // self.group_size
        return (groups, self.group_size) if self.axis == 1 else (self.group_size, groups)

    def levels(self, group: int) -> Levels:
        """Read what is stored, with a scale and zero point for each ``group`` weights, a divisor of ``self.group``."""

        scales, zeros = (
            self.finite(tensor).view(self.shape[0], -1).repeat_interleave(self.group_size // group, 1)
            for tensor in (self.scale, self.zero)
        )
        return Levels(self._codes().view(self.shape), scales, zeros)

    def weights(self) -> torch.Tensor:
        """Read and dequantise the matrix [rows, columns], in the type of its scales. Raises CheckpointError."""
        scales, zeros = self.finite(self.scale), self.finite(self.zero)
        return self._codes().to(scales.dtype).sub_(zeros).mul_(scales).view(self.shape)

    def _codes(self) -> torch.Tensor:
        """Read the codes, uint8, in the shape ``_grid``."""
        # hqq may have saved the bytes as if they were floating-point numbers
        packed = self.packed.read().view(torch.int32 if self.bits == 3 else torch.uint8)
        return unpacked(packed, self.bits)[: self._grid[0]].contiguous()


def unpacked(packed: torch.Tensor, bits: Bits) -> torch.Tensor:
    """Unpack codes. ``packed``: uint8 [n, columns], or int32 for 3 bits.

    Returns uint8 [n * codes per item, columns].

    The highest bits of all items are the first n rows, and so on. A word of 32 bits has ten codes of 3 bits, and its
    highest two bits are not used.
    """
    first = 3 * (PER_WORD - 1) if bits == 3 else 8 - bits
    return torch.cat([((packed >> at) & (2**bits - 1)).byte() for at in range(first, -1, -bits)])


class Hqq(Format):
    """HQQ: linear modules as hqq and transformers save them, or mixtral-offloading's checkpoint."""

    def sources(self, dtype: str) -> dict[str, SourceTensor]:
        """Return the source tensors. Reads the numbers that describe each matrix."""
        if any(name.endswith(f".{OFFLOADED['scale'][0]}") for name in self.tensors):
            return self._offloaded(dtype)

        def make(weight: str, own: dict[str, StoredTensor]) -> HqqTensor:
            (rows, columns), (nbits,), (group,), (axis,) = (_numbers(weight, own[name]) for name in DESCRIBING)
            size, nbits = (int(rows), int(columns)), round(nbits, 2)
            return HqqTensor(weight, dtype, own[MAIN], own["scale"], own["zero"], size, nbits, int(group), int(axis))

        return self.joined(MAIN, ("scale", "zero", *DESCRIBING), OTHERS, make)

    def _offloaded(self, dtype: str) -> dict[str, SourceTensor]:
        sizes = _sizes_of_mixtral(self.config)

        def make(weight: str, own: dict[str, StoredTensor]) -> HqqTensor:
            size = sizes.get(weight.split(".")[-2], (0, 0))
            weights, groups = math.prod(size), math.prod(own[OFFLOADED["scale"][0]].shape)
            if not weights or not groups:
                raise CheckpointError(
                    f"{weight} is quantised, but a model with this config ({self.config.get('model_type')}) has no "
                    "such matrix.",
                    "Check that config.json belongs to these weights.",
                )
            scale, zero = (_requantised(weight, groups, *(own[name] for name in names)) for names in OFFLOADED.values())
            nbits = 8 * own[MAIN].nbytes / weights
            return HqqTensor(weight, dtype, own[MAIN], scale, zero, size, nbits, weights // groups, 0)

        return self.joined(MAIN, OFFLOADED["scale"] + OFFLOADED["zero"], (), make)


def _numbers(weight: str, tensor: StoredTensor) -> list[float]:
    """Return the numbers of a tensor that describes ``weight`` (DESCRIBING). "shape" has two, any other has one.

    Raises CheckpointError if it has another type or number.
    """
    count = 2 if tensor.name.endswith(".shape") else 1
    types = ("int32", "int64", *(("float32",) if tensor.name.endswith(".nbits") else ()))
    if math.prod(tensor.shape) != count or tensor.dtype not in types:
        raise CheckpointError(
            f"{weight}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}, not {' or '.join(types)} [{count}].",
            DOWNLOAD_AGAIN,
        )
    if not tensor.file.exists():
        raise CheckpointError(
            f"{weight} is quantised with HQQ, and only its file says how. That file was not downloaded yet.",
            "Download the whole checkpoint first (hf download ID --local-dir FOLDER), then use the folder.",
        )
    return tensor.read().double().view(-1).tolist()


def _requantised(weight: str, groups: int, codes: StoredTensor, scale: StoredTensor, zero: StoredTensor) -> Requantised:
    if (
        not codes.shape
        or math.prod(codes.shape) != groups
        or codes.dtype != "uint8"
        or math.prod(scale.shape) not in (1, codes.shape[-1])
        or (scale.shape, scale.dtype) != (zero.shape, zero.dtype)
    ):
        shapes = ", ".join(f"{part.name} {list(part.shape)}" for part in (codes, scale, zero))
        raise CheckpointError(f"{weight} has {groups:,} groups, which do not fit {shapes}.", DOWNLOAD_AGAIN)
    return Requantised(codes, scale, zero, (1, groups))


def _sizes_of_mixtral(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the rows and columns of Mixtral's matrices, by the last parts of their paths.

    Return {} if the config is of another model, or does not name all sizes.
    """
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    sizes = [size for name in names if isinstance(size := config.get(name), int) and size > 0]
    if config.get("model_type") != "mixtral" or len(sizes) < len(names):
        return {}
    hidden, inner, heads, shared = sizes
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, shared * head
    return {
        "w1": (inner, hidden),
        "w2": (hidden, inner),
        "w3": (inner, hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
