"""``moetier pull ID``: download a model of the Hugging Face hub, convert it file by file, and store it by name."""

from __future__ import annotations

import argparse

from moetier.tools.cli.parser import hub_id

from .convert import add_convert_arguments, options_of, report_of

EXAMPLES = ("moetier pull Qwen/Qwen3-30B-A3B", "moetier pull mistralai/Mixtral-8x7B-v0.1 --bits 3 --trunk-bits 8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier pull`."""
    parser.add_argument(
        "id", type=hub_id, metavar="ID", help="hub id of a model; the result is named ID:TAG, such as ID:4bit"
    )
    add_convert_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Pull the model and return the exit code. Raises CheckpointError, TargetError or ConfigError."""
    options = options_of(arguments)
    from moetier.tools.convert.api import pull

    return report_of(lambda: pull(arguments.id, quiet=False, **options), arguments.json)
