"""Make a model directory from a checkpoint, in a folder or on the hub: open it, check the target, and convert it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetier.runtime.checkpoint.files import Checkpoint, check_source, open_checkpoint
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
    """Make the model directory ``dst`` from the checkpoint ``src``, a folder or a hub id, or resume a cut run.

    Files of a hub id are downloaded when they are needed and removed when they are converted. Files that are in
    huggingface_hub's cache already stay there; with ``keep_source`` all files are downloaded into it and stay. With
    ``mirror`` the experts are copied into that folder too. ``how`` are further parameters of ``write``. Everything that
    can be checked is checked before anything is written. Raises CheckpointError, TargetError or ConfigError.
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
            f"{src} is a folder, of which nothing is downloaded or removed.",
            "Leave out --revision and --keep-source.",
        )
    else:
        report = write(open_checkpoint(src, ignore_code=ignore_code), Path(dst), **how)
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
    """Make the model directory ``dst`` from a hub id, or resume a cut run with the commit that it began with.

    ``or_folder``: errors say that ``name`` may have been meant as a folder. Further parameters and errors are as in
    ``convert``.
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
    """Make the model directory ``dst`` from an open checkpoint, or resume a cut run.

    Args:
        overwrite: replace the model directory that is there, if it is another conversion or a complete one.
        quiet: print nothing on standard error.
        download: the files of a hub id, which are downloaded one after the other; None for a folder.
        resuming: words of the command that resumes a cut run, without its options; by default those of `convert`.
        options: fields of ``Options``; ``threads`` is the number of threads of this process, as in ``load``.
    """
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
