"""``moetier bench``: measure speeds and, in the same run, the upper bounds that this machine allows."""

from __future__ import annotations

import argparse

from moetier.tools.cli.parser import add_commands

NOUNS = {
    "disk": "read a store's records in random order; compare with fio",
    "kernels": "multiply with records; compare with the speed of reading memory",
    "decode": "decode given tokens; compare with the upper bound",
    "prefill": "compute a prompt; compare with the upper bound",
    "datapoint": "measure for at most five minutes; print a block of Markdown with the machine and rates beside bounds",
    "convert": "convert with HQQ and with --fast; compare with the speed of reading the source",
}
EXAMPLES = ("moetier bench disk ./mixtral-4bit", "moetier bench decode --help")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `moetier bench`."""
    add_commands(parser, {"": NOUNS}, "moetier.tools.bench", "WHAT")
