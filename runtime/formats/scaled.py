"""Weights as codes and scales: FP8, MXFP8, MXFP4 and NVFP4, as DeepSeek, gpt-oss and ModelOpt store them.

Records can have the codes and scales as they are. ``compressed`` reads compressed-tensors' checkpoints in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch

from moetier.tiers.errors import DOWNLOAD_AGAIN, CheckpointError, UnsupportedModelError
from moetier.tiers.layout import CODING_GROUPS, CODINGS, Projection
from moetier.tiers.quant.codings import decode_rows

from .registry import Format
from .tensors import Runs, SourceTensor, StoredTensor

TILE_WEIGHTS = 1 << 21  # most weights decoded at a time: 8 MiB in fp32
# names of the scales of a "weight": in DeepSeek-V3, DeepSeek-V4, Mistral, and of ModelOpt and compressed-tensors
SCALES = ("weight_scale_inv", "scale", "qscale_weight", "weight_scale")
# names of tensors that belong to a quantised weight, and are not needed to decode it
DROPPED = ("activation_scale", "input_scale", "input_global_scale", "weight_shape", "k_scale", "v_scale")
BLOCK = (128, 128)  # rows and columns that share an FP8 scale, if the config does not say how many
# dictionaries from a type in a file to the coding of codes of this type, and to our name of scales of this type
CODES = {"F8_E4M3": "e4m3", "U8": "e2m1", "I8": "e2m1", "I32": "int4"}
SCALE_TYPES = {
    "F8_E8M0": "e8m0", "U8": "e8m0", "F8_E4M3": "e4m3", "BF16": "bfloat16", "F16": "float16", "F32": "float32",
}  # fmt: skip
# from codings to the pairs that can be decoded: the type of the scales, and whether each matrix also has a number for
# all of its scales
_FLOATS = {("bfloat16", False), ("float16", False), ("float32", False)}
DECODABLE = {"e2m1": {("e8m0", False), ("e4m3", True)}, "int4": _FLOATS, "e4m3": _FLOATS | {("e8m0", False)}}


@dataclass(frozen=True, slots=True)
class ScaledTensor(SourceTensor):
    """Matrix, or one for each expert, that is stored as codes and scales. Its shape is [..., rows, columns].

    The stored tensors have these shapes, whatever shapes the file gives them: codes [..., rows, items of the file's
    type], scales [..., grid rows, grid columns], globals [...]. Scales that all experts share have only the last two
    dimensions.
    """

    codes: StoredTensor
    scales: StoredTensor
    globals: StoredTensor | None
    projection: Projection  # of one matrix, named "", with the fields of its coding; dtype: the type that is read

    @classmethod
    def of(
        cls,
        codes: StoredTensor,
        scales: StoredTensor,
        globals_: StoredTensor | None,
        *,
        dtype: str,
        block: tuple[int, int] = BLOCK,
        globals_as: str = "",
        transposed: bool = False,
    ) -> ScaledTensor:
        """Find the coding from types and shapes.

        Args:
            codes: [..., rows, items], in one of the types CODES. An item has 1, 2 or 8 weights.
            scales: [..., grid rows, grid columns], [..., rows], or one number.
            globals_: one number for each matrix, or None.
            dtype: torch's name of the type in which weights are read.
            block: how many rows and columns share a scale. Either number is ignored if ``scales`` does not have
                ceil(size / number) scales in that dimension; its scales then divide the dimension evenly.
            globals_as: what is done to scales with ``globals_``, as ``Projection.globals``.
            transposed: whether weights are read as [..., columns, rows].

        Raises CheckpointError if the shapes do not fit, and UnsupportedModelError for types that can't be decoded.
        """
        coding, scale_type = _coding_of(codes, scales, globals_)
        *lead, rows, items = codes.shape
        bits = CODINGS[coding]
        columns = items * codes.nbytes // math.prod(codes.shape) * 8 // bits
        grid, (block_rows, group) = _grid_of(codes, scales, (rows, columns), block)
        many = bool(lead) and scales.shape[: len(lead)] == tuple(lead)  # else one scale, or grid, for all experts
        if globals_ is not None:
            if globals_.spelling != "F32" or math.prod(globals_.shape) != math.prod(lead):
                raise CheckpointError(
                    f"{_named(globals_)} has type {globals_.spelling} and shape {list(globals_.shape)}, not one number "
                    "in F32 for each matrix.",
                    DOWNLOAD_AGAIN,
                )
            globals_ = replace(globals_, shape=tuple(lead))
        projection = Projection(
            "",
            rows,
            columns,
            bits,
            dtype,
            transposed,
            group,
            coding=coding,
            scales=scale_type,
            block_rows=block_rows,
            globals=globals_as if globals_ is not None else "",
        )
        return cls(codes, replace(scales, shape=(*lead, *grid) if many else grid), globals_, projection)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor as ``read`` returns it."""
        return (*self.codes.shape[:-2], *self.projection.shape)

    @property
    def dtype(self) -> str:
        """torch's name of the type that ``read`` returns."""
        return self.projection.dtype

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """Codes, scales and, if there are any, globals."""
        return (self.codes, self.scales) if self.globals is None else (self.codes, self.scales, self.globals)

    def by_expert(self, experts: int) -> list[list[SourceTensor]]:
        """Return one run: a slice for each expert."""
        return [[self.slice(index) for index in range(experts)]] if self.shape[:1] == (experts,) else []

    def record_projection(self, plain: Projection, runs: Runs) -> Projection:
        """Return the projection with the coding of the matrices, which must be the same for all experts."""
        projections = {member.projection for member in self.members_of(runs)}
        one, name = projections.pop(), runs[0][0].stored_name
        if projections:
            raise ValueError(f"{name} and the weights that belong to it are not quantised alike")
        if one.transposed != plain.transposed:
            raise ValueError(f"{name} is stored in another order than the model has")
        if one.bits == 4 and one.group not in CODING_GROUPS:
            raise ValueError(f"{name} has a scale for each {one.group} weights, not 16, 32, 64 or 128")
        apart = bool(one.globals) or one.rows % one.block_rows != 0  # else parts have one grid of scales
        parts = len(runs) if apart else 1
        return replace(one, name=plain.name, rows=one.rows * len(runs), parts=parts, dtype=plain.dtype)

    def component(self, name: str) -> StoredTensor:
        """Return the tensor of the section "codes", "scales" or "globals"."""
        return getattr(self, name)

    def slice(self, index: int) -> Self:
        """Return a slice of the leading dimension as a tensor of its own, without that dimension. Nothing is read."""
        many = len(self.scales.shape) == len(self.codes.shape)
        return replace(
            self,
            codes=self.codes.slice(index),
            scales=self.scales.slice(index) if many else self.scales,
            globals=self.globals.slice(index) if self.globals else None,
        )

    def read(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Read and decode ``count`` rows of the leading dimension, from row ``first`` on, as [count, ...]."""
        count = self.shape[0] - first if count is None else count
        out = torch.empty((count, *self.shape[1:]), dtype=getattr(torch, self.dtype))
        if len(self.shape) > 2:
            for i in range(count):
                out[i] = self.slice(first + i).read()
        elif self.projection.transposed:
            transposed = torch.empty(self.projection.shape[::-1], dtype=out.dtype)
            self._read_rows(0, transposed)
            out.copy_(transposed.T[first : first + count])
        else:
            self._read_rows(first, out)
        return out

    def _read_rows(self, first: int, out: torch.Tensor) -> None:
        """Fill ``out`` with decoded rows of the matrix, from row ``first`` on.

        A limited number of rows is decoded at a time, so that a large matrix is never in fp32 as a whole.
        """
        p, block = self.projection, self.projection.block_rows
        tile = max(1, TILE_WEIGHTS // (p.columns * block)) * block
        views = {} if self.globals is None else {".globals": self.globals.read().view(1)}
        stop = first + len(out)
        for start in range(first - first % block, stop, tile):
            end = min(start + tile, stop)
            views[".codes"] = self.codes.read(start, end - start).view(torch.uint8)
            scales = self.scales.read(start // block, -(-end // block) - start // block)
            views[".scales"] = scales.view(torch.uint8) if scales.dtype.itemsize == 1 else scales
            begin = max(start, first)
            part = replace(p, rows=end - start, transposed=False)
            out[begin - first : end - first] = decode_rows(views, part, begin - start, end - start)


def _named(tensor: StoredTensor) -> str:
    return f"{tensor.name} of {tensor.file}"


def _coding_of(codes: StoredTensor, scales: StoredTensor, globals_: StoredTensor | None) -> tuple[str, str]:
    """Return the coding, and our name of the type of its scales. Raises as ``ScaledTensor.of``."""
    coding, scale_type = CODES[codes.spelling], SCALE_TYPES.get(scales.spelling, "")
    if (scale_type, globals_ is not None) not in DECODABLE[coding]:
        raise UnsupportedModelError(
            f"{_named(codes)} is in {codes.spelling} with scales in {scales.spelling}, which moetier can't read.",
            "Give a checkpoint in a format that docs/choosing.md lists.",
        )
    if len(codes.shape) < 2 or not all(codes.shape):
        raise CheckpointError(f"{_named(codes)} has shape {list(codes.shape)}, which is no matrix.", DOWNLOAD_AGAIN)
    return coding, scale_type


def _grid_of(
    codes: StoredTensor, scales: StoredTensor, size: tuple[int, int], block: tuple[int, int]
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Return the shape of each matrix's grid of scales, and how many rows and columns share a scale.

    ``size`` is the rows and columns of a matrix. The other arguments are those of ``ScaledTensor.of``. Raises
    CheckpointError if the scales do not fit.
    """
    lead = codes.shape[:-2]
    grid = scales.shape[len(lead) :] if scales.shape[: len(lead)] == lead else scales.shape
    if math.prod(grid) == 1:
        grid = (1, 1)
    elif len(grid) == 1:
        grid = (*grid, 1)
    if len(grid) == 2 and math.prod(grid) > 0:
        rows, columns = (_per_scale(*sizes) for sizes in zip(size, grid, block, strict=True))
        if rows and columns:
            return grid, (rows, columns)
    raise CheckpointError(
        f"{_named(scales)} has shape {list(scales.shape)}, which does not fit {codes.name} of shape {[*lead, *size]}.",
        DOWNLOAD_AGAIN,
    )


def _per_scale(size: int, cells: int, block: int) -> int:
    """Return how many rows or columns share a scale; 0 if the scales do not fit.

    ``size`` is the number of rows or columns, ``cells`` that of their scales, and ``block`` how many should share one.
    """
    block = min(block, size)
    per_scale = block if -(-size // block) == cells else size // cells
    return per_scale if per_scale and -(-size // per_scale) == cells else 0


class Scaled(Format):
    """Weights with scales, which are recognised by the names and types of their tensors. The config may name blocks."""

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share an FP8 scale. Raises UnsupportedModelError as ``sources``."""
        return pair_of_sizes(self.quantization.get("weight_block_size")) or BLOCK

    def sources(self, dtype: str) -> dict[str, SourceTensor]:
        """Return the source tensors: codes and scales come together, as one weight."""
        sources: dict[str, SourceTensor] = {}
        for name, tensor in self._weights(self.block, dtype):
            if name in sources:
                raise CheckpointError(f"{name} is in {tensor.parts[0].file} in two forms.", DOWNLOAD_AGAIN)
            sources[name] = tensor
        return sources

    def _weights(self, block: tuple[int, int], dtype: str) -> Iterator[tuple[str, SourceTensor]]:
        """Yield all weights by name: first those that have scales, and then the others."""
        taken: set[str] = set()
        for name, tensor in self.tensors.items():
            coded = _names_of_coded(name)
            weight, globals_ = coded.weight, coded.number
            scale = next((candidate for candidate in coded.scales if candidate in self.tensors), None)
            if scale is None or (tensor.shape and tensor.spelling not in CODES):
                continue
            taken |= {name, scale, globals_}
            if not tensor.shape:  # only names are known
                yield weight, replace(tensor, name=weight)
                continue
            fused = name.endswith("_blocks")
            if fused:  # gpt-oss: [experts, rows, groups, 16]
                tensor = replace(tensor, shape=(*tensor.shape[:-2], math.prod(tensor.shape[-2:])))
            given = {"dtype": dtype, "globals_as": coded.globals}
            yield (
                weight,
                ScaledTensor.of(
                    tensor, self.tensors[scale], self.tensors.get(globals_), block=block, transposed=fused, **given
                ),
            )
        for name in self.tensors:
            if name not in taken:
                yield from self._unscaled(name)

    def _unscaled(self, name: str) -> Iterator[tuple[str, SourceTensor]]:
        """Yield a tensor without scales, unless the model does not need it."""
        if name.rpartition(".")[2] in DROPPED:
            return
        tensor = self.tensors[name]
        if tensor.dtype.startswith("float8") or name.endswith(".weight_packed"):
            raise CheckpointError(f"{_named(tensor)} is in {tensor.spelling} but has no scale.", DOWNLOAD_AGAIN)
        if name.endswith((".weight_zero_point", ".weight_g_idx")):
            raise unreadable("weights with zero points or an order of groups")
        yield name, tensor


class _CodedNames(NamedTuple):
    """Names of the tensors that belong to the tensor of a weight's codes."""

    weight: str
    scales: list[str]  # names that the scales may have
    number: str  # name of the number for all scales, or ""
    globals: str  # what is done with this number, as in ``Projection.globals``


def _names_of_coded(name: str) -> _CodedNames:
    """Return the names of the tensors that belong to the codes ``name``, if ``name`` has codes."""
    stem, _, leaf = name.rpartition(".")
    if leaf == "weight":
        return _CodedNames(name, [f"{stem}.{scale}" for scale in SCALES], f"{stem}.weight_scale_2", "multiply")
    if leaf == "weight_packed":
        return _CodedNames(f"{stem}.weight", [f"{stem}.weight_scale"], f"{stem}.weight_global_scale", "divide")
    if name.endswith("_blocks"):
        weight = name.removesuffix("_blocks")
        return _CodedNames(weight, [f"{weight}_scales"], "", "")
    return _CodedNames(name, [f"{name}_scale_inv"], "", "")


def pair_of_sizes(value: object) -> tuple[int, int] | None:
    """Return a list of two sizes as a tuple; None for any other value."""
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
        return value[0], value[1]
    return None


def unreadable(what: str) -> UnsupportedModelError:
    """Return the error for a variant of compressed-tensors that can't be read. ``what`` names it."""
    return UnsupportedModelError(
        f"The checkpoint is quantised with compressed-tensors, in {what}, which moetier can't read.",
        "Give a checkpoint in 16 or 32 bits, or in a format that docs/choosing.md lists.",
    )
