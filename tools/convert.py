"""``moetier convert``: a Hugging Face checkpoint becomes a model directory."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from moetier.tiers.errors import TargetExistsError
from moetier.tiers.keys import BITS, TRUNK_BITS, Bits

from .conversion_report import ConversionReport

HELP = "turn a Hugging Face checkpoint into a model directory with quantised experts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder of a checkpoint, or its id on the Hugging Face hub")
    parser.add_argument("target", metavar="DST", type=Path, help="folder of the model directory to be")
    parser.add_argument(
        "--bits", type=int, choices=BITS, default=4, help="of an expert's weight (default: %(default)s)"
    )
    parser.add_argument(
        "--trunk-bits",
        type=int,
        choices=TRUNK_BITS,
        default=16,
        help="of a weight of the matrices beside the experts; embeddings, norms and gates stay as they are "
        "(default: %(default)s)",
    )
    parser.add_argument("--group-size", type=int, metavar="N", help="weights that share a scale (default: by --bits)")
    parser.add_argument("--pairs", choices=("bfloat16", "uint8"), help="format of the scales (default: by --bits)")
    parser.add_argument(
        "--fast",
        action=argparse.BooleanOptionalAction,
        help="plain rounding in place of HQQ: quicker, less exact",
    )
    parser.set_defaults(fast=False)
    parser.add_argument(
        "--workers", type=int, metavar="N", help="experts at a time (default: as CPUs and memory allow)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a different, or damaged, model directory")
    parser.add_argument(
        "--ignore-code", action="store_true", help="accept a checkpoint that names code of its own; it is never run"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def run(arguments: argparse.Namespace) -> int:
    import transformers

    logging.getLogger(transformers.__name__).setLevel(logging.ERROR)
    try:
        with _stopped_by_signals():
            report = convert(
                arguments.source,
                arguments.target,
                bits=arguments.bits,
                trunk_bits=arguments.trunk_bits,
                group_size=arguments.group_size,
                pairs=arguments.pairs,
                fast=arguments.fast,
                overwrite=arguments.overwrite,
                workers=arguments.workers,
                ignore_code=arguments.ignore_code,
                quiet=False,
            )
    except Stopped as stop:
        print("moetier: stopped; run the same command again: it resumes where it stopped", file=sys.stderr)
        return 128 + stop.number
    print(json.dumps(report.to_json()) if arguments.json else report.table())
    return 0


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    bits: Bits = 4,
    trunk_bits: Bits = 16,
    group_size: int | None = None,
    pairs: str | None = None,
    fast: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    ignore_code: bool = False,
    quiet: bool = True,
) -> ConversionReport:
    """Makes the model directory ``dst`` from the checkpoint ``src``, a folder or a hub id; goes on where a run was cut.

    Everything that can be checked is checked before anything is written. Raises CheckpointError, TargetError or
    ConfigError. Unless ``quiet``, says what it does on standard error.
    """
    from .checkpoint import open_checkpoint
    from .conversion import Conversion
    from .draft import Options
    from .skeleton import check_supported
    from .target import State, check_place, is_ours, remove

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    options = Options(bits, trunk_bits, group_size, pairs, fast, workers)
    checkpoint = open_checkpoint(src, ignore_code=ignore_code, check=check_supported)
    check_place(Path(dst), checkpoint.folder)
    conversion = Conversion.plan(checkpoint, Path(dst), options)
    try:
        state = conversion.target.state()
    except TargetExistsError:
        if not (overwrite and is_ours(Path(dst))):
            raise
        remove(Path(dst))
        state = State.NEW
    if state is State.COMPLETE and overwrite:  # its bytes may be damaged, which nothing here looks at
        remove(Path(dst))
        state = State.NEW
    if state is State.COMPLETE:
        conversion.target.tidy()
        return conversion.report({}, seconds=0.0, was_complete=True)
    for line in conversion.announce():
        say(line)
    return conversion.run(say, quiet)


class Stopped(BaseException):
    """A signal asked the conversion to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Turns SIGINT and SIGTERM into Stopped, once: a second one while things are put in order changes nothing."""

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
