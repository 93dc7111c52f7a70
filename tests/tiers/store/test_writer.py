"""Writing a store is crash-safe, resumable and deterministic to the byte, and zarr reads the result."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from disks import cached_part
from faults import mounted, only, strace
from places import HELPERS
from stores import layout_of, make_plan, make_records, make_store, read_records, write_store

from moetier.tiers.errors import DiskSpaceError, IncompleteStoreError, TargetError, TargetExistsError
from moetier.tiers.layout import ExpertKey, Projection, RecordLayout
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.atomic import PARTIAL
from moetier.tiers.store.folder import GROUP, METADATA, PLAN
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.shard import ShardFile
from moetier.tiers.store.writer import StoreWriter


def tree(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_all(folder: Path) -> dict[ExpertKey, bytes]:
    with ShardStore.open(folder) as store:
        return read_records(store)


def two_layouts() -> Manifest:
    """Make a plan with blocks 0 and 2 in one array and block 1, with other rows and experts, in another."""
    plan = make_plan(blocks=3)
    first, second, third = plan.blocks
    return replace(
        plan,
        blocks=(first, replace(second, array="wide", index=0, experts=6), replace(third, index=1)),
        layouts={"records": layout_of(), "wide": layout_of(96, 64)},
    )


READ_WITH_ZARR = """
import hashlib, json, sys, warnings
warnings.simplefilter("error")
import zarr
group = zarr.open_group(sys.argv[1], mode="r")
found = {}
for name, array in group.members():
    blocks, experts, size = array.shape
    for block in range(blocks):
        for expert in range(experts):
            found[f"{name}/{block}/{expert}"] = hashlib.sha256(array[block, expert].tobytes()).hexdigest()
assert not any(name.partition(".")[0] == "moetier" for name in sys.modules)
print(json.dumps(found))
"""


def test_zarr_alone_reads_every_record(tmp_path: Path) -> None:
    plan = two_layouts()
    records = make_records(plan)
    records[ExpertKey(0, 2)] = bytes(plan.layout(0).record_bytes)  # all zero: zarr would not write it by itself
    write_store(tmp_path, plan, records)
    command = [sys.executable, "-c", READ_WITH_ZARR, str(tmp_path / GROUP)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    expected = {
        f"{plan.blocks[key.block].array}/{plan.blocks[key.block].index}/{key.expert}": hashlib.sha256(
            record
        ).hexdigest()
        for key, record in records.items()
    }
    assert json.loads(result.stdout) == expected


COPY_WITH_ZARR = """
import sys, zarr
from zarr.codecs import BytesCodec, Crc32cCodec
source = zarr.open_group(sys.argv[1], mode="r")["records"]
blocks, experts, size = source.shape
target = zarr.open_group(sys.argv[2], mode="w").create_array(
    "records", shape=source.shape, chunks=(1, 1, size), shards=(1, experts, size), dtype="uint8", filters=None,
    serializer=BytesCodec(), compressors=[Crc32cCodec()], fill_value=0, config={"write_empty_chunks": True},
)
for block in range(blocks):
    target[block] = source[block]
"""


def test_array_metadata_and_shards_are_what_zarr_writes(tmp_path: Path) -> None:
    make_store(tmp_path)
    folders = (tmp_path / GROUP, tmp_path / "other.zarr")
    subprocess.run([sys.executable, "-c", COPY_WITH_ZARR, *map(str, folders)], check=True)
    assert tree(folders[0] / "records") == tree(folders[1] / "records")


def test_an_all_zero_record_is_stored_and_reads_back(tmp_path: Path) -> None:
    plan = make_plan()
    records = dict.fromkeys(make_records(plan), bytes(plan.layout(0).record_bytes))
    write_store(tmp_path, plan, records)
    assert read_all(tmp_path) == records


def test_several_layouts_read_back(tmp_path: Path) -> None:
    plan = two_layouts()
    records = make_records(plan)
    manifest = write_store(tmp_path, plan, records)
    assert read_all(tmp_path) == records
    assert manifest.plan == plan
    assert len(manifest.digest) == 64


def test_nothing_but_the_store_is_left(tmp_path: Path) -> None:
    make_store(tmp_path, blocks=2)
    assert sorted(tree(tmp_path)) == [
        "experts.zarr/records/c/0/0/0",
        "experts.zarr/records/c/1/0/0",
        "experts.zarr/records/zarr.json",
        "experts.zarr/zarr.json",
    ]


def break_off(writer: StoreWriter, records: dict[ExpertKey, bytes]) -> None:
    with writer.block(0) as shard:
        shard.write(records[ExpertKey(0, 0)])
        raise OSError("the source broke")  # not the target's disk: passed on as it is


def test_a_block_that_fails_is_abandoned_and_the_rest_resumes_byte_identical(tmp_path: Path) -> None:
    plan, (uncut, cut) = make_plan(), (tmp_path / "uncut", tmp_path / "cut")
    records = make_records(plan)
    write_store(uncut, plan, records)
    with StoreWriter.open(cut / GROUP, plan) as writer:
        with writer.block(1) as shard:
            for expert in range(4):
                shard.write(memoryview(records[ExpertKey(1, expert)]))
        with pytest.raises(OSError, match="the source broke"):
            break_off(writer, records)
        assert not list(cut.rglob(f"*{PARTIAL}"))
        assert writer.finished_blocks == {1}
    with pytest.raises(IncompleteStoreError) as caught:
        ShardStore.open(cut)
    assert "1 of 3 blocks" in caught.value.cause
    assert f"moetier convert acme/tiny-moe {cut}" in caught.value.fix
    with StoreWriter.open(cut / GROUP, plan) as writer:
        assert writer.finished_blocks == {1}
    write_store(cut, plan, records)
    assert tree(cut) == tree(uncut)


def test_a_block_is_whole_or_not_there(tmp_path: Path) -> None:
    plan = make_plan()
    records = make_records(plan)
    with StoreWriter.open(tmp_path / GROUP, plan) as writer:
        with pytest.raises(AssertionError, match="1 of 4 experts"), writer.block(0) as shard:
            shard.write(records[ExpertKey(0, 0)])
        with pytest.raises(AssertionError, match="no record"), writer.block(0) as shard:
            shard.write(records[ExpertKey(0, 0)][:-1])
        with pytest.raises(AssertionError, match="blocks are missing"):
            writer.finish()
        assert writer.finished_blocks == frozenset()


def test_blocks_are_written_side_by_side(tmp_path: Path) -> None:
    plan = make_plan(blocks=4)
    records = make_records(plan)
    write_store(tmp_path / "one", plan, records)
    turns = threading.Barrier(2, timeout=60)

    def work(first: int) -> None:
        for block in (first, first + 2):
            with writer.block(block) as shard:
                for expert in range(4):
                    turns.wait()  # both shards are open, and written in turn
                    shard.write(records[ExpertKey(block, expert)])

    with StoreWriter.open(tmp_path / "two" / GROUP, plan) as writer:
        threads = [threading.Thread(target=work, args=(first,)) for first in (1, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.finish()
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_leftovers_and_broken_shards_are_written_anew(tmp_path: Path) -> None:
    plan, (uncut, cut) = make_plan(blocks=4), (tmp_path / "uncut", tmp_path / "cut")
    records = make_records(plan)
    write_store(uncut, plan, records)
    with StoreWriter.open(cut / GROUP, plan) as writer:
        for block in range(4):
            with writer.block(block) as shard:
                for expert in range(4):
                    shard.write(records[ExpertKey(block, expert)])
    files = [ShardFile.of(cut / GROUP, plan, block) for block in range(4)]
    os.truncate(files[0].path, files[0].file_bytes - 1)
    os.truncate(files[1].path, files[1].data_bytes)
    os.truncate(files[1].path, files[1].file_bytes)  # the right size, zeros for an index
    os.truncate(files[3].path, files[3].file_bytes + 1)
    files[2].path.with_name("0" + PARTIAL).write_bytes(b"half a record")
    with StoreWriter.open(cut / GROUP, plan) as writer:
        assert writer.finished_blocks == {2}
        assert writer.missing_bytes == 3 * files[0].file_bytes
    write_store(cut, plan, records)
    assert tree(cut) == tree(uncut)


def test_a_finished_store_is_mended_where_a_shard_is_missing(tmp_path: Path) -> None:
    records = make_store(tmp_path)
    before = tree(tmp_path)
    ShardFile.of(tmp_path / GROUP, make_plan(), 1).path.unlink()
    write_store(tmp_path, make_plan(), records)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("finished", [True, False])
def test_another_plan_is_refused(tmp_path: Path, finished: bool) -> None:
    plan = make_plan()
    if finished:
        write_store(tmp_path, plan, make_records(plan))
    else:
        StoreWriter.open(tmp_path / GROUP, plan).close()
    before = tree(tmp_path)
    with pytest.raises(TargetExistsError, match="acme/tiny-moe, which differs in model, blocks"):
        StoreWriter.open(tmp_path / GROUP, make_plan(model="acme/other", blocks=2))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", METADATA, PLAN])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / GROUP).mkdir()
    (tmp_path / GROUP / name).write_text("[1, 2]")
    with pytest.raises(TargetExistsError, match="is not a moetier store"):
        StoreWriter.open(tmp_path / GROUP, make_plan())
    assert tree(tmp_path) == {f"{GROUP}/{name}": b"[1, 2]"}


def test_two_conversions_into_one_folder_are_refused(tmp_path: Path) -> None:
    with (
        StoreWriter.open(tmp_path / GROUP, make_plan()),
        pytest.raises(TargetExistsError, match="Another process is converting a model into"),
    ):
        StoreWriter.open(tmp_path / GROUP, make_plan())
    StoreWriter.open(tmp_path / GROUP, make_plan()).close()  # the lock went with the first


def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where a folder has to be")
    with pytest.raises(TargetError, match="can't be written") as caught:
        StoreWriter.open(tmp_path / "file" / GROUP, make_plan())
    assert str(tmp_path / "file") in caught.value.cause


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted("tmpfs", tmp_path / "disk", "size=1m") as folder:
        yield folder


def test_a_full_disk_is_reported_and_resumed_from(small_disk: Path, tmp_path: Path) -> None:
    plan = make_plan(blocks=3, layout=layout_of(512, 128))  # 1.6 MB a block
    records = make_records(plan)
    with (
        StoreWriter.open(small_disk / GROUP, plan) as writer,
        pytest.raises(DiskSpaceError, match="is full") as caught,
        writer.block(0),
    ):
        pytest.fail("a shard was opened that the disk can't take")
    assert f"{3 * ShardFile.of(small_disk, plan, 0).file_bytes:,} bytes are still needed" in caught.value.cause
    free = int(caught.value.cause.split(", ")[-1].split(" are free")[0].replace(",", ""))
    assert 900_000 < free < 1 << 20  # what was allocated of the shard has been given back
    assert not list(small_disk.rglob(f"*{PARTIAL}"))

    subprocess.run(["mount", "-o", "remount,size=3500k", str(small_disk)], check=True)
    with pytest.raises(DiskSpaceError, match="is full"):
        write_store(small_disk, plan, records)
    with pytest.raises(IncompleteStoreError, match="2 of 3 blocks"):
        ShardStore.open(small_disk)

    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    write_store(small_disk, plan, records)
    write_store(tmp_path / "uncut", plan, records)
    assert tree(small_disk) == tree(tmp_path / "uncut")


def test_a_shard_that_does_not_fit_gives_back_what_it_got(tmp_path: Path) -> None:
    """ext4 keeps the allocated part of a file that it can't allocate whole; tmpfs does not."""
    if (mkfs := shutil.which("mkfs.ext4")) is None:
        pytest.skip("there is no mkfs.ext4")
    image = tmp_path / "image"
    with image.open("wb") as stream:
        stream.truncate(8 << 20)
    subprocess.run([mkfs, "-q", str(image)], check=True)
    with mounted("ext4", tmp_path / "disk", "loop", image) as folder:
        plan = make_plan(blocks=1, layout=layout_of(2048, 512))  # 24 MiB
        with (
            StoreWriter.open(folder / GROUP, plan) as writer,
            pytest.raises(DiskSpaceError, match="is full") as caught,
            writer.block(0),
        ):
            pytest.fail("a shard was opened that the disk can't take")
        free = int(caught.value.cause.split(", ")[-1].split(" are free")[0].replace(",", ""))
        assert free > 5 << 20


WRITE = f"""
import sys
sys.path.insert(0, {str(HELPERS)!r})
from pathlib import Path
from stores import make_plan, make_records, write_store
plan = make_plan(blocks=2)
write_store(Path(sys.argv[1]), plan, make_records(plan))
"""


def test_the_manifest_reaches_the_disk_last(tmp_path: Path) -> None:
    """System calls come in order: shards are synced and renamed, then the manifest, then the folder is synced."""
    trace = tmp_path / "trace"
    options = ["-y", "-o", str(trace), *only("fsync,rename,renameat,renameat2")]
    result = strace(options, WRITE, tmp_path / "model")
    assert result.returncode == 0, result.stderr
    store = tmp_path / "model" / GROUP
    steps = [line.replace(str(store), "STORE") for line in trace.read_text().splitlines()]

    def first(*parts: str) -> int:
        return next(number for number, step in enumerate(steps) if all(part in step for part in parts))

    def last(*parts: str) -> int:
        return max(number for number, step in enumerate(steps) if all(part in step for part in parts))

    manifest = f"STORE/{METADATA}{PARTIAL}"
    for block in range(2):
        shard = f"STORE/records/c/{block}/0/0{PARTIAL}"
        assert first("fsync", shard) < first("rename", shard) < first("fsync", manifest)
        assert first("rename", shard) < first("fsync", f"STORE/records/c/{block}/0>") < first("fsync", manifest)
    assert last("fsync", f"records/{METADATA}") < first("rename", f"records/{METADATA}") < first("fsync", manifest)
    assert first("fsync", manifest) < first("rename", manifest) < last("fsync", "STORE>")


KILLED = f"""
# Each line of standard input names a folder and microseconds: forks a writer of that folder, and kills it after that
# time unless it is 0. Answers with its exit status and how many microseconds it had.
import os, signal, sys, time
sys.path.insert(0, {str(HELPERS)!r})
from pathlib import Path
from stores import make_plan, make_records, write_store
plan = make_plan(blocks=12)
records = make_records(plan)
for line in sys.stdin:
    folder, moment = line.rsplit(maxsplit=1)
    start = time.perf_counter()
    child = os.fork()
    if not child:
        write_store(Path(folder), plan, records)
        os._exit(0)
    if int(moment):
        time.sleep(int(moment) / 1e6)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(status, int((time.perf_counter() - start) * 1e6), flush=True)
"""


def test_killed_at_twenty_random_moments_it_resumes_byte_identical(tmp_path: Path) -> None:
    moments = random.Random(0)
    kills, incomplete, folder = 0, 0, tmp_path / "cut-0"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        orders, answers = process.stdin, process.stdout

        def write(folder: Path, moment: int) -> tuple[bool, int]:
            """Whether it was killed, and how long it ran."""
            print(folder, moment, file=orders, flush=True)
            status, elapsed = map(int, answers.readline().split())
            assert status in (0, signal.SIGKILL)
            return status != 0, elapsed

        _, duration = write(tmp_path / "uncut", 0)
        expected = tree(tmp_path / "uncut")
        while kills < 20:
            killed, _ = write(folder, moments.randrange(1, duration))
            kills += killed
            if (folder / GROUP / METADATA).exists():  # complete, whenever the signal came
                ShardStore.open(folder).close()
                write(folder, 0)
                assert tree(folder) == expected
                folder = tmp_path / f"cut-{kills}"
            elif (folder / GROUP / PLAN).exists():
                incomplete += 1
                with pytest.raises(IncompleteStoreError):
                    ShardStore.open(folder)
        write(folder, 0)
        assert tree(folder) == expected
        orders.close()
    assert incomplete


def test_a_large_store_does_not_stay_in_the_page_cache(tmp_path: Path) -> None:
    layout = RecordLayout((Projection("up", 2048, 8192, bits=16),))  # 32 MiB: pages are dropped before the end too
    make_store(tmp_path, blocks=1, experts=3, layout=layout)
    path = ShardFile.of(tmp_path / GROUP, make_plan(blocks=1, experts=3, layout=layout), 0).path
    assert cached_part(path) < 0.1
