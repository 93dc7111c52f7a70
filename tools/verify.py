"""``moetier verify DIR``: reads records and trunk, and names each record and file that is not what was written."""

from __future__ import annotations

import argparse
import json
import mmap
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from moetier.runtime.config import format_bytes
from moetier.tiers.keys import CHECKSUM_BYTES, ExpertKey

from .inspect import MEND, NO_TOKENIZER
from .options import DIRECTORY, directory
from .plain import plain

if TYPE_CHECKING:
    from moetier.tiers.errors import StoreError
    from moetier.tiers.manifest import Manifest
    from moetier.tiers.store import ExpertStore

HELP = "check records and trunk of a model directory against their checksums"

READS = 8  # in flight: what it takes to be as fast as the disk
BUFFER_BYTES = 256 << 20  # of all reads in flight, unless one record is larger

EXIT_BAD = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """``block`` is None where it is the store as a whole, or the trunk; ``expert`` where it is a block's whole file."""

    block: int | None
    expert: int | None
    file: str
    cause: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=directory, metavar="DIR", help=DIRECTORY)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """1 when anything is bad. Raises StoreError where there is nothing that can be checked."""
    from moetier.tiers.store import ExpertStore
    from moetier.tiers.trunk import trunk_faults

    from .progress import Progress
    from .small_files import has_tokenizer

    with ExpertStore.open(arguments.directory, readers=READS, damaged=True) as store:
        manifest = store.manifest
        readable = [entry for block, entry in enumerate(manifest.blocks) if block not in store.faults]
        total = sum(entry.experts * manifest.layouts[entry.array].slot_bytes for entry in readable)
        faults = trunk_faults(store.folder.parent, manifest) if manifest.trunk else {}
        total += sum(entry.bytes for name, entry in manifest.trunk.items() if name not in faults)
        problems = []
        small = scrub_small(store.folder.parent) if manifest.trunk else ()
        tokenizer = not manifest.trunk or has_tokenizer(store.folder.parent)
        with Progress("verify", total) as progress:
            for found in chain(scrub(store), scrub_trunk(store.folder.parent, manifest, faults), small):
                if isinstance(found, int):
                    progress.advance(found)
                else:
                    problems.append(found)
                    if not arguments.json:
                        progress.say(f"bad: {found.cause}")
            seconds = progress.seconds
    if arguments.json:
        report = {
            "model": manifest.model,
            "digest": manifest.digest,
            "blocks": len(manifest.blocks),
            "records": manifest.record_count,
            "trunk_files": len(manifest.trunk),
            "bytes_read": total,
            "seconds": seconds,
            "tokenizer": tokenizer,
            "direct": store.direct,
            "bad": [asdict(problem) for problem in problems],
        }
        print(json.dumps(report, indent=2))
    else:
        files = len(manifest.trunk)
        trunk = f"{files} file{'s' * (files > 1)} of the trunk" if files else "no checksums of the trunk"
        print(
            f"{plain(manifest.model)}: {manifest.record_count:,} records in {len(manifest.blocks)} blocks, {trunk}, "
            f"{format_bytes(total)} read in {seconds:.1f} s ({total / seconds / 1e9:.2f} GB/s, "
            f"{'O_DIRECT' if store.direct else 'buffered'}): {f'{len(problems)} bad' if problems else 'all good'}"
        )
        if not tokenizer:
            print(f"tokenizer: {NO_TOKENIZER}")
        if problems:
            print(MEND, file=sys.stderr)
    return EXIT_BAD if problems else 0


def scrub_small(directory: Path) -> Iterator[Problem]:
    """Yields what is wrong with the small files of a model directory, of which there are no sums."""
    from .small_files import small_faults

    for fault in small_faults(directory):
        yield Problem(None, None, str(directory), fault.cause)


def scrub_trunk(directory: Path, manifest: Manifest, faults: Mapping[str, StoreError]) -> Iterator[int | Problem]:
    """Yields what is wrong with the trunk, ``faults`` first, and the bytes of it that have been read."""
    from moetier.tiers.errors import StoreError
    from moetier.tiers.trunk import check_sum

    for name, fault in faults.items():
        yield Problem(None, None, str(directory / name), fault.cause)
    for name, entry in sorted(manifest.trunk.items()):
        if name in faults:
            continue
        path = directory / name
        try:
            yield from check_sum(path, entry)
        except StoreError as error:
            yield Problem(None, None, str(path), error.cause)


def scrub(store: ExpertStore) -> Iterator[int | Problem]:
    """Yields problems as they are found, and the bytes of each record that has been read.

    Several records are read at a time, in the order of the disk, into buffers that are used again.
    """
    from moetier.tiers.digest import foreign_shards
    from moetier.tiers.errors import StoreError
    from moetier.tiers.shard import StoreDigest

    manifest = store.manifest
    largest = max(layout.slot_bytes for layout in manifest.layouts.values())
    reads = max(1, min(READS, BUFFER_BYTES // largest))
    buffers: SimpleQueue[memoryview] = SimpleQueue()
    for _ in range(reads):
        buffers.put(memoryview(mmap.mmap(-1, largest)))

    def check(key: ExpertKey) -> tuple[int, Problem | None]:
        """The record's crc32c as stored, and what is wrong with it."""
        buffer = buffers.get()
        try:
            slot = buffer[: store.layout(key.block).slot_bytes]
            store.read_into(key, slot)
            return int.from_bytes(slot[-CHECKSUM_BYTES:], "little"), None
        except StoreError as error:
            return 0, Problem(key.block, key.expert, str(store.path(key.block)), error.cause)
        finally:
            buffers.put(buffer)

    for block, fault in store.faults.items():
        yield Problem(block, None, str(store.path(block)), fault.cause)
    good = not store.faults
    digest = StoreDigest()
    keys = [
        ExpertKey(block, expert)
        for block, entry in enumerate(manifest.blocks)
        if block not in store.faults
        for expert in range(entry.experts)
    ]
    with ThreadPoolExecutor(reads, thread_name_prefix="moetier-verify") as pool:
        try:
            for key, (crc, problem) in zip(keys, pool.map(check, keys), strict=True):
                digest.add([crc])
                if problem is not None:
                    good = False
                    yield problem
                yield store.layout(key.block).slot_bytes
        finally:
            pool.shutdown(cancel_futures=True)
    if good and digest.hexdigest() != manifest.digest:
        paths = [store.path(block) for block in range(len(manifest.blocks))]
        yield Problem(None, None, str(store.folder), foreign_shards(manifest, digest.hexdigest(), paths).cause)
