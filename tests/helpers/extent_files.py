"""Files of a made-up checkpoint around the records of a store: each section in two tensors, at odd offsets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np

from moetier.tiers.extents.reader import ExtentStore, header_digest
from moetier.tiers.extents.table import BlockExtents, ExtentTable, RecordPiece, Shard
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest

ODD = 37  # bytes that lie before the first expert in each file


def write_extents(folder: Path, plan: Manifest, records: dict[ExpertKey, bytes], *, linked: bool = True) -> ExtentTable:
    """One file for each block; the second half of a section comes before the first one. The last extent ends the file,
    which fills no whole page."""
    folder.mkdir(exist_ok=True)
    shards, blocks, sums = [], [], []
    for number, block in enumerate(plan.blocks):
        sections = plan.layout(number).sections
        pieces = []
        for section in sections:
            half = section.nbytes // 2 // 2 * 2
            pieces += [RecordPiece(section.name, half), RecordPiece(section.name, section.nbytes - half)]
        data, entries, places = bytes(ODD), {"odd": _entry(0, ODD)}, np.zeros((block.experts, len(pieces), 2), np.int64)
        for expert in range(block.experts):
            record = records[ExpertKey(number, expert)]
            sums.append(google_crc32c.value(record).to_bytes(4, "little"))
            for at, section in enumerate(sections):
                split = section.offset + pieces[2 * at].length
                for place, part in (
                    (2 * at + 1, record[split : section.offset + section.nbytes]),
                    (2 * at, record[section.offset : split]),
                ):
                    places[expert, place] = number, len(data)
                    entries[f"{expert}.{place}"] = _entry(len(data), len(data) + len(part))
                    data += part
        header = json.dumps(entries).encode()
        path = folder / f"model-{number}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)
        assert path.stat().st_size % 4096
        places[..., 1] += 8 + len(header)
        status = path.stat()
        shards.append(Shard(path.name, status.st_size, status.st_mtime_ns, header_digest(path)))
        blocks.append(BlockExtents(tuple(pieces), places))
    manifest = replace(plan, record_checksums=b"".join(sums) if linked else b"", digest=plan.digest or "0" * 64)
    return ExtentTable(manifest, tuple(shards), tuple(blocks))


def _entry(begin: int, end: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


def open_extents(folder: Path, table: ExtentTable, *, damaged: bool = False) -> ExtentStore:
    return ExtentStore(folder, table, {s.name: folder / s.name for s in table.shards}, damaged=damaged)
