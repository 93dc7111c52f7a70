"""``moetier convert``: a Hugging Face checkpoint becomes a model directory."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from moetier.runtime.config import COUNT
from moetier.tiers.errors import ConfigError, TargetExistsError
from moetier.tiers.layout import BITS, GROUPS, PAIR_TYPES, TRUNK_BITS, Bits
from moetier.tools.cli.arguments import add_option
from moetier.tools.cli.parser import checked

if TYPE_CHECKING:
    from moetier.runtime.checkpoint.files import Checkpoint
    from moetier.tools.convert.conversion import ConversionReport
    from moetier.tools.convert.streaming import Download

EXAMPLES = (
    "moetier convert ./Mixtral-8x7B-v0.1 ./mixtral-4bit",
    "moetier convert mistralai/Mixtral-8x7B-v0.1 ./mixtral-3bit --bits 3",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier convert`."""
    parser.add_argument("source", metavar="SRC", help="folder of the checkpoint, or its id on the Hugging Face hub")
    parser.add_argument("target", metavar="DST", type=Path, help="folder of the new model directory")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `moetier pull` takes too."""
    parser.add_argument(
        "--bits", type=int, choices=BITS, default=4, help="bits per expert weight (default: %(default)s)"
    )
    parser.add_argument(
        "--trunk-bits",
        type=int,
        choices=TRUNK_BITS,
        default=16,
        help="bits per weight of everything else; embeddings, norms and routers stay as they are "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=sorted(set().union(*GROUPS.values())),
        metavar="N",
        help="weights that share a scale (default: depends on --bits)",
    )
    parser.add_argument("--pairs", choices=PAIR_TYPES, help="format of the scales (default: depends on --bits)")
    parser.add_argument(
        "--fast",
        action=argparse.BooleanOptionalAction,
        help="round plainly instead of optimising with HQQ: faster, less accurate",
    )
    parser.set_defaults(fast=False)
    parser.add_argument(
        "--workers",
        type=COUNT,
        metavar="N",
        help="experts that are quantised at a time, each on a thread (default: --threads, fewer where memory is short)",
    )
    add_option(parser, "threads")
    parser.add_argument("--overwrite", action="store_true", help="replace a different model directory")
    parser.add_argument(
        "--ignore-code", action="store_true", help="accept a checkpoint that names code of its own, which is never run"
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub (default: main)")
    parser.add_argument(
        "--keep-source",
        action="store_true",
        help="keep downloaded files in huggingface_hub's cache (default: delete each one when it is converted)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0, or 128 plus the signal's number if one stopped it.

    Raises UsageError, CheckpointError, TargetError or ConfigError.
    """
    options = options_of(arguments)
    return report_of(lambda: convert(arguments.source, arguments.target, **options), arguments.json)


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of ``convert`` that ``add_options`` names. Raises UsageError."""
    from moetier.tools.convert.draft import Options

    with checked():
        Options(arguments.bits, arguments.trunk_bits, arguments.group_size, arguments.pairs, arguments.fast)
    names = ("bits", "trunk_bits", "group_size", "pairs", "fast", "workers", "threads", "overwrite", "ignore_code")
    return {name: getattr(arguments, name) for name in (*names, "revision", "keep_source")} | {"quiet": False}


def report_of(work: Callable[[], ConversionReport], as_json: bool) -> int:
    """Does the work of a command, and says what came of it."""
    import transformers

    logging.getLogger(transformers.__name__).setLevel(logging.ERROR)
    try:
        with _stopped_by_signals():
            report = work()
    except Stopped as stop:
        print("moetier: stopped; run the same command again: it resumes where it stopped", file=sys.stderr)
        return 128 + stop.number
    print(json.dumps(report.to_json()) if as_json else report.table())
    return 0


class How(TypedDict, total=False):
    """Options of every conversion; without one it is as ``write`` has it."""

    bits: Bits
    trunk_bits: Bits
    group_size: int | None
    pairs: str | None
    fast: bool
    overwrite: bool
    workers: int | None
    threads: int | None
    quiet: bool


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    revision: str | None = None,
    keep_source: bool = False,
    ignore_code: bool = False,
    **how: Unpack[How],
) -> ConversionReport:
    """Makes the model directory ``dst`` from the checkpoint ``src``, a folder or a hub id; goes on where a run was cut.

    Of a hub id its files are downloaded as they are needed, and removed when they are not any more, but for those in
    huggingface_hub's cache, where ``keep_source`` keeps them all. ``how`` is as in ``write``.

    Everything that can be checked is checked before anything is written. Raises CheckpointError, TargetError or
    ConfigError.
    """
    from moetier.runtime.checkpoint.files import check_source, open_checkpoint

    if check_source(src) is None:
        return pull(
            str(src),
            Path(dst),
            revision=revision,
            keep_source=keep_source,
            ignore_code=ignore_code,
            or_folder=True,
            **how,
        )
    if revision is not None or keep_source:
        raise ConfigError(
            f"{src} is a folder: nothing of it is downloaded, and nothing removed.",
            "Leave out --revision and --keep-source.",
        )
    return write(open_checkpoint(src, ignore_code=ignore_code), Path(dst), **how)


def pull(
    name: str,
    dst: Path,
    *,
    revision: str | None = None,
    keep_source: bool = False,
    ignore_code: bool = False,
    or_folder: bool = False,
    resuming: Sequence[str] | None = None,
    **how: Unpack[How],
) -> ConversionReport:
    """The same for a hub id, whatever folders there are; ``or_folder``: one of that name was looked for before. A run
    that was cut goes on with the commit that it was of."""
    from moetier.tools.convert.streaming import open_on_hub
    from moetier.tools.convert.target import DOWNLOAD, revision_under_way

    checkpoint, download = open_on_hub(
        name,
        dst / DOWNLOAD,
        revision=revision or revision_under_way(dst, name),
        keep=keep_source,
        or_folder=or_folder,
        ignore_code=ignore_code,
    )
    return write(checkpoint, dst, download=download, resuming=resuming, **how)


def write(
    checkpoint: Checkpoint,
    dst: Path,
    *,
    bits: Bits = 4,
    trunk_bits: Bits = 16,
    group_size: int | None = None,
    pairs: str | None = None,
    fast: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    threads: int | None = None,
    quiet: bool = True,
    download: Download | None = None,
    resuming: Sequence[str] | None = None,
) -> ConversionReport:
    """Of a checkpoint that is open. Unless ``quiet``, says what it does on standard error. ``resuming`` is the command
    that resumes it, but for its options. ``threads`` is how many threads this process computes with, as of ``load``."""
    from moetier.runtime.threads import use_threads
    from moetier.tools.convert.conversion import Conversion
    from moetier.tools.convert.draft import Options
    from moetier.tools.convert.files import check_unused
    from moetier.tools.convert.target import check_place, is_ours, remove

    options = Options(bits, trunk_bits, group_size, pairs, fast, workers, threads)
    use_threads(threads)
    check_place(dst, checkpoint.folder)
    conversion = Conversion.plan(checkpoint, dst, options, download=download, resuming=resuming, quiet=quiet)
    try:
        complete = conversion.target.is_complete()
        replaced = complete and overwrite  # its bytes may be damaged, which nothing here looks at
    except TargetExistsError:
        if not (overwrite and is_ours(dst)):
            raise
        replaced = True
    if replaced:
        check_unused(str(dst), dst)
        conversion.check_disks(replacing=True)
        conversion.say(f"{dst}: what is there is removed first")
        remove(dst)
    elif complete:
        conversion.target.tidy()
        return conversion.report({}, seconds=0.0, was_complete=True)
    for line in conversion.announce():
        conversion.say(line)
    return conversion.run()


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
