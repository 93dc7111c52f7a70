"""``moetier mirror DIR FOLDER``: copy a model directory's records to another disk, so that both disks are read."""

from __future__ import annotations

import argparse

from moetier.tiers.text import format_bytes
from moetier.tools.cli.parser import directory, local_folder

EXAMPLES = ("moetier mirror ./mixtral-4bit /mnt/second/mixtral-4bit",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `moetier mirror`."""
    parser.add_argument(
        "directory", type=directory, metavar="DIR", help="a model directory, or a name that moetier list shows"
    )
    parser.add_argument("target", type=local_folder, metavar="FOLDER", help="folder of the copy, on another disk")


def run(arguments: argparse.Namespace) -> None:
    """Run the command. Raises StoreError or TargetError."""
    from moetier.tiers.store.folder import read_manifest, store_folder
    from moetier.tools.convert.mirror_writer import mirror_to

    mirror_to(arguments.directory, arguments.target)
    stored = read_manifest(store_folder(arguments.directory)).stored_bytes
    print(f"{arguments.target}: mirror of {arguments.directory}, {format_bytes(stored)}")
