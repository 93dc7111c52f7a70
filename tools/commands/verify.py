"""``moetier verify DIR``: check all records and files against their checksums, and name those that differ."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from moetier.runtime.config import format_bytes
from moetier.tools.cli.failure import EXIT_ERROR, plain
from moetier.tools.cli.parser import DIRECTORY, directory
from moetier.tools.doctor.survey import NO_TOKENIZER, remedy

if TYPE_CHECKING:
    from moetier.tiers.store.reader import ExpertStore
    from moetier.tiers.store.scrub import Problem

EXAMPLES = ("moetier verify ./mixtral-4bit",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier verify`."""
    parser.add_argument("directory", type=directory, metavar="DIR", help=DIRECTORY)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Check the directory; return 1 if a record or a file is bad. Raises StoreError if nothing can be checked."""
    from moetier.runtime.checkpoint.containers import container_of
    from moetier.runtime.checkpoint.experts import open_copy
    from moetier.tiers.errors import StoreFormatError
    from moetier.tiers.extents.link import scrub_rest
    from moetier.tiers.extents.reader import ExtentStore
    from moetier.tiers.store.folder import command
    from moetier.tiers.store.scrub import READS, Problem, scrub, scrub_trunk
    from moetier.tiers.store.trunk import trunk_faults
    from moetier.tools.cli.progress import Progress
    from moetier.tools.convert.files import small_faults

    with ExitStack() as opened:
        store: ExpertStore | ExtentStore = open_copy(arguments.directory, readers=READS, damaged=True)
        opened.callback(store.close)
        manifest, folder = store.manifest, store.directory
        checkpoint = store if isinstance(store, ExtentStore) else None
        if checkpoint is not None and not checkpoint.table.is_linked:
            raise StoreFormatError(
                f"{folder} is a checkpoint without checksums to compare with.", f"Make them: {command('link', folder)}"
            )
        mirrors, absent, problems = _open_mirrors(folder, manifest.digest, opened)
        stores = [store, *mirrors]
        total = sum(
            entry.experts * manifest.layouts[entry.array].slot_bytes
            for each in stores
            for block, entry in enumerate(manifest.blocks)
            if block not in each.faults
        )
        faults = trunk_faults(folder, manifest) if manifest.trunk else {}
        total += sum(entry.bytes for name, entry in manifest.trunk.items() if name not in faults)
        small = small_faults(folder) if manifest.trunk else ()  # small files, such as config.json, have no checksums
        tokenizer = not manifest.trunk or container_of(folder).has_vocabulary(folder)
        rest = () if checkpoint is None else scrub_rest(checkpoint)
        if checkpoint is not None:
            total += sum(end - first for ranges in checkpoint.table.rest() for first, end in ranges)
        of_small = (Problem(None, None, str(folder), fault.cause) for fault in small)
        found_bad: dict[str, Problem] = {}  # by cause: blocks of a checkpoint share files
        with Progress("verify", total) as progress:
            for found in chain(problems, rest, *map(scrub, stores), scrub_trunk(folder, manifest, faults), of_small):
                if isinstance(found, int):
                    progress.advance(found)
                elif found_bad.setdefault(found.cause, found) is found and not arguments.json:
                    progress.say(f"bad: {found.cause}")
            seconds = progress.seconds
    bad = [*found_bad.values()]
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
            "mirrors": [str(mirror.directory) for mirror in mirrors],
            "absent_mirrors": [*map(str, absent)],
            "bad": [asdict(problem) for problem in bad],
        }
        print(json.dumps(report, indent=2))
    else:
        files = len(manifest.trunk)
        trunk = f"{files} file{'s' * (files > 1)} of the trunk" if files else "no checksums of the trunk"
        if checkpoint is not None:
            files = len(checkpoint.paths)
            trunk = f"the other bytes of {files} file{'s' * (files > 1)}"
        copies = f" in {len(stores)} copies" if mirrors else ""
        print(
            f"{plain(manifest.model)}: {manifest.record_count:,} records in {len(manifest.blocks)} blocks{copies}, "
            f"{trunk}, {format_bytes(total)} read in {seconds:.1f} s ({total / seconds / 1e9:.2f} GB/s, "
            f"{'O_DIRECT' if store.direct else 'buffered'}): {f'{len(bad)} bad' if bad else 'all good'}"
        )
        if not tokenizer:
            print(f"tokenizer: {NO_TOKENIZER}")
        for path in absent:
            print(f"mirror {path}: missing, so it was not checked")
        if bad:
            print(remedy(store), file=sys.stderr)
    return EXIT_ERROR if bad else 0


def _open_mirrors(folder: Path, digest: str, opened: ExitStack) -> tuple[list[ExpertStore], list[Path], list[Problem]]:
    """Open the mirrors of the store in ``folder``, whose digest is ``digest``; ``opened`` will close them.

    Return the mirrors, the folders of mirrors that are missing, because their disk may not be mounted, and the problems
    of mirrors that can't be used.
    """
    from moetier.tiers.errors import StoreError
    from moetier.tiers.store.mirror import open_mirror, read_mirrors
    from moetier.tiers.store.scrub import READS, Problem

    mirrors, absent, problems = [], [], []
    try:
        listed = read_mirrors(folder)
    except StoreError as error:
        return [], [], [Problem(None, None, str(folder), error.cause)]
    for path in listed:
        if not path.exists():
            absent.append(path)
            continue
        try:
            mirrors.append(opened.enter_context(open_mirror(path, digest, readers=READS)))
        except StoreError as error:
            problems.append(Problem(None, None, str(path), error.cause))
    return mirrors, absent, problems
