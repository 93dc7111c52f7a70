"""``moetier push DIR ADDRESS``: copy a model directory to an object store, from which any machine can use it."""

from __future__ import annotations

import argparse
from pathlib import Path

from moetier.tiers.text import format_bytes
from moetier.tools.cli.parser import UsageError, directory

EXAMPLES = (
    "moetier push ./mixtral-4bit s3://bucket/mixtral-4bit",
    "moetier push Qwen/Qwen3-30B-A3B:4bit gs://bucket/qwen3",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `moetier push`."""
    parser.add_argument(
        "directory", type=directory, metavar="DIR", help="a model directory, or a name that moetier list shows"
    )
    parser.add_argument(
        "address", metavar="ADDRESS", help="where to: s3://BUCKET/NAME, gs://, az://CONTAINER/NAME or file://"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what is at ADDRESS, a damaged copy or another model; its files that DIR lacks are removed. Until "
        "the new copy is complete there is no usable model at ADDRESS; an interrupted push is resumed",
    )
    parser.add_argument(
        "--quality",
        type=Path,
        metavar="FILE",
        help="what moetier quality DIR --json printed: the model card (README.md) then has the perplexity",
    )


def run(arguments: argparse.Namespace) -> None:
    """Copy the directory. Raises MoetierError."""
    from moetier.runtime.model.names import is_address
    from moetier.tiers.objects.push import push
    from moetier.tiers.redaction import redacted
    from moetier.tools.cli.progress import transfer_progress
    from moetier.tools.convert.model_card import MARK

    if not is_address(arguments.address):
        raise UsageError(f"{redacted(arguments.address)!r} is not an address.", "Give one such as s3://bucket/model.")
    card = card_of(arguments.directory, redacted(arguments.address), arguments.quality)
    written = push(
        arguments.directory,
        arguments.address,
        transfer_progress("push"),
        overwrite=arguments.overwrite,
        card=card,
        card_mark=MARK.encode() if arguments.quality is not None else None,
    )
    print(f"{arguments.address}: the model of {arguments.directory}, {format_bytes(written)} written")


def card_of(directory: Path, address: str, quality: Path | None) -> bytes | None:
    """Return the model card for ``address``: the user's README.md in ``directory``, or one that moetier makes.

    Returns None if the directory has no manifest, which ``push`` reports. Raises ConfigError if ``quality`` can't be
    used.
    """
    from moetier.tiers.store.folder import GROUP, METADATA, read_manifest
    from moetier.tools.convert.model_card import CARD, is_card, model_card

    if not (directory / GROUP / METADATA).is_file():
        return None
    path = directory / CARD
    if path.is_file() and not is_card(path):
        return path.read_bytes()
    return model_card(read_manifest(directory / GROUP), address, quality)
