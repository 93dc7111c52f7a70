"""``moetier.convert`` and ``moetier.pull``: make a model directory from a checkpoint in a folder or on the hub."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetier.runtime.checkpoint import hub
from moetier.runtime.checkpoint.containers import Checkpoint, open_checkpoint
from moetier.runtime.checkpoint.safetensors_folder import check_source
from moetier.runtime.machine.threads import use_threads
from moetier.runtime.model.name_files import register_name
from moetier.runtime.model.names import folder_of, tag_of
from moetier.tiers.errors import ConfigError, StoreError, TargetExistsError
from moetier.tiers.options import declare_keywords
from moetier.tiers.store.folder import JOURNAL, replacement_folder

from .conversion import Conversion, ConversionReport
from .mirror_writer import mirror_to
from .model_files import DOWNLOAD, check_unused, copied_files, has_lost_store, is_ours, remove
from .options import CONVERT_OPTIONS, DEFAULT_BITS, Options
from .replacement import (
    discard,
    finish_replacement,
    free_path,
    has_manifest,
    mirror_of_old,
    mirrors_of,
    replace_model,
    set_aside_text,
)
from .streaming import Download, open_on_hub
from .target import check_place, revision_under_way


def convert(
    source: str | Path, target: str | Path, *, mirror: str | Path | None = None, quiet: bool = True, **options: Any
) -> ConversionReport:
    """Make the model directory ``target`` from a checkpoint, or resume an interrupted conversion.

    Files of a hub checkpoint are downloaded when they are needed, and deleted once they are converted. Files that
    huggingface_hub's cache has already are read there, and not deleted. ``moetier list`` then shows the model, with the
    name of its folder, even if the conversion fails after it has begun. If the model is complete, nothing is written,
    except a model card that is missing.

    Args:
        source: folder of the checkpoint, a GGUF file, or an id on the Hugging Face hub.
        target: the folder to write.
        mirror: folder on another disk into which the experts are copied too.
        quiet: show no progress on standard error.
        options: the fields of ``Options``.

    Raises:
        MoetierError: an option, the source or the target can't be used.
    """
    how, folder, target = Options(**options), check_source(source), Path(target)
    command = ["convert", str(folder or source), str(target.resolve())]
    if mirror is not None:
        check_place(Path(mirror), target)
        command += ["--mirror", str(Path(mirror).resolve())]
    if folder is not None and (how.revision is not None or how.keep_source):
        raise ConfigError(
            f"{source} is a folder, and its files are neither downloaded nor deleted.",
            "Leave out --revision and --keep-source.",
        )
    try:
        if folder is None:
            report = convert_from_hub(str(source), target, how, command, quiet=quiet, or_folder=True)
        else:
            checkpoint = open_checkpoint(source, ignore_code=how.ignore_code)
            report = convert_checkpoint(checkpoint, target, how, command, quiet=quiet)
    except BaseException:
        if os.path.isfile(target / JOURNAL):  # noqa: PTH113 - Path.is_file may raise
            register_name(target)  # `moetier list` says how to resume it
        raise
    register_name(target)
    if mirror is not None:
        mirror_to(target, Path(mirror), overwrite=how.overwrite or how.replace_first)
    return report


def pull(hub_id: str, *, quiet: bool = True, **options: Any) -> ConversionReport:
    """Download a model of the Hugging Face hub, converting it file by file, and keep it by name.

    Its name is ``hub_id`` with a tag of the bits, such as ORG/NAME:4bit, and its folder is the report's ``target``.

    Args:
        hub_id: ORG/NAME.
        quiet: show no progress on standard error.
        options: the fields of ``Options``.

    Raises:
        MoetierError: an option, the source or the target can't be used.
    """
    hub.check_id(hub_id)
    bits = Options(**options).bits or DEFAULT_BITS  # of every checkpoint, as the folder is named by it
    how = Options(**options | {"bits": bits})
    target = folder_of(hub_id, tag_of(bits, how.trunk_bits))
    return convert_from_hub(hub_id, target, how, ["pull", hub_id], quiet=quiet)


for _function in (convert, pull):
    declare_keywords(_function, CONVERT_OPTIONS)


def convert_from_hub(
    hub_id: str, target: Path, options: Options, command: Sequence[str], *, quiet: bool = True, or_folder: bool = False
) -> ConversionReport:
    """Convert a hub checkpoint. Resume with the commit of the run before, unless a revision is asked for.

    If ``or_folder``, errors also say that there is no folder called ``hub_id``. The rest is as in
    ``convert_checkpoint``.
    """
    replacing = revision_under_way(replacement_folder(target), hub_id) if options.overwrite else None
    checkpoint, download = open_on_hub(
        hub_id,
        target / DOWNLOAD,
        revision=options.revision or replacing or revision_under_way(target, hub_id),
        keep=options.keep_source,
        or_folder=or_folder,
        ignore_code=options.ignore_code,
    )
    return convert_checkpoint(checkpoint, target, options, command, quiet=quiet, download=download)


def convert_checkpoint(
    checkpoint: Checkpoint,
    target: Path,
    options: Options,
    command: Sequence[str] = (),
    *,
    quiet: bool = True,
    download: Download | None = None,
) -> ConversionReport:
    """Make the model directory ``target`` from an open checkpoint, or resume an interrupted conversion.

    Args:
        checkpoint: the checkpoint.
        target: the folder to write.
        options: the options.
        command: words of the command line that resumes the conversion, from the subcommand to the first option; by
            default ``convert`` with the checkpoint and the target.
        quiet: show no progress on standard error.
        download: download of a hub checkpoint; None if the checkpoint is a folder.

    Raises CheckpointError, TargetError or ConfigError.
    """
    use_threads(options.threads)
    for place in (target, replacement_folder(target)):
        check_place(place, checkpoint.folder)
    conversion = Conversion.plan(checkpoint, target, options, command=command, download=download, quiet=quiet)
    for path in finish_replacement(target):
        conversion.say(set_aside_text(path))
    replaces = options.overwrite or options.replace_first
    ending = has_manifest(target) and (target / JOURNAL).exists()  # an earlier run stopped at its very end
    try:
        complete = conversion.target.is_complete()
        replaced = complete and not ending and replaces  # reads no weights: they may be damaged
    except TargetExistsError:
        if not (replaces and (is_ours(target) or has_lost_store(target))):
            raise
        replaced = True
    if replaced and has_manifest(target) and not options.replace_first:
        return replace_model(conversion)
    if replaced:
        _remove_first(conversion)
    elif complete:
        conversion.complete_card()
        conversion.target.tidy()
        return conversion.report({}, was_complete=True)
    return conversion.run()


def _remove_first(conversion: Conversion) -> None:
    """Remove what is in the target folder, and what was begun beside it, if there is room for the new model then.

    Raises TargetError.
    """
    folder = conversion.target.folder
    check_unused(str(folder), folder)
    conversion.check_disks(replacing=True)
    conversion.say(f"{folder}: removing the old conversion first")
    for mirror in mirrors_of(folder):
        conversion.say(mirror_of_old(mirror))
    remove(folder, _kept(conversion))
    discard(folder)


def _kept(conversion: Conversion) -> list[Path]:
    """Set copied files of another checkpoint aside. Return those that the new model lacks, but can use."""
    target = conversion.target
    folder = target.folder
    lacking = [path for path in copied_files(folder) if path.relative_to(folder).as_posix() not in target.small]
    with contextlib.suppress(StoreError):
        if (earlier := target.existing_manifest()) and earlier.source_digest == target.manifest.source_digest:
            return lacking
    for path in lacking:
        path.rename(goal := free_path(folder, path.relative_to(folder), in_use=True))
        conversion.say(set_aside_text(goal))
    return []
