"""Tensors of quantised checkpoints. To the converter they look like tensors in 16 bits: reading decodes them.

Each tells in which coding it is stored, and which stored tensors hold its codes and scales, so that a record can also
have them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from moetier.tiers.errors import CheckpointError, UnsupportedModelError
from moetier.tiers.layout import CODINGS, Projection
from moetier.tiers.quant.codings import decode_rows

from .hqq import MAIN, hqq_tensors
from .tensors import SourceTensor, StoredTensor
from .words import awq_tensors, gptq_tensors

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
# FORMS is a dictionary from codings to the pairs that can be decoded: the type of the scales, and whether each matrix
# also has a number for all of its scales.
_FLOATS = {("bfloat16", False), ("float16", False), ("float32", False)}
FORMS = {"e2m1": {("e8m0", False), ("e4m3", True)}, "int4": _FLOATS, "e4m3": _FLOATS | {("e8m0", False)}}
FORMATS = (
    "pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized", "mxfp8-quantized", "float-quantized",
    "naive-quantized", "mixed-precision", "dense",
)  # fmt: skip
_FIX = "Download the checkpoint again."


@dataclass(frozen=True, slots=True)
class Packed:
    """Matrix, or one for each expert, that is stored as codes and scales. Its shape is [..., rows, columns].

    The stored tensors have these shapes, whatever shapes the file gives them: codes [..., rows, items of the file's
    type], scales [..., row blocks, column blocks], globals [...]. Scales that all experts share have only the last two
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
    ) -> Packed:
        """Find the coding from types and shapes.

        Args:
            codes: [..., rows, items], in one of the types CODES. An item has 1, 2 or 8 weights.
            scales: [..., row blocks, column blocks], [..., rows], or one number.
            globals_: one number for each matrix, or None.
            dtype: torch's name of the type in which weights are read.
            block: how many rows and columns share a scale. Either number is ignored if ``scales`` does not have
                ceil(size / number) blocks in that dimension; its blocks then divide the dimension evenly.
            globals_as: what is done to scales with ``globals_``, as ``Projection.globals``.
            transposed: whether weights are read as [..., columns, rows].

        Raises CheckpointError if the shapes do not fit, and UnsupportedModelError for types that can't be decoded.
        """
        coding, kind = CODES[codes.spelling], SCALE_TYPES.get(scales.spelling, "")
        if (kind, globals_ is not None) not in FORMS[coding]:
            raise UnsupportedModelError(
                f"{_said(codes)} is in {codes.spelling} with scales in {scales.spelling}, which moetier can't read.",
                "Give a checkpoint in another form; docs/choosing.md lists those that can be read.",
            )
        if len(codes.shape) < 2 or not all(codes.shape):
            raise CheckpointError(f"{_said(codes)} has shape {list(codes.shape)}, which is no matrix.", _FIX)
        *lead, rows, items = codes.shape
        bits = CODINGS[coding]
        columns = items * codes.nbytes // math.prod(codes.shape) * 8 // bits
        many = bool(lead) and scales.shape[: len(lead)] == tuple(lead)  # else one scale, or grid, for all experts
        grid = scales.shape[len(lead) :] if many else scales.shape
        if math.prod(grid) == 1:
            grid = (1, 1)
        elif len(grid) == 1:
            grid = (*grid, 1)
        fits = len(grid) == 2 and math.prod(grid) > 0
        steps = [_step(*sizes) for sizes in zip((rows, columns), grid, block, strict=True)] if fits else [0]
        if not all(steps):
            raise CheckpointError(
                f"{_said(scales)} has shape {list(scales.shape)}, which does not fit {codes.name} of shape "
                f"{[*lead, rows, columns]}.",
                _FIX,
            )
        if globals_ is not None:
            if globals_.spelling != "F32" or math.prod(globals_.shape) != math.prod(lead):
                raise CheckpointError(
                    f"{_said(globals_)} has type {globals_.spelling} and shape {list(globals_.shape)}, not one number "
                    "in F32 for each matrix.",
                    _FIX,
                )
            globals_ = replace(globals_, shape=tuple(lead))
        return cls(
            codes,
            replace(scales, shape=(*lead, *grid) if many else grid),
            globals_,
            Projection(
                "",
                rows,
                columns,
                bits,
                dtype,
                transposed,
                steps[1],
                coding=coding,
                scales=kind,
                block_rows=steps[0],
                globals=globals_as if globals_ is not None else "",
            ),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor as ``read`` returns it."""
        return (*self.codes.shape[:-2], *self.projection.shape)

    @property
    def dtype(self) -> str:
        """torch's name of the type that ``read`` returns."""
        return self.projection.dtype

    @property
    def components(self) -> dict[str, StoredTensor]:
        """The stored tensors, by the names of a record's sections."""
        found = {"codes": self.codes, "scales": self.scales}
        return found if self.globals is None else found | {"globals": self.globals}

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """Codes, scales and, if there are any, globals."""
        return tuple(self.components.values())

    def slice(self, index: int) -> Packed:
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
            made = torch.empty(self.projection.shape[::-1], dtype=out.dtype)
            self._read_rows(0, made)
            out.copy_(made.T[first : first + count])
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


def _said(tensor: StoredTensor) -> str:
    return f"{tensor.name} of {tensor.file}"


def _step(size: int, cells: int, block: int) -> int:
    """Return how many rows or columns share a scale; 0 if the scales do not fit.

    ``size`` is the number of rows or columns, ``cells`` that of their scales, and ``block`` how many should share one.
    """
    block = min(block, size)
    step = block if -(-size // block) == cells else size // cells
    return step if step and -(-size // step) == cells else 0


def source_tensors(
    tensors: Mapping[str, StoredTensor],
    quantization: Mapping[str, Any] | None,
    dtype: str,
    config: Mapping[str, Any] | None = None,
) -> dict[str, SourceTensor]:
    """Return a dictionary from names to source tensors. Quantised tensors are read as ``dtype``, by torch's name.

    ``config`` is the checkpoint's config, and ``quantization`` its quantization_config, or None. Raises
    UnsupportedModelError for methods and forms that moetier can't read, and CheckpointError if the tensors of a weight
    do not fit.
    """
    quantization = quantization or {}
    method = quantization.get("quant_method")
    if method is None and any(name.endswith(f".{MAIN}") for name in tensors):
        method = "hqq"  # mixtral-offloading's config does not say so
    match method:
        case None:
            return dict(tensors)
        case "fp8" | "mxfp8" | "mxfp4" | "modelopt":
            block = quantization.get("weight_block_size")
        case "compressed-tensors":
            block = _block_of_compressed(quantization)
        case "awq":
            return awq_tensors(tensors, quantization, dtype)
        case "gptq":
            return gptq_tensors(tensors, quantization, dtype)
        case "hqq":
            return hqq_tensors(tensors, config or {}, dtype)
        case "moetier":
            raise UnsupportedModelError(
                "This is a model directory of moetier: it is converted already.",
                "Use it as it is, or give the checkpoint that it was made from.",
            )
        case _:
            raise UnsupportedModelError(
                f"The checkpoint is quantised with {method}, which moetier can't read.",
                "Give a checkpoint in 16 or 32 bits, or in a form that docs/choosing.md lists.",
            )
    found: dict[str, SourceTensor] = {}
    for name, tensor in _unpacked(tensors, _pair_of_sizes(block) or BLOCK, dtype):
        if name in found:
            raise CheckpointError(f"{name} is in {tensor.parts[0].file} in two forms.", _FIX)
        found[name] = tensor
    return found


def _pair_of_sizes(value: object) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
        return value[0], value[1]
    return None


def _block_of_compressed(quantization: Mapping[str, Any]) -> object:
    """Return the rows and columns that share an FP8 scale by a config of compressed-tensors; None if it names none.

    Raises UnsupportedModelError for formats that moetier can't read.
    """
    groups = quantization.get("config_groups")
    schemes = [scheme for scheme in groups.values() if isinstance(scheme, dict)] if isinstance(groups, dict) else []
    weights = [found for scheme in schemes if isinstance(found := scheme.get("weights"), dict)]
    formats = {str(place.get("format") or "dense") for place in (quantization, *schemes)}
    if others := sorted(formats - set(FORMATS)):
        raise _unreadable(f"the format {others[0]}")
    for scheme in weights:
        if scheme.get("num_bits") not in (4, 8) or (scheme.get("type"), scheme.get("num_bits")) == ("int", 8):
            raise _unreadable(f"weights of {scheme.get('num_bits')} bits of type {scheme.get('type')}")
        if scheme.get("symmetric") is False:
            raise _unreadable("weights with zero points")
    return next((found for scheme in weights if (found := scheme.get("block_structure"))), None)


def _unreadable(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The checkpoint is quantised with compressed-tensors, in {what}, which moetier can't read.",
        "Give a checkpoint in 16 or 32 bits, or in a form that docs/choosing.md lists.",
    )


def _unpacked(
    tensors: Mapping[str, StoredTensor], block: tuple[int, int], dtype: str
) -> Iterator[tuple[str, SourceTensor]]:
    """Yield names and tensors as the model knows them: codes and scales come together, as one weight."""
    used: set[str] = set()
    plain: list[str] = []
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        weight, scales, globals_, how = name, [f"{name}_scale_inv"], "", ""
        if leaf == "weight":
            scales = [f"{stem}.{scale}" for scale in SCALES]
            globals_, how = f"{stem}.weight_scale_2", "multiply"
        elif leaf == "weight_packed":
            weight, scales = f"{stem}.weight", [f"{stem}.weight_scale"]
            globals_, how = f"{stem}.weight_global_scale", "divide"
        elif name.endswith("_blocks"):
            weight = name.removesuffix("_blocks")
            scales = [f"{weight}_scales"]
        scale = next((found for found in scales if found in tensors), None)
        if scale is None or (tensor.shape and tensor.spelling not in CODES):
            plain.append(name)
            continue
        used |= {name, scale, globals_}
        if not tensor.shape:  # only names are known
            yield weight, replace(tensor, name=weight)
            continue
        fused = name.endswith("_blocks")
        if fused:  # gpt-oss: [experts, rows, groups, 16]
            tensor = replace(tensor, shape=(*tensor.shape[:-2], math.prod(tensor.shape[-2:])))
        yield (
            weight,
            Packed.of(
                tensor,
                tensors[scale],
                tensors.get(globals_),
                dtype=dtype,
                block=block,
                globals_as=how,
                transposed=fused,
            ),
        )
    for name in plain:
        if name in used or name.rpartition(".")[2] in DROPPED:
            continue
        tensor = tensors[name]
        if tensor.dtype.startswith("float8") or name.endswith(".weight_packed"):
            raise CheckpointError(f"{_said(tensor)} is in {tensor.spelling} but has no scale.", _FIX)
        if name.endswith((".weight_zero_point", ".weight_g_idx")):
            raise _unreadable("weights with zero points or an order of groups")
        yield name, tensor
