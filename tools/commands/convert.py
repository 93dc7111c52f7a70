"""``moetier convert``: make a model directory from a Hugging Face checkpoint."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import FrameType
from typing import TYPE_CHECKING, Any

from moetier.runtime.config import OPTIONS
from moetier.runtime.options import COUNT
from moetier.tiers.layout import BITS, GROUPS, PAIR_TYPES, TRUNK_BITS
from moetier.tools.cli.arguments import add_option
from moetier.tools.cli.parser import checked, local_folder

if TYPE_CHECKING:
    from moetier.tools.convert.conversion import ConversionReport

EXAMPLES = (
    "moetier convert ./Mixtral-8x7B-v0.1 ./mixtral-4bit",
    "moetier convert mistralai/Mixtral-8x7B-v0.1 ./mixtral-3bit --bits 3",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier convert`."""
    parser.add_argument(
        "source", metavar="SRC", help="folder of the checkpoint, GGUF file, or id on the Hugging Face hub"
    )
    parser.add_argument("target", metavar="DST", type=local_folder, help="folder for the new model directory")
    parser.add_argument(
        "--mirror",
        type=local_folder,
        metavar="FOLDER",
        help="also copy the experts into FOLDER on another disk, so that both are read (as moetier mirror does)",
    )
    add_options(parser)


def bits(text: str) -> int | str:
    """Parse the value of --bits: "native", or a number. Raises ArgumentTypeError for other texts."""
    try:
        return text if text == "native" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, and not native") from error


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `moetier convert` and `moetier pull` share."""
    parser.add_argument(
        "--bits",
        type=bits,
        choices=(*BITS, "native"),
        help="bits per expert weight; native: keep weights as the checkpoint stores them (default: 4; convert takes "
        "native if they are quantised to fewer than 8 bits, or by HQQ, AWQ or GPTQ)",
    )
    parser.add_argument(
        "--trunk-bits",
        type=int,
        choices=TRUNK_BITS,
        default=16,
        help="bits per weight of everything else, except embeddings, norms and routers, which stay as they are "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=sorted(set().union(*GROUPS.values())),
        metavar="N",
        help="number of weights that share a scale (default: depends on --bits)",
    )
    parser.add_argument("--pairs", choices=PAIR_TYPES, help="format of the scales (default: depends on --bits)")
    parser.add_argument(
        "--fast",
        action=argparse.BooleanOptionalAction,
        help="round to the nearest value instead of optimising with HQQ: faster, but less accurate",
    )
    parser.set_defaults(fast=False)
    parser.add_argument(
        "--workers",
        type=COUNT,
        metavar="N",
        help="number of experts to quantise at a time, each on a thread (default: as --threads, or fewer if memory is "
        "short)",
    )
    add_option(parser, OPTIONS["threads"])
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a model that is there already. It stays in place until the new one, made beside it, is complete",
    )
    parser.add_argument(
        "--replace-first",
        action="store_true",
        help="as --overwrite, but remove the old model before the new one is made, where the disk has no room for "
        "both: it is lost even if the conversion fails",
    )
    parser.add_argument(
        "--ignore-code", action="store_true", help="accept a checkpoint with code of its own, which moetier never runs"
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub (default: main)")
    parser.add_argument(
        "--keep-source",
        action="store_true",
        help="keep downloaded files in huggingface_hub's cache (default: delete each file once it is converted)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0, or 128 plus the signal's number if a signal stopped it.

    Raises UsageError, CheckpointError, TargetError or ConfigError.
    """
    options = options_of(arguments) | {"mirror": arguments.mirror}
    from moetier.tools.convert.convert import convert

    return report_of(lambda: convert(arguments.source, arguments.target, **options), arguments.json)


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of ``add_options`` as keyword arguments of ``convert``.

    Raises UsageError if they can't be combined.
    """
    from moetier.tools.cli.loading import lean_imports

    with lean_imports():
        import transformers.modeling_utils  # noqa: F401 - transformers imports its parts only when they are named

        import moetier.tools.convert.convert  # noqa: F401
        from moetier.tools.convert.plan import Options

    how = {field.name: getattr(arguments, field.name) for field in fields(Options)}
    with checked():
        Options(**how)
    others = ("overwrite", "replace_first", "ignore_code", "revision", "keep_source")
    return how | {name: getattr(arguments, name) for name in others} | {"quiet": False}


def report_of(work: Callable[[], ConversionReport], as_json: bool) -> int:
    """Call ``work``, which converts a model. Print its report, and return the exit code."""
    import transformers

    logging.getLogger(transformers.__name__).setLevel(logging.ERROR)
    try:
        with _stopped_by_signals():
            report = work()
    except Stopped as stop:
        print("moetier: stopped. Run the same command again: it resumes where it stopped.", file=sys.stderr)
        return 128 + stop.number
    print(json.dumps(report.to_json()) if as_json else report.table())
    return 0


class Stopped(BaseException):
    """Raised by a signal that ends the conversion."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raise Stopped in the block at the first SIGINT or SIGTERM, and ignore further ones while the block cleans up."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
