"""``moetier convert``: make a model directory from a Hugging Face checkpoint."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from moetier.runtime.config import COUNT
from moetier.tiers.errors import ConfigError, TargetExistsError
from moetier.tiers.layout import BITS, GROUPS, PAIR_TYPES, TRUNK_BITS
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
    parser.add_argument(
        "--mirror",
        type=Path,
        metavar="FOLDER",
        help="also copy the experts into this folder on another disk, and read from both (as moetier mirror)",
    )
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `moetier pull` has too."""
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
    options = options_of(arguments) | {"mirror": arguments.mirror}
    return report_of(lambda: convert(arguments.source, arguments.target, **options), arguments.json)


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of ``convert`` from the options of ``add_options``. Raises UsageError."""
    from moetier.tools.convert.plan import Options

    how = {field.name: getattr(arguments, field.name) for field in fields(Options)}
    with checked():
        Options(**how)
    others = ("overwrite", "ignore_code", "revision", "keep_source")
    return how | {name: getattr(arguments, name) for name in others} | {"quiet": False}


def report_of(work: Callable[[], ConversionReport], as_json: bool) -> int:
    """Call ``work``, which converts; print its report and return the exit code."""
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


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    revision: str | None = None,
    keep_source: bool = False,
    ignore_code: bool = False,
    mirror: Path | None = None,
    **how: Any,
) -> ConversionReport:
    """Make the model directory ``dst`` from the checkpoint ``src``, a folder or a hub id, or resume a cut run.

    Files of a hub id are downloaded when they are needed and removed when they are converted. Files that are in
    huggingface_hub's cache already stay there; with ``keep_source`` all files are downloaded into it and stay. With
    ``mirror`` the experts are copied into that folder too. ``how`` are further parameters of ``write``. Everything that
    can be checked is checked before anything is written. Raises CheckpointError, TargetError or ConfigError.
    """
    from moetier.runtime.checkpoint.files import check_source, open_checkpoint
    from moetier.tools.convert.target import check_place

    folder = check_source(src)
    if mirror is not None:
        check_place(mirror, Path(dst))
        how["resuming"] = ("convert", str(folder or src), str(Path(dst).resolve()), "--mirror", str(mirror.resolve()))
    if folder is None:
        report = pull(
            str(src),
            Path(dst),
            revision=revision,
            keep_source=keep_source,
            ignore_code=ignore_code,
            or_folder=True,
            **how,
        )
    elif revision is not None or keep_source:
        raise ConfigError(
            f"{src} is a folder, of which nothing is downloaded or removed.",
            "Leave out --revision and --keep-source.",
        )
    else:
        report = write(open_checkpoint(src, ignore_code=ignore_code), Path(dst), **how)
    if mirror is not None:
        from .mirror import mirror_to

        mirror_to(Path(dst), mirror)
    return report


def pull(
    name: str,
    dst: Path,
    *,
    revision: str | None = None,
    keep_source: bool = False,
    ignore_code: bool = False,
    or_folder: bool = False,
    resuming: Sequence[str] | None = None,
    **how: Any,
) -> ConversionReport:
    """Make the model directory ``dst`` from a hub id, or resume a cut run with the commit that it began with.

    ``or_folder``: errors say that ``name`` may have been meant as a folder. Further parameters and errors are as in
    ``convert``.
    """
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
    overwrite: bool = False,
    quiet: bool = True,
    download: Download | None = None,
    resuming: Sequence[str] | None = None,
    **options: Any,
) -> ConversionReport:
    """Make the model directory ``dst`` from an open checkpoint, or resume a cut run.

    Args:
        overwrite: replace the model directory that is there, if it is another conversion or a complete one.
        quiet: print nothing on standard error.
        download: the files of a hub id, which are downloaded one after the other; None for a folder.
        resuming: words of the command that resumes a cut run, without its options; by default those of `convert`.
        options: fields of ``Options``; ``threads`` is the number of threads of this process, as in ``load``.
    """
    from moetier.runtime.threads import use_threads
    from moetier.tools.convert.conversion import Conversion
    from moetier.tools.convert.plan import Options
    from moetier.tools.convert.files import check_unused
    from moetier.tools.convert.target import check_place, is_ours, remove

    how = Options(**options)
    use_threads(how.threads)
    check_place(dst, checkpoint.folder)
    conversion = Conversion.plan(checkpoint, dst, how, download=download, resuming=resuming, quiet=quiet)
    try:
        complete = conversion.target.is_complete()
        replaced = complete and overwrite  # its bytes may be damaged, which is not checked here
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
