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
from moetier.tools.doctor.survey import NO_TOKENIZER

if TYPE_CHECKING:
    from moetier.tiers.store.base import DirectoryStore, Problem

EXAMPLES = ("moetier verify ./mixtral-4bit",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier verify`."""
    parser.add_argument("directory", type=directory, metavar="DIR", help=DIRECTORY)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Check the directory; return 1 if a record or a file is bad. Raises StoreError if nothing can be checked."""
    from moetier.runtime.checkpoint.containers import container_of
    from moetier.runtime.stores.registry import open_store
    from moetier.tiers.errors import StoreFormatError
    from moetier.tiers.store.base import Problem
    from moetier.tiers.store.folder import command
    from moetier.tiers.store.scrub import scrub
    from moetier.tools.cli.progress import Progress
    from moetier.tools.convert.files import small_faults

    with ExitStack() as opened:
        store = opened.enter_context(open_store(arguments.directory, damaged=True))
        manifest, folder = store.manifest, store.directory
        if not store.is_proved:
            raise StoreFormatError(
                f"{folder} is a checkpoint without checksums to compare with.", f"Make them: {command('link', folder)}"
            )
        mirrors, absent, problems = _open_mirrors(folder, manifest.digest, opened)
        stores = [store, *mirrors]
        total = sum(store.rest.values()) + sum(
            entry.experts * manifest.layouts[entry.array].slot_bytes
            for each in stores
            for block, entry in enumerate(manifest.blocks)
            if block not in each.faults
        )
        small = small_faults(folder) if manifest.trunk else ()  # small files, such as config.json, have no checksums
        tokenizer = not manifest.trunk or container_of(folder).has_vocabulary(folder)
        of_small = (Problem(None, None, str(folder), fault.cause) for fault in small)
        found_bad: dict[str, Problem] = {}  # by cause: blocks of a checkpoint share files
        nbytes = 0
        with Progress("verify", total) as progress:
            for found in chain(problems, store.scrub_rest(), *map(scrub, stores), of_small):
                if isinstance(found, int):
                    nbytes += found
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
            "bytes_read": nbytes,
            "seconds": seconds,
            "tokenizer": tokenizer,
            "direct": store.direct,
            "mirrors": [str(mirror.directory) for mirror in mirrors],
            "absent_mirrors": [*map(str, absent)],
            "bad": [asdict(problem) for problem in bad],
        }
        print(json.dumps(report, indent=2))
    else:
        files = f"{len(store.rest)} file{'s' * (len(store.rest) > 1)}"
        if manifest.trunk:
            trunk = f"{files} of the trunk"
        else:
            trunk = f"the other bytes of {files}" if store.rest else "no checksums of the trunk"
        copies = f" in {len(stores)} copies" if mirrors else ""
        print(
            f"{plain(manifest.model)}: {manifest.record_count:,} records in {len(manifest.blocks)} blocks{copies}, "
            f"{trunk}, {format_bytes(nbytes)} read in {seconds:.1f} s ({nbytes / seconds / 1e9:.2f} GB/s, "
            f"{'O_DIRECT' if store.direct else 'buffered'}): {f'{len(bad)} bad' if bad else 'all good'}"
        )
        if not tokenizer:
            print(f"tokenizer: {NO_TOKENIZER}")
        for path in absent:
            print(f"mirror {path}: missing, so it was not checked")
        if bad:
            print(store.remedy, file=sys.stderr)
    return EXIT_ERROR if bad else 0


def _open_mirrors(
    folder: Path, digest: str, opened: ExitStack
) -> tuple[list[DirectoryStore], list[Path], list[Problem]]:
    """Open the mirrors of the store in ``folder``, whose digest is ``digest``; ``opened`` will close them.

    Return the mirrors, the folders of mirrors that are missing, because their disk may not be mounted, and the problems
    of mirrors that can't be used.
    """
    from moetier.tiers.errors import StoreError
    from moetier.tiers.store.base import Problem
    from moetier.tiers.store.mirror import open_mirror, read_mirrors

    mirrors: list[DirectoryStore] = []
    absent, problems = [], []
    try:
        listed = read_mirrors(folder)
    except StoreError as error:
        return [], [], [Problem(None, None, str(folder), error.cause)]
    for path in listed:
        if not path.exists():
            absent.append(path)
            continue
        try:
            mirrors.append(opened.enter_context(open_mirror(path, digest)))
        except StoreError as error:
            problems.append(Problem(None, None, str(path), error.cause))
    return mirrors, absent, problems
