"""Names of models outside the folder of pulled models, and when each named model was last used.

``moetier convert`` and ``moetier link`` make the symbolic link ``$XDG_DATA_HOME/moetier/names/NAME``, which leads to
the model: NAME is that of its folder. The file ``used/NAME`` beside ``names`` has the time of the last use as its own
time, also for pulled models. None of it lies in a model, which may be read-only, or be of several users.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from moetier.tiers.errors import ConfigError

NAME = re.compile(r"\w[\w.-]*")
MOST_NAMES = 1000  # numbers that are tried for models whose folders have one name


def data_folder() -> Path:
    """Return the folder of the user's models and names. Raises ConfigError if the user has no home folder."""
    folder = Path(os.environ.get("XDG_DATA_HOME", ""))
    if not folder.is_absolute():  # the specification says to ignore such a value
        try:
            folder = Path.home() / ".local" / "share"
        except RuntimeError:
            raise ConfigError("There is no home folder to keep models in.", "Set XDG_DATA_HOME to a folder.") from None
    return folder / "moetier"


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

    The name is that of the folder, or that of the file without its suffix. If another model has this name, and is still
    there, a number is added. Returns None if the user's folder can't be written, and for a pulled model.
    """
    path = model.resolve()
    names = registered()
    if (earlier := next((name for name, other in names.items() if other == path), None)) is not None:
        return earlier
    stem = re.sub(r"[^\w.-]+", "-", path.name.removesuffix(".gguf")).lstrip(".-") or "model"
    with contextlib.suppress(OSError, ConfigError):
        if path.is_relative_to((data_folder() / "models").resolve()):
            return None
        folder = data_folder() / "names"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(1, MOST_NAMES):
            name = stem if number == 1 else f"{stem}-{number}"
            if name in names and not os.path.exists(names[name]):  # noqa: PTH110 - Path.exists may raise
                forget_name(name)
            with contextlib.suppress(FileExistsError):
                (folder / name).symlink_to(path)
                return name
    return None


def forget_name(name: str) -> None:
    """Remove the name of a converted or linked model, and the time of the last use of any model."""
    with contextlib.suppress(OSError):
        (data_folder() / "names" / name).unlink()
    with contextlib.suppress(OSError):
        _stamp(name).unlink()


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
