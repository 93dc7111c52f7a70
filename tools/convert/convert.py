"""Make a model directory from a checkpoint that is in a folder or on the hub."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetier.runtime.checkpoint.checkpoint import Checkpoint
from moetier.runtime.checkpoint.containers import open_source
from moetier.runtime.checkpoint.files import check_source
from moetier.runtime.machine.threads import use_threads
from moetier.tiers.errors import ConfigError, StoreError, TargetExistsError
from moetier.tiers.store.folder import JOURNAL, beside

from .conversion import Conversion, ConversionReport
from .files import check_unused
from .mirror import mirror_to
from .plan import Options
from .replacement import (
    discard,
    free_path,
    has_manifest,
    mirror_of_old,
    mirrors_of,
    replace_model,
    set_aside,
    settle,
)
from .streaming import Download, open_on_hub
from .target import DOWNLOAD, check_place, copied_files, is_ours, remove, revision_under_way


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
        mirror_to(Path(dst), mirror, overwrite=how.get("overwrite", False) or how.get("replace_first", False))
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
    replacing = how.get("overwrite") and revision_under_way(beside(dst), name)
    checkpoint, download = open_on_hub(
        name,
        dst / DOWNLOAD,
        revision=revision or replacing or revision_under_way(dst, name),
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
    replace_first: bool = False,
    quiet: bool = True,
    download: Download | None = None,
    resuming: Sequence[str] | None = None,
    **options: Any,
) -> ConversionReport:
    """Make the model directory ``dst`` from an open checkpoint, or resume an interrupted conversion.

    Args:
        overwrite: replace the model directory ``dst`` if it is complete, or was made from another checkpoint or with
            other options. A complete one stays in place until the new one is complete.
        replace_first: as ``overwrite``, but remove what is in ``dst`` before the new model is made.
        quiet: print nothing on standard error.
        download: download of a hub checkpoint; None if the checkpoint is a folder.
        resuming: words of the command line that resumes the conversion, from the subcommand to the first option; by
            default ``convert SRC DST``.
        options: fields of ``Options``. ``threads`` is set for the whole process, as in ``load``.

    Raises CheckpointError, TargetError or ConfigError.
    """
    how = Options(**options)
    use_threads(how.threads)
    for place in (dst, beside(dst)):
        check_place(place, checkpoint.folder)
    conversion = Conversion.plan(checkpoint, dst, how, download=download, resuming=resuming, quiet=quiet)
    for path in settle(dst):
        conversion.say(set_aside(path))
    ending = has_manifest(dst) and (dst / JOURNAL).exists()  # an earlier run stopped at its very end
    try:
        complete = conversion.target.is_complete()
        replaced = complete and not ending and (overwrite or replace_first)  # reads no weights: they may be damaged
    except TargetExistsError:
        if not ((overwrite or replace_first) and is_ours(dst)):
            raise
        replaced = True
    if replaced and has_manifest(dst) and not replace_first:
        return replace_model(conversion)
    if replaced:
        _remove_first(conversion)
    elif complete:
        conversion.target.tidy()
        return conversion.report({}, seconds=0.0, was_complete=True)
    for line in conversion.announce():
        conversion.say(line)
    return conversion.run()


def _remove_first(conversion: Conversion) -> None:
    """Remove what is in the target folder, and what was begun beside it, if there is room for the new model then.

    Raises TargetError.
    """
    dst = conversion.target.folder
    check_unused(str(dst), dst)
    conversion.check_disks(replacing=True)
    conversion.say(f"{dst}: removing the old conversion first")
    for mirror in mirrors_of(dst):
        conversion.say(mirror_of_old(mirror))
    remove(dst, _kept(conversion))
    discard(dst)


def _kept(conversion: Conversion) -> list[Path]:
    """Return the copied files in the target folder that the new model lacks, and that it can use.

    Those of another checkpoint are set aside.
    """
    target = conversion.target
    dst = target.folder
    lacking = [path for path in copied_files(dst) if path.relative_to(dst).as_posix() not in target.small]
    with contextlib.suppress(StoreError):
        if (found := target.found_plan()) and found.source_digest == target.plan.source_digest:
            return lacking
    for path in lacking:
        path.rename(goal := free_path(dst, path.relative_to(dst), in_use=True))
        conversion.say(set_aside(goal))
    return []
