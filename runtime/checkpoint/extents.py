"""Extents of a checkpoint: which bytes of its own files make the record of each expert, by transformers' own rules.

An expert's parameter can be read by reference if it is a slice of one stored tensor, or the rows of several, one after
the other, in the type of the model. Anything else, such as weights that transformers transposes on loading, has to be
converted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from transformers import core_model_loading as loading

from moetier.tiers.errors import CheckpointError, UnsupportedModelError
from moetier.tiers.extents.reader import header_digest
from moetier.tiers.extents.table import BlockExtents, ExtentTable, Piece, Shard
from moetier.tiers.layout import ITEM_BYTES, RecordLayout
from moetier.tiers.manifest import Block, Manifest
from moetier.tiers.store.atomic import read_errors
from moetier.tiers.store.folder import command

from .blueprint import build_on_meta, make_blueprint, records_of
from .files import SAMPLE_BYTES, SAMPLE_STRIDE, Checkpoint
from .recipe import BlockBlueprint, Recipe
from .tensors import SourceTensor

SAMPLERS = 8  # threads that read samples of the shards


def extent_table(checkpoint: Checkpoint) -> ExtentTable:
    """Make the table of a checkpoint, without checksums: reads headers, and samples of the bytes for the digest.

    Raises UnsupportedModelError for a checkpoint whose experts can't be read by reference, CheckpointError, or
    StoreReadError.
    """
    if (quantization := checkpoint.quantization) is not None:
        raise _refusal(checkpoint, f"its weights are quantised ({quantization.get('quant_method')})")
    model, dtype = build_on_meta(checkpoint.config, checkpoint.first_dtype)
    blueprint = make_blueprint(model, dtype, dict[str, SourceTensor](checkpoint.tensors))
    blocks, layouts = records_of(blueprint, bits=16)
    names = {
        tensor.file: tensor.file.relative_to(checkpoint.folder).as_posix() for tensor in checkpoint.tensors.values()
    }
    files = sorted(names, key=names.__getitem__)
    shards = tuple(_shard(names[file], file) for file in files)
    numbers = {file: number for number, file in enumerate(files)}
    extents = tuple(
        _block(checkpoint, block, layouts[entry.array], numbers)
        for block, entry in zip(blueprint.blocks, blocks, strict=True)
    )
    digest = _digest(blocks, layouts, shards, files)
    manifest = Manifest(checkpoint.name, digest, blocks, layouts, version("moetier"), digest=digest)
    return ExtentTable(manifest, shards, extents)


def _refusal(checkpoint: Checkpoint, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{checkpoint.folder} is a checkpoint whose experts can't be used as they are: {reason}.",
        f"Convert it: {command('convert', checkpoint.folder, 'DST')}",
    )


def _shard(name: str, file: Path) -> Shard:
    with read_errors(file):
        found = file.stat()
    return Shard(name, found.st_size, found.st_mtime_ns, header_digest(file))


def _block(
    checkpoint: Checkpoint, block: BlockBlueprint, layout: RecordLayout, numbers: Mapping[Path, int]
) -> BlockExtents:
    pieces, places = [], []
    for section in layout.sections:
        parts = _parts(checkpoint, block.recipes[section.name])
        found, wanted = _stacked([part.shape for part in parts]), block.parameters[section.name][0]
        if found != wanted:
            raise CheckpointError(
                f"{block.path}: {section.name} of an expert comes out as {list(found)} from this checkpoint; the model "
                f"has {list(wanted)}.",
                "Check that config.json belongs to these weights.",
            )
        for part in parts:
            if part.dtype != section.dtype:
                raise _refusal(checkpoint, f"{part.name} is in {part.dtype}, and a record holds {section.dtype}")
            pieces.append(Piece(section.name, math.prod(part.shape) * ITEM_BYTES[section.dtype]))
            places.append([(numbers[file], offset) for file, offset in part.places])
    return BlockExtents(tuple(pieces), np.array(places, np.int64).transpose(1, 0, 2))


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a parameter that are contiguous in the checkpoint, for each expert."""

    name: str  # of the tensor, or of the first of several
    dtype: str
    shape: tuple[int, ...]  # for one expert
    places: list[tuple[Path, int]]  # for each expert, the file and the offset in it


def _parts(checkpoint: Checkpoint, recipe: Recipe) -> list[_Part]:
    """Return the parts of a parameter, which is made of their rows, in order. Raises UnsupportedModelError."""
    operations = recipe.converter.operations if recipe.converter else []
    for operation in operations:
        if not _keeps_rows(operation):
            raise _refusal(checkpoint, f"transformers changes {recipe.target} on loading ({operation})")
    merged = any(isinstance(operation, loading.MergeModulelist) for operation in operations)
    patterns = recipe.converter.source_patterns if recipe.converter else recipe.sources
    parts = []
    for tensors in (recipe.sources[pattern] for pattern in patterns if pattern in recipe.sources):
        stored = [part for tensor in tensors for part in tensor.parts]
        first = stored[0]
        if merged and len(stored) == recipe.experts and len({(part.shape, part.dtype) for part in stored}) == 1:
            parts.append(_Part(first.name, first.dtype, first.shape, [(part.file, part.offset) for part in stored]))
        elif not merged and len(stored) == 1 and first.shape[:1] == (recipe.experts,):
            size = first.nbytes // recipe.experts
            places = [(first.file, first.offset + expert * size) for expert in range(recipe.experts)]
            parts.append(_Part(first.name, first.dtype, first.shape[1:], places))
        else:
            raise _refusal(checkpoint, f"{recipe.target} is made of tensors that are not alike, such as {first.name}")
    return parts


def _keeps_rows(operation: loading.ConversionOps) -> bool:
    """Return whether an operation keeps each row of an expert's weights, and puts them one after the other."""
    match operation:
        case loading.MergeModulelist():
            return operation.dim == 0
        case loading.Concatenate():
            return operation.dim == 1
        case _:
            return False


def _stacked(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of arrays of these shapes, stacked along their first dimension; () if they don't fit."""
    rows, tails = sum(shape[0] for shape in shapes if shape), {shape[1:] for shape in shapes if shape}
    return (rows, *tails.pop()) if len(tails) == 1 and all(shapes) else ()


def _digest(
    blocks: Sequence[Block], layouts: Mapping[str, RecordLayout], shards: Sequence[Shard], files: Sequence[Path]
) -> str:
    """Return a digest that identifies the experts: sha256 over layouts, names, sizes, headers and samples of shards.

    Samples tell fine-tunes apart, whose headers are the same.
    """
    state = hashlib.sha256(json.dumps([layouts[block.array].to_json() | asdict(block) for block in blocks]).encode())
    with ThreadPoolExecutor(SAMPLERS, "moetier-samples") as pool:
        for shard, samples in zip(shards, pool.map(_samples, files), strict=True):
            state.update(json.dumps([shard.name, shard.bytes, shard.header]).encode())
            state.update(samples)
    return state.hexdigest()


def _samples(file: Path) -> bytes:
    """Return the digest of SAMPLE_BYTES of a file at each SAMPLE_STRIDE, and of its last ones."""
    state = hashlib.sha256()
    with read_errors(file), file.open("rb", buffering=0) as stream:
        descriptor = stream.fileno()
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
        last = max(os.fstat(descriptor).st_size - SAMPLE_BYTES, 0)
        for offset in (*range(0, last, SAMPLE_STRIDE), last):
            state.update(os.pread(descriptor, SAMPLE_BYTES, offset))
    return state.digest()
