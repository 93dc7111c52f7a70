"""Replace a complete model directory: the new model is made beside the old one, and then takes its place.

The new model is made in the folder NAME~new. When it is complete, both folders exchange their names atomically. The
old one becomes the folder REPLACED in the new one, gives back the files that moetier did not write, and is removed. So
a process that dies at any moment leaves the old or the new model in place, and the next conversion finishes or resumes
what it began. A process that has files of the old model open can still read them.

The folder REPLACED is made before the exchange. Where it is shows whether the names were exchanged. Until the end the
new model has the journal of its conversion, as a sign that moetier made it.

A copied file that only the old model has, such as a tokenizer, may have been put there by hand, and stays. The new
model uses it only if both models were made from the same checkpoint: otherwise it gets another name.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moetier.tiers.errors import DiskSpaceError, StoreError, TargetError, TargetExistsError
from moetier.tiers.store.atomic import disk_errors, exchange, rename_durably, sync_folder, write_durably
from moetier.tiers.store.folder import (
    GROUP,
    JOURNAL,
    METADATA,
    MIRRORS,
    REPLACED,
    read_manifest,
    read_plan,
    replacement_folder,
)
from moetier.tiers.store.mirror import read_mirrors

from .model_card import CARD, is_card
from .model_files import copied_files, delete, delete_empty_folders, files_of_users, is_ours, locked, remove

if TYPE_CHECKING:
    from .conversion import Conversion, ConversionReport

FIRST = (
    "--replace-first, which removes the old model before the new one is made: it is lost then, even if the conversion "
    "fails."
)

SET_ASIDE = ".old"  # suffix of a file that stays, but can't keep its name


def has_manifest(folder: Path) -> bool:
    """Return whether a folder has a store's manifest, which is written last, so that the model may be complete."""
    return (folder / GROUP / METADATA).exists()


def finish_replacement(folder: Path) -> list[Path]:
    """Finish a replacement of the model in ``folder`` whose new model was complete when its process died.

    Return the files of the old model that were set aside. Raises TargetError if another process replaces the same
    model.
    """
    place, new = folder.resolve(), replacement_folder(folder)
    old = place / REPLACED
    if not place.exists() and is_ours(new / REPLACED):
        with locked(str(folder), new):
            rename_durably(new, place)
    if not old.is_dir() or old.is_symlink():
        return []
    with locked(str(folder), place):
        if is_ours(new) and not any(old.iterdir()):
            rename_durably(new, old)
        return _remove_replaced(place)


def _remove_replaced(place: Path) -> list[Path]:
    """Remove the old model of the model directory ``place``. Its other files move into ``place``.

    Return the new paths of those that can't keep their names.
    """
    old, aside = place / REPLACED, []
    kept = [path for path in copied_files(old) if not os.path.lexists(place / path.relative_to(old))]
    unused = kept if kept and not _same_source(old, place) else []
    for path in [*files_of_users(old), *kept]:
        relative = path.relative_to(old)
        if relative == Path(CARD) and is_card(place / CARD):
            goal = place / CARD  # the user's file, in whose presence no card is written
        else:
            goal = free_path(place, relative, in_use=path in unused)
        goal.parent.mkdir(parents=True, exist_ok=True)
        path.rename(goal)
        if goal != place / relative:
            aside.append(goal)
    if is_ours(old):
        remove(old)
        delete(old / GROUP)
    delete_empty_folders(old)
    if not any(old.iterdir()):
        old.rmdir()
    sync_folder(place)
    return aside


def _same_source(one: Path, other: Path) -> bool:
    """Return whether two model directories were made from the same checkpoint; False if that is not known."""
    try:
        first, second = read_plan(one / GROUP), read_plan(other / GROUP)
    except StoreError:
        return False
    return first is not None and second is not None and first.source_digest == second.source_digest


def free_path(folder: Path, relative: Path, *, in_use: bool) -> Path:
    """Return the path for a file that moves into ``folder``: ``relative``, with SET_ASIDE after each name in use.

    ``in_use``: take the file's own name as in use, even if it is not.
    """
    path = folder
    for name in relative.parts[:-1]:
        path /= name
        while os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
            path = path.with_name(path.name + SET_ASIDE)
    path /= relative.name + SET_ASIDE * in_use
    while os.path.lexists(path):
        path = path.with_name(path.name + SET_ASIDE)
    return path


def set_aside_text(path: Path) -> str:
    """Return the sentence that says that a file of the old model has another name now."""
    return f"{path}: a file of the old model, set aside under this name"


def discard(folder: Path) -> None:
    """Remove what an unfinished replacement of the model in ``folder`` has left beside it.

    Raises TargetError if a conversion is writing into it.
    """
    new = replacement_folder(folder)
    if is_ours(new) and ((new / JOURNAL).exists() or not has_manifest(new)):
        remove(new)
        delete(new)


def check_replaceable(folder: Path) -> None:
    """Raise TargetError if ``folder`` can't exchange its name with one beside it, or if a conversion writes into it."""
    place = folder.resolve()
    with contextlib.suppress(FileNotFoundError):  # the current folder was removed
        if Path.cwd().is_relative_to(place):
            raise TargetError(
                f"The current folder is {folder} or inside it, so {folder} can't be replaced.",
                "Change to another folder, then run the command again.",
            )
    reason = None
    if place.stat().st_dev != place.parent.stat().st_dev:
        reason = "it is the root of a file system"
    elif (place / GROUP).is_symlink():
        reason = f"its {GROUP} is a link"
    elif not os.access(place.parent, os.W_OK | os.X_OK):
        reason = f"{place.parent} can't be written"
    if not os.access(place, os.W_OK | os.X_OK):
        raise TargetError(f"{folder} can't be written, so it can't be replaced.", f"Run: chmod u+wx {folder}")
    if reason:
        raise TargetError(f"{folder} can't be replaced atomically, as {reason}.", f"Give {FIRST}")
    with locked(str(folder), folder):
        pass


def replace_model(conversion: Conversion) -> ConversionReport:
    """Make the model of ``conversion`` beside the complete one in its target folder, and let it take its place.

    Resume what an earlier run began, if it had the same plan. Raises CheckpointError or TargetError; the old model is
    then still in place.
    """
    folder, new = conversion.target.folder, replacement_folder(conversion.target.folder)
    check_replaceable(folder)
    making = replace(
        conversion,
        target=replace(conversion.target, folder=new),
        command=(*conversion.command, "--overwrite"),
    )
    if has_manifest(new) and not (new / JOURNAL).exists():
        raise TargetExistsError(
            f"{new} holds another model, but what is to replace {folder} is written there first.",
            f"Move {new} elsewhere.",
        )
    try:
        complete = making.target.is_complete()
    except TargetExistsError:
        if not is_ours(new):
            raise
        remove(new)  # it was begun with another plan
        complete = False
    if complete:
        making.complete_card()
        report = making.report(making.target.read_journal(), resumed_blocks=len(making.target.manifest.blocks))
    else:
        _check_room(conversion, making)
        conversion.say(f"{folder} stays as it is until the new model is complete")
        with disk_errors(folder / GROUP):
            _copy_access(folder, new)  # before anything is in it: the old model may be private
        report = making.make()
    mirrors = _keep_mirrors(folder, new)
    for path in _take_place(new, folder):
        conversion.say(set_aside_text(path))
    conversion.target.tidy()
    for mirror in mirrors:
        conversion.say(mirror_of_old(mirror))
    return replace(report, target=str(folder))


def _check_room(conversion: Conversion, making: Conversion) -> None:
    """Raise DiskSpaceError if there is no room for the new model beside the old one."""
    try:
        making.check_disks()
    except DiskSpaceError as error:
        conversion.check_disks(replacing=True)
        raise DiskSpaceError(
            f"The old model stays until the new one is complete, and the disk has no room for both: {error.cause}",
            f"Free some space. Or give {FIRST}",
        ) from error


def mirror_of_old(mirror: Path) -> str:
    """Return the sentence that says that a mirror is no longer used."""
    return f"{mirror}: mirror of the old model, which is not removed"


def mirrors_of(folder: Path) -> list[Path]:
    """Return the folders of a model's mirrors that exist; [] if they can't be read."""
    try:
        return [mirror for mirror in read_mirrors(folder) if mirror.exists()]
    except StoreError:
        return []


def _keep_mirrors(folder: Path, new: Path) -> list[Path]:
    """Give the mirrors of the old model to the new one if it has the same records; else return their folders."""
    if not (mirrors := mirrors_of(folder)):
        return []
    try:
        same = read_manifest(folder / GROUP).digest == read_manifest(new / GROUP).digest
    except StoreError:
        same = False
    if not same:
        return mirrors
    write_durably(new / MIRRORS, (folder / MIRRORS).read_bytes())
    return []


def _copy_access(folder: Path, new: Path) -> None:
    """Give the folders of the model in ``new`` the modes and owners of those in ``folder``, if that is permitted.

    Folders that are missing in ``new`` are made. Their owner can use them in any case.
    """
    for path, new_path in ((folder, new), (folder / GROUP, new / GROUP)):
        status = path.stat()
        new_path.mkdir(0o700, exist_ok=True)
        opened = os.open(new_path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)  # follows no link
        try:
            for owner in (status.st_uid, -1):  # without privileges, only the group may be changed
                with contextlib.suppress(PermissionError):
                    os.fchown(opened, owner, status.st_gid)
            with contextlib.suppress(PermissionError):
                os.fchmod(opened, stat.S_IMODE(status.st_mode) | stat.S_IRWXU)
        finally:
            os.close(opened)


def _take_place(new: Path, folder: Path) -> list[Path]:
    """Let the complete model in ``new`` take the place of the one in ``folder``, which is removed.

    Return the files of the old model that were set aside. Raises TargetError if the exchange is not possible. Both
    are then as they were.
    """
    place = folder.resolve()
    if not place.exists():  # it was removed meanwhile
        rename_durably(new, place)
        return []
    with locked(str(folder), folder), locked(str(new), new):
        try:
            _copy_access(folder, new)
            (new / REPLACED).mkdir(exist_ok=True)
            sync_folder(new)
            if not exchange(new, place):
                _rename_both(new, place)
        except OSError as error:
            raise TargetError(
                f"The new model in {new} is complete, but can't take the place of {folder} ({error.strerror}).",
                f"Give {FIRST}",
            ) from error
    return finish_replacement(folder)


def _rename_both(new: Path, place: Path) -> None:
    """Rename ``place``, then ``new``, where a file system can't exchange names. Between both, no model is in place."""
    place.rename(new / REPLACED)
    try:
        new.rename(place)
    except OSError:
        (new / REPLACED).rename(place)
        raise
    sync_folder(place)
    sync_folder(place.parent)
