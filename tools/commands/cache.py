"""``moetier cache list|clear FOLDER``: list or remove the keys and values that `moetier serve` keeps on disk."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from moetier.tools.cli.failure import plain
from moetier.tools.cli.parser import examples

EXAMPLES = ("moetier cache list ~/pages", "moetier cache clear ~/pages")
COMMANDS = {
    "list": "list the models whose keys and values are in a folder of moetier serve --kv-cache-dir",
    "clear": "remove all keys and values in the folder; a server that runs may write what it has in memory again",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `moetier cache`, and their argument."""
    subparsers = parser.add_subparsers(dest="what", metavar="WHAT", prog=parser.prog)
    for (name, line), example in zip(COMMANDS.items(), EXAMPLES, strict=True):
        description = f"{line[0].upper()}{line[1:]}."
        command = subparsers.add_parser(name, help=line, description=description, epilog=examples((example,)))
        command.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of --kv-cache-dir")


def run(arguments: argparse.Namespace) -> None:
    """List or remove pages. Raises ConfigError if there is no such folder, or other users may enter it."""
    from moetier.runtime.engine.pages.page_folder import clear, models_in
    from moetier.tiers.text import format_bytes
    from moetier.tools.cli.report import table

    if arguments.what == "clear":
        removed, nbytes = clear(arguments.folder)
        print(f"{removed:,} files removed, {format_bytes(nbytes)}")
        return
    rows = [["model", "size", "files", "last use"]]
    for model in models_in(arguments.folder):
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(model.used / 1e9))
        rows.append([plain(model.name), format_bytes(model.bytes), f"{model.files:,}", used])
    print(table(rows) if len(rows) > 1 else f"There are no keys and values in {arguments.folder}.")
