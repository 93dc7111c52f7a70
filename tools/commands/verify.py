"""``moetier verify DIR``: check all records and files against their checksums, and name those that differ."""

from __future__ import annotations

import argparse
import json
import sys

from moetier.tools.cli.failure import EXIT_ERROR
from moetier.tools.cli.parser import add_directory, add_json
from moetier.tools.doctor.survey import NO_TOKENIZER

EXAMPLES = ("moetier verify ./mixtral-4bit",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier verify`."""
    add_directory(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check the directory; return 1 if a record or a file is bad. Raises StoreError if nothing can be checked."""
    from moetier.tools.doctor.verification import verify

    verified = verify(arguments.directory, shows=not arguments.json)
    if arguments.json:
        print(json.dumps(verified.to_json(), indent=2))
    else:
        print(verified.text())
        if not verified.tokenizer:
            print(f"tokenizer: {NO_TOKENIZER}")
        for path in verified.absent:
            print(f"mirror {path}: missing, so it was not checked")
        if verified.bad:
            print(verified.store.fix, file=sys.stderr)
    return EXIT_ERROR if verified.bad else 0
