"""Read the header of a safetensors file, which is not trusted: the type, shape and offset of each tensor.

The format is specified at https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moetier.tiers.fields import Fields, shown
from moetier.tiers.manifest import MAX_BYTES

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
MAX_DIMENSIONS = 16
MAX_HEADER_BYTES = 32 << 20  # largest header of a checkpoint that is read: 200,000 tensors


class SafetensorsEntry(NamedTuple):
    """The entry of one tensor in a header."""

    dtype: str  # name of its type in the file, such as "BF16"
    shape: tuple[int, ...]
    begin: int  # offset of its first byte from the end of the header


def read_header(path: Path, most: int) -> tuple[bytes, int]:
    """Return the JSON of a file's header, and the number of bytes after the header.

    Raises ValueError if the header has more than ``most`` bytes, or if the file ends before the header does. Raises
    OSError if the file can't be read.
    """
    with path.open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(os.pread(stream.fileno(), 8, 0), "little")
        if not 2 <= length <= min(size - 8, most):
            raise ValueError(f"a header of {length:,} bytes is not valid in a file of {size:,} bytes")
        return os.pread(stream.fileno(), length, 8), size - 8 - length


def load_header(data: bytes) -> Mapping[str, object]:
    """Parse the JSON of a header. Raises ValueError if it is not an object, or has a name twice."""
    try:
        header = json.loads(data, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(header, dict):
        raise ValueError("it is not a JSON object")
    return header


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"it has {shown(name)} twice")
        members[name] = value
    return members


def parse_header(header: Mapping[str, object]) -> tuple[dict[str, SafetensorsEntry], int]:
    """Return a dictionary from the name of each tensor to its entry, and the number of bytes of all tensors together.

    Raises ValueError, which names the field, if the header is malformed, or if tensors overlap or leave gaps.
    """
    entries: dict[str, SafetensorsEntry] = {}
    ranges = []
    for name, entry in Fields(header).members():
        if name == "__metadata__":
            for _, value in entry.members():
                value.text()
            continue
        dtype, sizes = entry["dtype"].among(ITEM_BYTES), entry["shape"].items(MAX_DIMENSIONS)
        offsets = entry["data_offsets"].items(2)
        shape = tuple(size.number(0, MAX_BYTES) for size in sizes)
        begin, end = (offset.number(0, MAX_BYTES) for offset in offsets) if len(offsets) == 2 else (0, -1)
        if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
            raise ValueError(f"{entry.path}: shape and dtype do not match data_offsets {begin:,} to {end:,}")
        entries[name] = SafetensorsEntry(dtype, shape, begin)
        ranges.append((begin, end, entry.path))
    at = 0
    for begin, end, path in sorted(ranges):
        if begin != at:
            raise ValueError(f"{path}.data_offsets begin at {begin:,}, not at {at:,}")
        at = end
    return entries, at
