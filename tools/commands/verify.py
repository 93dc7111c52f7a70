"""``moetier verify DIR``: check all records and files against their checksums, and name those that differ."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from itertools import chain

from moetier.runtime.config import format_bytes
from moetier.tools.cli.failure import EXIT_ERROR, plain
from moetier.tools.cli.parser import DIRECTORY, directory
from moetier.tools.doctor.survey import MEND, NO_TOKENIZER

EXAMPLES = ("moetier verify ./mixtral-4bit",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier verify`."""
    parser.add_argument("directory", type=directory, metavar="DIR", help=DIRECTORY)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Check the directory; return 1 if anything is bad. Raises StoreError if nothing can be checked."""
    from moetier.tiers.store.reader import ExpertStore
    from moetier.tiers.store.scrub import READS, Problem, scrub, scrub_trunk
    from moetier.tiers.store.trunk import trunk_faults
    from moetier.tools.cli.progress import Progress
    from moetier.tools.convert.files import has_tokenizer, small_faults

    with ExpertStore.open(arguments.directory, readers=READS, damaged=True) as store:
        manifest, folder = store.manifest, store.folder.parent
        readable = [entry for block, entry in enumerate(manifest.blocks) if block not in store.faults]
        total = sum(entry.experts * manifest.layouts[entry.array].slot_bytes for entry in readable)
        faults = trunk_faults(folder, manifest) if manifest.trunk else {}
        total += sum(entry.bytes for name, entry in manifest.trunk.items() if name not in faults)
        problems = []
        small = small_faults(folder) if manifest.trunk else ()  # faults of small files, which have no checksums
        tokenizer = not manifest.trunk or has_tokenizer(folder)
        of_small = (Problem(None, None, str(folder), fault.cause) for fault in small)
        with Progress("verify", total) as progress:
            for found in chain(scrub(store), scrub_trunk(folder, manifest, faults), of_small):
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
    return EXIT_ERROR if problems else 0
