"""Make a model directory from a checkpoint that is in a folder or on the hub."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from moetier.runtime.checkpoint.containers import Checkpoint, open_source
from moetier.runtime.checkpoint.safetensors_folder import check_source
from moetier.runtime.machine.threads import use_threads
from moetier.tiers.errors import ConfigError, StoreError, TargetExistsError
from moetier.tiers.store.folder import JOURNAL, replacement_folder

from .conversion import Conversion, ConversionReport
from .mirror_writer import mirror_to
from .model_files import check_unused
from .options import Options
from .replacement import (
    discard,
    finish_replacement,
    free_path,
    has_manifest,
    mirror_of_old,
    mirrors_of,
    replace_model,
    set_aside,
)
from .streaming import Download, open_on_hub
from .target import DOWNLOAD, check_place, copied_files, is_ours, remove, revision_under_way


def convert(
    src: str | Path, dst: str | Path, *, mirror: Path | None = None, quiet: bool = True, **options: Any
) -> ConversionReport:
    """Make the model directory ``dst`` from the checkpoint ``src``, or resume an interrupted conversion.

    Files of a hub checkpoint are downloaded when they are needed, and deleted once they are converted. Files that
    huggingface_hub's cache has already are read there, and not deleted.

    Args:
        src: folder of the checkpoint, or its id on the hub.
        mirror: folder into which the records are copied too.
        quiet: print nothing on standard error.
        options: fields of ``Options``. ``threads`` is set for the whole process, as in ``load``.

    Raises CheckpointError, TargetError or ConfigError; StoreError if a record can't be read for the mirror.
    """
    how = Options(**options)
    folder, target = check_source(src), Path(dst)
    resuming = None
    if mirror is not None:
        check_place(mirror, target)
        resuming = ["convert", str(folder or src), str(target.resolve()), "--mirror", str(mirror.resolve())]
    if folder is None:
        report = _convert_from_hub(str(src), target, how, resuming, quiet=quiet, or_folder=True)
    elif how.revision is not None or how.keep_source:
        raise ConfigError(
            f"{src} is a folder, and its files are neither downloaded nor deleted.",
            "Leave out --revision and --keep-source.",
        )
    else:
        report = _write(open_source(src, ignore_code=how.ignore_code), target, how, resuming, quiet=quiet)
    if mirror is not None:
        mirror_to(target, mirror, overwrite=how.overwrite or how.replace_first)
    return report


def pull(name: str, dst: Path, *, quiet: bool = True, **options: Any) -> ConversionReport:
    """Make the model directory ``dst`` from the hub checkpoint ``name``, or resume an interrupted conversion.

    ``quiet``, ``options`` and the errors raised are those of ``convert``.
    """
    return _convert_from_hub(name, dst, Options(**options), ["pull", name], quiet=quiet)


def _convert_from_hub(
    name: str, dst: Path, options: Options, resuming: list[str] | None, *, quiet: bool, or_folder: bool = False
) -> ConversionReport:
    """Convert the hub checkpoint ``name``. Resume with the commit of the run before, unless a revision is asked for.

    ``resuming``: as in ``_write``. If ``or_folder``, errors also say that there is no folder called ``name``.
    """
    replacing = revision_under_way(replacement_folder(dst), name) if options.overwrite else None
    checkpoint, download = open_on_hub(
        name,
        dst / DOWNLOAD,
        revision=options.revision or replacing or revision_under_way(dst, name),
        keep=options.keep_source,
        or_folder=or_folder,
        ignore_code=options.ignore_code,
    )
    return _write(checkpoint, dst, options, resuming, quiet=quiet, download=download)


def _write(
    checkpoint: Checkpoint,
    dst: Path,
    options: Options,
    resuming: list[str] | None,
    *,
    quiet: bool,
    download: Download | None = None,
) -> ConversionReport:
    """Make the model directory ``dst`` from an open checkpoint, or resume an interrupted conversion.

    Args:
        resuming: words of the command line that resumes the conversion, from the subcommand to the first option; by
            default ``convert SRC DST``.
        download: download of a hub checkpoint; None if the checkpoint is a folder.

    Raises CheckpointError, TargetError or ConfigError.
    """
    use_threads(options.threads)
    for place in (dst, replacement_folder(dst)):
        check_place(place, checkpoint.folder)
    conversion = Conversion.plan(checkpoint, dst, options, download=download, resuming=resuming, quiet=quiet)
    for path in finish_replacement(dst):
        conversion.say(set_aside(path))
    replaces = options.overwrite or options.replace_first
    ending = has_manifest(dst) and (dst / JOURNAL).exists()  # an earlier run stopped at its very end
    try:
        complete = conversion.target.is_complete()
        replaced = complete and not ending and replaces  # reads no weights: they may be damaged
    except TargetExistsError:
        if not (replaces and is_ours(dst)):
            raise
        replaced = True
    if replaced and has_manifest(dst) and not options.replace_first:
        return replace_model(conversion)
    if replaced:
        _remove_first(conversion)
    elif complete:
        conversion.complete_card()
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
    """Set copied files of another checkpoint aside. Return those that the new model lacks, but can use."""
    target = conversion.target
    dst = target.folder
    lacking = [path for path in copied_files(dst) if path.relative_to(dst).as_posix() not in target.small]
    with contextlib.suppress(StoreError):
        if (earlier := target.existing_manifest()) and earlier.source_digest == target.manifest.source_digest:
            return lacking
    for path in lacking:
        path.rename(goal := free_path(dst, path.relative_to(dst), in_use=True))
        conversion.say(set_aside(goal))
    return []
