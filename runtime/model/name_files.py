"""Names of models outside the folder of pulled models, and when each named model was last used.

``moetier convert`` and ``moetier link`` make the symbolic link ``$XDG_DATA_HOME/moetier/names/NAME``, which leads to
the model: NAME is that of its folder. The file ``used/NAME`` beside ``names`` has the time of the last use as its own
time, also for pulled models. None of it lies in a model, which may be read-only, or be of several users.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from moetier.tiers.errors import ConfigError
from moetier.tiers.store.folder import user_folder

NAME = re.compile(r"\w[\w.-]*")
MAX_NAMES = 1000  # numbers that are tried for models whose folders have one name


def data_folder() -> Path:
    """Return the folder of the user's models and names. Raises ConfigError if the user has no home folder."""
    if (folder := user_folder("DATA")) is None:
        raise ConfigError("There is no home folder to keep models in.", "Set XDG_DATA_HOME to a folder.")
    return folder


def registered() -> dict[str, Path]:
    """Return a dictionary from the names of converted and linked models to their paths, which may be gone."""
    models = {}
    with contextlib.suppress(OSError, ConfigError):
        for link in sorted((data_folder() / "names").iterdir()):
            with contextlib.suppress(OSError):  # not a link
                if NAME.fullmatch(link.name):
                    models[link.name] = link.parent / link.readlink()
    return models


def register_name(model: Path) -> str | None:
    """Give a model directory, a checkpoint's folder or a GGUF file a name, unless it has one. Return the name.

    The name is that of the folder, or that of the file without its suffix. If another model has this name, a number is
    added, unless that model was removed. Returns None if the user's folder can't be written, and for a pulled model.
    """
    path = real_path(model)
    stem = re.sub(r"[^\w.-]+", "-", path.name.removesuffix(".gguf")).lstrip(".-") or "model"
    with contextlib.suppress(OSError, ConfigError):
        if path.is_relative_to(real_path(data_folder() / "models")):
            return None
        folder = data_folder() / "names"
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            names = registered()
            if (earlier := next((name for name, other in names.items() if other == path), None)) is not None:
                return earlier
            for number in range(1, MAX_NAMES):
                name = stem if number == 1 else f"{stem}-{number}"
                if name in names and _is_removed(names[name]):
                    _remove(name)
                with contextlib.suppress(FileExistsError):
                    (folder / name).symlink_to(path)
                    return name
    return None


def forget_name(name: str, model: Path) -> None:
    """Remove the name of the converted or linked model in ``model``, and the time of the last use of any model.

    Does nothing if another model has taken over the name.
    """
    with contextlib.suppress(OSError), _locked(data_folder() / "names"):
        if registered().get(name, model) != model:
            return
        _remove(name)
    with contextlib.suppress(OSError):
        _stamp(name).unlink()  # of a pulled model, whose name is in no folder that could be locked


def real_path(path: Path) -> Path:
    """Return the path without links. Path.resolve raises RuntimeError for links that lead to each other."""
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the folder of names until the context ends, so that no other process changes a name."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _is_removed(model: Path) -> bool:
    """Return whether a model was removed. False if it can't be reached, as on a disk that is not mounted."""
    try:
        model.lstat()
    except FileNotFoundError:
        return os.path.isdir(model.parent)  # noqa: PTH112 - Path.is_dir may raise
    except OSError:
        return False
    return False


def _remove(name: str) -> None:
    for path in (data_folder() / "names" / name, _stamp(name)):
        with contextlib.suppress(OSError):
            path.unlink()


def note_use(name: str) -> None:
    """Note that the model called ``name`` is used now. Does nothing if the user's folder can't be written."""
    with contextlib.suppress(OSError, ConfigError):
        stamp = _stamp(name)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()


def last_use(name: str) -> float | None:
    """Return the time at which the model called ``name`` was last used, in seconds since 1970; None if it never was."""
    try:
        return _stamp(name).stat().st_mtime
    except OSError:
        return None


def _stamp(name: str) -> Path:
    return data_folder() / "used" / name.replace("/", "--")
