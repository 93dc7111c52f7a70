"""``moetier bench``: measured speeds beside the upper bounds that this machine allows, both from one run."""

from __future__ import annotations

import argparse

from moetier.tools.cli.parser import add_commands

NOUNS = {
    "disk": "read a store's records at random, beside fio",
    "kernels": "multiply with records, beside the rate at which memory is read",
    "decode": "decode fixed tokens, beside the bound of a token",
    "prefill": "compute a prompt, beside its bound",
    "convert": "convert with HQQ and with --fast, beside the rate at which the source can be read",
}
EXAMPLES = ("moetier bench disk ./mixtral-4bit", "moetier bench decode --help")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `moetier bench`."""
    add_commands(parser, NOUNS, "moetier.tools.bench", "WHAT")
