"""Records that are assembled from the files of a checkpoint."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import google_crc32c
import numpy as np
import pytest
import torch
from extent_files import open_extents, write_extents
from faults import flip_bit
from stores import layout_of, make_plan, make_records, read_record, slot_of

from moetier.tiers.errors import ChecksumError, MissingExpertError, StoreFormatError, StoreReadError
from moetier.tiers.extents import reader
from moetier.tiers.extents.link import link
from moetier.tiers.extents.reader import header_digest
from moetier.tiers.extents.table import BlockExtents, ExtentTable, RecordPiece, Shard
from moetier.tiers.layout import Bias, ExpertKey, Projection, RecordLayout
from moetier.tiers.store.scrub import scrub
from moetier.tiers.store.scrubbable import Problem

GAPS = RecordLayout(  # sections that end between multiples of 64
    (Projection("gate_up_proj", 33, 17, bits=16), Projection("down_proj", 17, 33, bits=16)),
    (Bias("down_proj_bias", 5),),
)
PLANS = {
    "small": make_plan(),
    "gaps": make_plan(layout=GAPS),
    "large": make_plan(blocks=1, experts=2, layout=layout_of(2048, 780)),
}


def zeroed(record: bytes, layout: RecordLayout) -> bytes:
    """With zeros between sections, as a record has them."""
    made = bytearray(len(record))
    for section in layout.sections:
        made[section.offset : section.offset + section.nbytes] = record[
            section.offset : section.offset + section.nbytes
        ]
    return bytes(made)


RECORDS = {
    name: {key: zeroed(record, plan.layout(key.block)) for key, record in make_records(plan).items()}
    for name, plan in PLANS.items()
}


def takes_direct(path: Path) -> bool:
    """Whether the file system lets dd read the file with O_DIRECT."""
    command = ["dd", f"if={path}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("name", PLANS)
def test_records_are_those_of_a_store(name: str, direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones in several pieces and buffers, with a pause between them; with and without O_DIRECT."""
    if not direct:
        monkeypatch.setattr(reader, "try_direct", lambda descriptor: False)
    table = write_extents(tmp_path, PLANS[name], RECORDS[name])
    with open_extents(tmp_path, table) as store:
        assert store.is_direct is (direct and takes_direct(tmp_path / "model-0.safetensors"))
        for key, record in RECORDS[name].items():
            slot = slot_of(store.manifest, key)
            slot[:] = b"\xff" * len(slot)
            store.read_into(key, slot, lambda: True)
            assert slot == record + google_crc32c.value(record).to_bytes(4, "little")


@pytest.mark.parametrize("size", [4096, 8192, 1 << 20])
def test_buffers_of_any_size_give_the_same(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "BUFFER_BYTES", size)
    table = write_extents(tmp_path, PLANS["gaps"], RECORDS["gaps"])
    with open_extents(tmp_path, table) as store:
        assert {key: read_record(store, key) for key in RECORDS["gaps"]} == RECORDS["gaps"]


def test_an_edited_extent_is_named(tmp_path: Path) -> None:
    table = write_extents(tmp_path, PLANS["small"], RECORDS["small"])
    bad = ExpertKey(1, 2)
    with open_extents(tmp_path, table) as store:
        flip_bit(tmp_path / "model-1.safetensors", table.extents(bad)[-1].offset)
        with pytest.raises(ChecksumError, match=r"block 1 .*expert 2: checksum mismatch in .*model-1\.safetensors"):
            read_record(store, bad)
        assert read_record(store, ExpertKey(1, 1)) == RECORDS["small"][1, 1]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def edit(path: Path) -> None:
    flip_bit(path, path.stat().st_size - 1)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def swap(path: Path) -> None:
    """With another file of the same size and time."""
    found = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"0.0"', b'"9.0"', 1))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (cut, StoreFormatError, "cut or replaced"),
        (edit, StoreFormatError, "was changed or replaced"),
        (swap, StoreFormatError, "another header"),
        (Path.unlink, MissingExpertError, "is missing"),
    ],
)
def test_a_shard_that_is_not_the_one_of_before_is_refused_by_name(
    change, error: type[Exception], words: str, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    table = write_extents(tmp_path, PLANS["small"], RECORDS["small"])
    change(tmp_path / "model-2.safetensors")
    with pytest.raises(error, match=rf"model-2\.safetensors.*{words}") as caught:
        open_extents(tmp_path, table)
    assert "moetier link" in caught.value.fix  # type: ignore[attr-defined]
    with open_extents(tmp_path, table, damaged=True) as store:
        assert store.faults.keys() == {2}
        assert [*store.other_file_faults()] == ["model-2.safetensors"]
        assert read_record(store, ExpertKey(0, 0)) == RECORDS["small"][0, 0]
        with pytest.raises(error, match=words):
            read_record(store, ExpertKey(2, 0))
        problems = [found for found in scrub(store) if isinstance(found, Problem)]
        assert [(problem.block, problem.expert) for problem in problems] == [(2, None)]


def test_a_shard_that_is_cut_while_it_is_in_use_is_an_error(tmp_path: Path) -> None:
    table = write_extents(tmp_path, PLANS["small"], RECORDS["small"])
    with open_extents(tmp_path, table) as store:
        last = ExpertKey(0, 3)
        cut(tmp_path / "model-0.safetensors")
        with pytest.raises(StoreReadError, match=r"expert 3: .*model-0\.safetensors ends before byte"):
            read_record(store, last)
        assert read_record(store, ExpertKey(0, 2)) == RECORDS["small"][0, 2]


def linked(folder: Path, table: ExtentTable) -> tuple[ExtentTable, int]:
    """The linked table, and how many bytes were read for it."""
    with open_extents(folder, table) as store:
        *sizes, found = link(store)
    assert isinstance(found, ExtentTable)
    return found, sum(size for size in sizes if isinstance(size, int))


@pytest.mark.parametrize("name", PLANS)
def test_linking_reads_each_byte_once_and_makes_the_checksums(name: str, tmp_path: Path) -> None:
    proved = write_extents(tmp_path, PLANS[name], RECORDS[name])
    bare = replace(proved, manifest=replace(proved.manifest, record_checksums=b""))
    found, read = linked(tmp_path, bare)
    assert found.manifest == proved.manifest
    gaps = sum(plan_gaps(PLANS[name].layout(key.block)) for key in RECORDS[name])
    assert read - gaps == sum(shard.bytes for shard in proved.shards)
    assert [(a.name, a.bytes, a.header) for a in found.shards] == [(b.name, b.bytes, b.header) for b in proved.shards]
    with open_extents(tmp_path, found) as store:
        assert not [problem for problem in scrub(store) if isinstance(problem, Problem)]
        assert not [problem for problem in store.scrub_other_files() if isinstance(problem, Problem)]
        flip_bit(tmp_path / "model-0.safetensors", 20)  # in the header
        (problem,) = (problem for problem in store.scrub_other_files() if isinstance(problem, Problem))
        assert "model-0.safetensors: checksum mismatch" in problem.cause


def plan_gaps(layout: RecordLayout) -> int:
    return layout.payload_bytes - sum(section.nbytes for section in layout.sections)


def test_a_shard_that_changes_while_it_is_linked_is_refused(tmp_path: Path) -> None:
    table = write_extents(tmp_path, PLANS["small"], RECORDS["small"], linked=False)
    with open_extents(tmp_path, table) as store:
        steps = link(store)
        next(steps)
        edit(tmp_path / "model-0.safetensors")
        with pytest.raises(StoreFormatError, match="was changed while it was in use"):
            list(steps)


def test_an_error_of_the_page_cache_is_one_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_extents(tmp_path, PLANS["small"], RECORDS["small"], linked=False)
    with open_extents(tmp_path, table) as store:
        monkeypatch.setattr(os, "posix_fadvise", Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
        with pytest.raises(StoreReadError, match=os.strerror(errno.EIO)):
            list(link(store))


def test_fp32_numbers_become_those_of_torch(tmp_path: Path) -> None:
    """All that differ in their upper halves, with lower halves on each side of a tie; NaN stays NaN."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    given = np.concatenate([upper | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).astype("<u4")
    layout = RecordLayout((Projection("up_proj", 8, 8, bits=16),), (Bias("up_proj_bias", len(given)),))
    plan = make_plan(blocks=1, experts=1, top_k=1, layout=layout)
    header = json.dumps({"up": {"dtype": "F32", "shape": [len(given)], "data_offsets": [0, given.nbytes]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + given.tobytes())
    places = np.array([[[0, 8 + len(header)], [0, 8 + len(header)]]], np.int64)
    pieces = RecordPiece("up_proj", 128), RecordPiece("up_proj_bias", 2 * len(given), 0, True)
    found = path.stat()
    shard = Shard(path.name, found.st_size, found.st_mtime_ns, header_digest(path))
    with open_extents(tmp_path, ExtentTable(plan, (shard,), (BlockExtents(pieces, places),))) as store:
        section = layout.sections[1]
        record = read_record(store, ExpertKey(0, 0))
    made = np.frombuffer(record[section.offset : section.offset + section.nbytes], "<u2")
    wanted = torch.from_numpy(given.view(np.float32)).bfloat16()
    assert np.array_equal((made & 0x7FFF) > 0x7F80, wanted.isnan().numpy())
    whole = ~wanted.isnan().numpy()
    assert np.array_equal(made[whole], wanted.view(torch.int16).numpy().view(np.uint16)[whole])
