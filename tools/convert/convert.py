"""Make a model directory from a checkpoint that is in a folder or on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetier.runtime.checkpoint.files import Checkpoint, check_source
from moetier.runtime.checkpoint.gguf import open_source
from moetier.runtime.threads import use_threads
from moetier.tiers.errors import ConfigError, TargetExistsError

from .conversion import Conversion, ConversionReport
from .files import check_unused
from .mirror import mirror_to
from .plan import Options
from .streaming import Download, open_on_hub
from .target import DOWNLOAD, check_place, is_ours, remove, revision_under_way


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
    """Make the model directory ``dst`` from the checkpoint ``src``, or resume an interrupted conversion.

    Files of a hub checkpoint are downloaded when they are needed, and deleted once they are converted. Files that
    huggingface_hub's cache has already are read there, and not deleted.

    Args:
        src: folder of the checkpoint, or its id on the hub.
        revision: branch, tag or commit of a hub checkpoint.
        keep_source: download all files into huggingface_hub's cache, and delete none.
        ignore_code: accept a checkpoint that names code of its own. The code is never run.
        mirror: folder into which the records are copied too.
        how: further parameters of ``write``.

    Raises CheckpointError, TargetError or ConfigError; StoreError if a record can't be read for the mirror.
    """
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
            f"{src} is a folder, and its files are neither downloaded nor deleted.",
            "Leave out --revision and --keep-source.",
        )
    else:
        report = write(open_source(src, ignore_code=ignore_code), Path(dst), **how)
    if mirror is not None:
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
    """Make the model directory ``dst`` from the hub checkpoint ``name``, or resume an interrupted conversion.

    A conversion is resumed with the commit that it began with, unless ``revision`` is given. If ``or_folder``, errors
    also say that there is no folder called ``name``. The other parameters, and the errors raised, are those of
    ``convert`` and ``write``.
    """
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
    """Make the model directory ``dst`` from an open checkpoint, or resume an interrupted conversion.

    Args:
        overwrite: replace the model directory ``dst`` if it is complete, or was made from another checkpoint or with
            other options.
        quiet: print nothing on standard error.
        download: download of a hub checkpoint; None if the checkpoint is a folder.
        resuming: words of the command line that resumes the conversion, from the subcommand to the first option; by
            default ``convert SRC DST``.
        options: fields of ``Options``. ``threads`` is set for the whole process, as in ``load``.

    Raises CheckpointError, TargetError or ConfigError.
    """
    how = Options(**options)
    use_threads(how.threads)
    check_place(dst, checkpoint.folder)
    conversion = Conversion.plan(checkpoint, dst, how, download=download, resuming=resuming, quiet=quiet)
    try:
        complete = conversion.target.is_complete()
        replaced = complete and overwrite  # is_complete reads no weights: they may be damaged
    except TargetExistsError:
        if not (overwrite and is_ours(dst)):
            raise
        replaced = True
    if replaced:
        check_unused(str(dst), dst)
        conversion.check_disks(replacing=True)
        conversion.say(f"{dst}: removing the old conversion first")
        remove(dst)
    elif complete:
        conversion.target.tidy()
        return conversion.report({}, seconds=0.0, was_complete=True)
    for line in conversion.announce():
        conversion.say(line)
    return conversion.run()
