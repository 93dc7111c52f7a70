"""Extents of a checkpoint: which bytes of its own files make the record of each expert, by transformers' own rules.

An expert's parameter can be read by reference if it is a slice of one stored tensor, or the rows of several, one after
the other, in the type of the model or in a coding that kernels multiply with. Anything else, such as weights that
transformers transposes on loading, has to be converted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from moetier.tiers.errors import UnsupportedModelError
from moetier.tiers.extents.reader import header_digest
from moetier.tiers.extents.table import BlockExtents, ExtentTable, RecordPiece, Shard
from moetier.tiers.layout import RecordLayout
from moetier.tiers.manifest import Block, Manifest, method_of
from moetier.tiers.store.atomic import read_errors
from moetier.tiers.store.folder import command

from .blueprint import build_on_meta, make_blueprint, records_of
from .containers import SAMPLE_BYTES, SAMPLE_STRIDE, Checkpoint
from .native import check_shape, is_narrowed, native_layout, row_bytes_of, stored_in
from .recipe import BlockBlueprint

_log = logging.getLogger(__name__)

SAMPLERS = 8  # threads that read samples of the shards


def extent_table(checkpoint: Checkpoint) -> ExtentTable:
    """Make the table of a checkpoint, without checksums: reads headers, and samples of the bytes for the digest.

    Raises UnsupportedModelError for a checkpoint whose experts can't be read by reference, CheckpointError, or
    StoreReadError.
    """
    model, dtype = build_on_meta(checkpoint.config, checkpoint.first_dtype)
    blueprint = make_blueprint(model, dtype, checkpoint.sources(model, str(dtype).removeprefix("torch.")))
    if blueprint.unused:
        _log.warning(
            "%s: the model does not use %d tensors, such as %s: they are left out.",
            checkpoint.folder,
            len(blueprint.unused),
            blueprint.unused[0],
        )
    try:
        blocks, layouts = records_of(blueprint, native_layout)
    except ValueError as error:
        raise _refusal(checkpoint, str(error)) from error
    home = checkpoint.folder if checkpoint.folder.is_dir() else checkpoint.folder.parent
    names = {tensor.file: tensor.file.relative_to(home).as_posix() for tensor in checkpoint.tensors.values()}
    files = sorted(names, key=names.__getitem__)
    shards = tuple(_shard(names[file], file) for file in files)
    numbers = {file: number for number, file in enumerate(files)}
    try:
        extents = tuple(
            _block(checkpoint, block, layouts[entry.array], numbers)
            for block, entry in zip(blueprint.blocks, blocks, strict=True)
        )
    except ValueError as error:
        raise _refusal(checkpoint, str(error)) from error
    digest = _digest(blocks, layouts, shards, files)
    method = method_of("hqq", layouts, None)
    manifest = Manifest(checkpoint.name, digest, blocks, layouts, version("moetier"), digest=digest, method=method)
    return ExtentTable(manifest, shards, extents)


def _refusal(checkpoint: Checkpoint, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{checkpoint.folder} is a checkpoint whose experts can't be used as they are: {reason}.",
        f"Convert it: {command('convert', checkpoint.folder, 'DST')}",
    )


def _shard(name: str, file: Path) -> Shard:
    with read_errors(file):
        status = file.stat()
    return Shard(name, status.st_size, status.st_mtime_ns, header_digest(file))


def _block(
    checkpoint: Checkpoint, block: BlockBlueprint, layout: RecordLayout, numbers: Mapping[Path, int]
) -> BlockExtents:
    for name in block.parameters:
        check_shape(block, name)
    pieces, places = [], []
    for section in layout.sections:
        row_bytes = row_bytes_of(block, section)
        for stored in stored_in(block, section):
            is_wide = is_narrowed(stored[0], section)
            pieces.append(RecordPiece(section.name, stored[0].nbytes // (2 if is_wide else 1), row_bytes, is_wide))
            places.append([(numbers[tensor.file], tensor.offset) for tensor in stored])
    return BlockExtents(tuple(pieces), np.array(places, np.int64).transpose(1, 0, 2))


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
