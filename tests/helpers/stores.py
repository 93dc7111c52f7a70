"""Small real stores for tests: written by the product's own writer, with random bytes for records."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey, Projection, RecordLayout
from moetier.tiers.manifest import Block, Manifest, method_of
from moetier.tiers.store.base import Store
from moetier.tiers.store.checksum import checksum_bytes
from moetier.tiers.store.folder import GROUP, METADATA, read_manifest, store_folder
from moetier.tiers.store.shard import ShardFile
from moetier.tiers.store.writer import StoreWriter, array_metadata

# A daemon reclaims the memory of a killed one that served a store of the same digest, whichever test it is: that of the
# records. So each process of tests has records of its own, which its children share.
_RUN = os.environ.setdefault("MOETIER_TEST_RUN", secrets.token_hex(8)) + os.environ.get("PYTEST_XDIST_WORKER", "")
SOURCE_DIGEST = hashlib.sha256(_RUN.encode()).hexdigest()

NASTY = "x\x1b[31m\x1b]0;owned\x07\ny"  # as a model may call itself: it sets a terminal's colour and title


def keys(block: int, *experts: int) -> list[ExpertKey]:
    return [ExpertKey(block, expert) for expert in experts]


def layout_of(rows: int = 64, columns: int = 32) -> RecordLayout:
    """Two 16-bit projections; the default's slot is 16,384 bytes."""
    return RecordLayout(
        (
            Projection("gate_up_proj", 2 * rows, columns, bits=16),
            Projection("down_proj", columns, rows, bits=16),
        )
    )


def make_plan(
    *,
    blocks: int = 3,
    experts: int = 4,
    top_k: int = 2,
    layout: RecordLayout | None = None,
    model: str = "acme/tiny-moe",
) -> Manifest:
    layouts = {"records": layout or layout_of()}
    return Manifest(
        model=model,
        source_digest=SOURCE_DIGEST,
        blocks=tuple(Block(f"model.layers.{b}.mlp.experts", "records", b, experts, top_k) for b in range(blocks)),
        layouts=layouts,
        version="0.1.0",
        method=method_of("hqq", layouts, None),
    )


def make_records(plan: Manifest, seed: int = 0) -> dict[ExpertKey, bytes]:
    """Random payloads, ``record_bytes`` long, zeros in the padding; the first begins with what only this run has."""
    random = np.random.default_rng(seed)
    records = {}
    for block, entry in enumerate(plan.blocks):
        layout = plan.layout(block)
        padding = bytes(layout.record_bytes - layout.payload_bytes)
        for expert in range(entry.experts):
            words = random.integers(0, 1 << 64, -(-layout.payload_bytes // 8), np.uint64)  # quicker than bytes
            records[ExpertKey(block, expert)] = words.tobytes()[: layout.payload_bytes] + padding
    mark = bytes.fromhex(SOURCE_DIGEST)[:8]
    records[ExpertKey(0, 0)] = mark + records[ExpertKey(0, 0)][len(mark) :]
    return records


def write_store(folder: Path, plan: Manifest, records: dict[ExpertKey, bytes]) -> Manifest:
    """Writes what is missing of the store ``folder/experts.zarr``."""
    with StoreWriter.open(folder / GROUP, plan) as writer:
        for block in sorted(set(range(len(plan.blocks))) - writer.finished_blocks):
            with writer.block(block) as shard:
                for expert in range(plan.blocks[block].experts):
                    shard.write(records[ExpertKey(block, expert)])
        return writer.finish()


def written(folder: Path, plan: Manifest, records: dict[ExpertKey, bytes]) -> Path:
    """Write a store, and return its folder."""
    write_store(folder, plan, records)
    return folder


def with_foreign_shard(folder: Path) -> Path:
    """Make a store in ``folder / "model"`` whose block 1 belongs to another conversion. Return its folder."""
    make_store(folder / "model")
    make_store(folder / "other", seed=1)
    shutil.copy(shard(folder / "other", 1).path, shard(folder / "model", 1).path)
    return folder / "model"


def make_store(
    folder: Path,
    *,
    blocks: int = 3,
    experts: int = 4,
    top_k: int = 2,
    layout: RecordLayout | None = None,
    model: str = "acme/tiny-moe",
    seed: int = 0,
) -> dict[ExpertKey, bytes]:
    """Writes ``folder/experts.zarr`` and returns every record, without its checksum."""
    plan = make_plan(blocks=blocks, experts=experts, top_k=top_k, layout=layout, model=model)
    records = make_records(plan, seed)
    write_store(folder, plan, records)
    return records


def manifest_of(folder: Path) -> Manifest:
    return read_manifest(store_folder(folder))


def slot_of(manifest: Manifest, key: ExpertKey) -> memoryview:
    """A slot for a record, which begins on a page."""
    return memoryview(mmap.mmap(-1, manifest.layout(key.block).slot_bytes))


def read_record(store: Store, key: ExpertKey) -> bytes:
    """A record without its checksum."""
    slot = slot_of(store.manifest, key)
    store.read_into(key, slot)
    return bytes(slot[:-CHECKSUM_BYTES])


def read_records(store: Store) -> dict[ExpertKey, bytes]:
    return {
        key: read_record(store, key)
        for block, entry in enumerate(store.manifest.blocks)
        for key in keys(block, *range(entry.experts))
    }


def without_shards(folder: Path, target: Path) -> Path:
    """A copy of a model directory without its records."""
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("c")))


def without_table(folder: Path) -> None:
    """Makes the store as moetier did before the manifest had a table of checksums."""
    _without(folder, "record_checksums")


def without_sums(folder: Path) -> None:
    """Makes the store as moetier did before the manifest had sizes and checksums of the trunk's files."""
    _without(folder, "trunk")


def _without(folder: Path, key: str) -> None:
    path = folder / GROUP / METADATA
    group = json.loads(path.read_bytes())
    del group["attributes"]["moetier"][key]
    path.write_text(json.dumps(group))


def shard(folder: Path, block: int = 0, layout: RecordLayout | None = None) -> ShardFile:
    """Describe a shard of the store that make_store writes by default."""
    return ShardFile.of(folder / GROUP, make_plan(layout=layout), block)


def edit(path: Path, *keys: str | int, to: Any) -> None:
    """Change one value in a JSON file."""
    value = json.loads(path.read_text())
    inner = value
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    path.write_text(json.dumps(value))


# zarr starts its event loop's thread when it is first used, for the life of the process. It starts here, when tests are
# collected, and not in a test that looks for threads and descriptors left behind.
array_metadata(make_plan(), "records")


def slot_with(record: bytes) -> bytes:
    """A record and its checksum."""
    return record + checksum_bytes(google_crc32c.value(record))
