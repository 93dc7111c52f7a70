"""Files of a model directory: tell which are moetier's, remove them, find processes that use them, and measure them.

A removal first deletes the store's metadata, so that an interrupted removal leaves nothing that looks like a complete
model. The store's own folder is deleted last: it marks the directory as moetier's, so that the removal can be resumed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from moetier.runtime.checkpoint.config_json import read_config
from moetier.runtime.checkpoint.containers import container_of
from moetier.runtime.machine.memory import mapped_files
from moetier.tiers.errors import MoetierError, StoreError, StoreFormatError, TargetError
from moetier.tiers.manifest import FileSum
from moetier.tiers.small_names import COPIED, SETTINGS
from moetier.tiers.store.atomic import PARTIAL, sync_folder
from moetier.tiers.store.checksum import crc32c
from moetier.tiers.store.folder import GROUP, JOURNAL, METADATA, MIRRORS, ORIGIN, read_json, read_manifest
from moetier.tiers.store.trunk import INDEX

from .model_card import CARD, is_card

CONFIG = "config.json"
DOWNLOAD = "download"  # has a folder of each downloaded commit, which is deleted when the conversion is finished
WRITTEN = re.compile(rf"trunk-[\d-]+of-\d+\.safetensors|{re.escape(INDEX)}|{CONFIG}|{ORIGIN}|{JOURNAL}|{MIRRORS}")
COMMIT = re.compile(r"[0-9a-f]{40}")  # on the hub; a digest has more characters


@contextlib.contextmanager
def locked(name: str, folder: Path) -> Iterator[None]:
    """Hold the lock of the store in ``folder`` until the context ends, so that no conversion writes into it.

    Raises TargetError if a conversion holds the lock. The error calls the model ``name``.
    """
    lock = os.open(folder / GROUP, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise TargetError(
            f"{name} is in use: a conversion is writing into it.", "Wait for the conversion or end it, then try again."
        ) from None
    finally:
        os.close(lock)


def empty(folder: Path, beside: Iterable[Path]) -> None:
    """Remove the content of the store in ``folder``, and the files ``beside`` the store. The store's folder stays."""
    store = folder / GROUP
    (store / METADATA).unlink(missing_ok=True)
    sync_folder(store)
    for path in beside:
        delete(path)
    sync_folder(folder)
    for path in store.iterdir():
        delete(path)


def delete(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def delete_empty_folders(folder: Path) -> None:
    """Remove the folders below ``folder`` in which no files are."""
    folders = (path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())
    for path in sorted(folders, reverse=True):
        if not any(path.iterdir()):
            path.rmdir()


def check_unused(name: str, folder: Path) -> None:
    """Raise TargetError if another process uses the model in ``folder``. The error calls the model ``name``."""
    if users := users_of(folder):
        which = "; ".join(f"process {pid} ({command})" for pid, command in users.items())
        raise TargetError(f"{name} is in use by {which}.", "End every process that uses it, then try again.")


def users_of(folder: Path) -> dict[int, str]:
    """Return the other processes that have files in ``folder`` open or mapped, as a dictionary: id -> command line.

    Such a process may be a daemon, a server or a conversion. Processes of other users can't be inspected, and are left
    out. Command lines are cut to 100 characters.
    """
    prefix = f"{folder.resolve()}/"
    mapped = prefix.replace("\n", r"\012")  # as the kernel writes a path in /proc/PID/maps
    users = {}
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            opened = any(f"{path}/".startswith(prefix) for path in _opened(process))
            if opened or any(path.startswith(mapped) for _, path in mapped_files(process.name)):
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                users[int(process.name)] = " ".join(words).strip()[:100]
    return users


def _opened(process: Path) -> Iterator[str]:
    for link in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # the file was closed meanwhile
            yield str(link.readlink())


def small_faults(directory: Path) -> Iterator[MoetierError]:
    """Yield an error if config.json is invalid, and one if the tokenizer's vocabulary is missing.

    A model directory without a tokenizer has no such fault.
    """
    try:
        read_config(directory)
    except MoetierError as error:
        yield error
    present = [name for name in SETTINGS if (directory / name).exists()]
    if present and not container_of(directory).has_vocabulary(directory):
        yield StoreFormatError(
            f"{directory} has {present[0]}, but no vocabulary: tokenizer.json or tokenizer.model is missing.",
            "Copy the tokenizer files of the source checkpoint into it.",
        )


def nearest_folder(path: Path) -> Path:
    """Return the deepest existing folder on the way to ``path``. It is on the disk on which ``path`` would be made."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that ``folder`` is on, or would be on if it existed."""
    return shutil.disk_usage(nearest_folder(folder)).free


def disk_bytes(folder: Path) -> int:
    """Return the bytes that all files below a folder take on the disk. Holes and targets of links do not count."""
    taken = 0
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):  # it was renamed or removed meanwhile
                taken += os.lstat(Path(place, name)).st_blocks * 512
    return taken


def is_ours(folder: Path) -> bool:
    """Return whether a conversion wrote, or began to write, the folder: whether it has a store."""
    return (folder / GROUP).is_dir()


def has_lost_store(folder: Path) -> bool:
    """Return whether a conversion wrote the folder's config.json, but the store is missing."""
    if os.path.lexists(folder / GROUP) or not (folder / CONFIG).is_file():
        return False
    with contextlib.suppress(StoreError, AttributeError):  # raised for a quantization_config that is no object
        return bool(read_json(folder / CONFIG).get("quantization_config", {}).get("quant_method") == "moetier")
    return False


def remove(folder: Path, kept: Sequence[Path] = ()) -> None:
    """Remove everything that moetier writes into a model directory, except the store's own folder, which is left empty.

    Files in ``kept`` stay. Raises TargetError if a conversion is writing into the folder.
    """
    beside = [path for path in outside_store(folder) if path not in kept]
    if has_lost_store(folder):
        (folder / GROUP).mkdir(exist_ok=True)  # it has the lock, and marks the directory as moetier's
    with locked(str(folder), folder):
        empty(folder, beside)


def files_of_users(folder: Path) -> list[Path]:
    """Return the files and links in a model directory that moetier did not write and would not remove."""
    ours = {*_beside_store(folder)}
    apart = {folder / GROUP, *downloaded_folders(folder)}
    return [
        path
        for path in sorted(folder.rglob("*"))
        if (path.is_symlink() or not path.is_dir()) and path not in ours and not apart & {path, *path.parents}
    ]


def copied_files(folder: Path) -> list[Path]:
    """Return the files in a model directory that moetier would have copied from a checkpoint."""
    return [path for path in _beside_store(folder) if COPIED.fullmatch(path.relative_to(folder).as_posix())]


def foreign_copies(folder: Path) -> list[Path]:
    """Return the ``copied_files`` that the conversion is not known to have written, as they are now."""
    sums: Mapping[str, FileSum] = {}
    with contextlib.suppress(StoreError):
        sums = read_manifest(folder / GROUP).copied
    return [
        path
        for path in copied_files(folder)
        if path.is_symlink()
        or not path.is_file()
        or file_sum(path.read_bytes()) != sums.get(path.relative_to(folder).as_posix())
    ]


def file_sum(data: bytes) -> FileSum:
    """Return the size and the checksum of a file's content."""
    return FileSum(len(data), crc32c(data))


def outside_store(folder: Path) -> list[Path]:
    """Return the files and folders in a model directory that moetier writes, except the store."""
    return [*downloaded_folders(folder), *_beside_store(folder)]


def _beside_store(folder: Path) -> Iterator[Path]:
    """Yield the paths in ``folder`` of files that moetier writes, except the store's and downloaded files."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix().removesuffix(PARTIAL)
        ours = WRITTEN.fullmatch(name) or COPIED.fullmatch(name) or (name == CARD and is_card(path))
        if ours and (path.is_symlink() or not path.is_dir()):
            yield path


def freed_bytes(folder: Path) -> int:
    """Return how many bytes of the disk ``remove`` frees.

    Downloaded files, which have a second name, do not count: the forecast of the space that is needed leaves them out,
    too.
    """
    statuses = [path.lstat() for path in (*_beside_store(folder), *(folder / GROUP).rglob("*"))]
    return sum(512 * file.st_blocks for file in statuses if file.st_nlink == 1)  # else another name keeps the data


def downloaded_folders(folder: Path) -> list[Path]:
    """Return the folders of downloaded commits. All else in the folder DOWNLOAD is the user's."""
    path = folder / DOWNLOAD
    if not path.is_dir() or path.is_symlink():
        return []
    return [
        commit
        for commit in sorted(path.iterdir())
        if COMMIT.fullmatch(commit.name) and commit.is_dir() and not commit.is_symlink()
    ]
