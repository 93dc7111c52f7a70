"""Names of the models that a server can load, and where they are."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from moetier.tiers.errors import ConfigError

from .options import served_name

LATER_PART = re.compile(r"-(?!00001-)\d{5}-of-\d{5}\.gguf")  # of a GGUF file in parts, which the first one names


def is_model(path: Path) -> bool:
    """Return whether a path may be a model: a complete model directory, a checkpoint's folder, or a GGUF file.

    What it holds is checked when it is loaded.
    """
    from moetier.tiers.store.folder import GROUP, METADATA  # not at the top: it imports numpy

    if path.suffix == ".gguf":
        return path.is_file() and LATER_PART.search(path.name) is None
    return (path / "config.json").is_file() and (not (path / GROUP).exists() or (path / GROUP / METADATA).is_file())


def models_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield names and paths of the models in a folder: in ORG--NAME/TAG, as pulled models are, and directly in it."""
    for path in _shown(folder):
        with contextlib.suppress(OSError):  # a folder that can't be read has no models
            if is_model(path):
                yield path.name, path
            elif "--" in path.name and path.is_dir():
                name = path.name.replace("--", "/")
                yield from [(f"{name}:{tagged.name}", tagged) for tagged in _shown(path) if is_model(tagged)]


def _shown(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and path.name.isprintable()]


def is_folder_of_models(path: Path) -> bool:
    """Return whether a path is a folder, is no model, and has models in it."""
    try:
        return path.is_dir() and not is_model(path) and next(models_in(path), None) is not None
    except OSError:
        return False


class Catalogue:
    """Names and paths of models: those that were given, and those that are in given folders at the moment."""

    def __init__(self, places: Sequence[Path], *, name: str | None = None, aliases: Mapping[str, str] | None = None):
        """Use the models and folders of models ``places``.

        Args:
            places: their paths.
            name: name of the model if it is the only one; None: that of its folder, or the pulled model's.
            aliases: names of models by further names.

        Raises ConfigError if a name is used twice, or an alias is of no model.
        """
        self._folders = [place for place in places if is_folder_of_models(place)]
        models = [place for place in places if place not in self._folders]
        self.has_one = len(models) == len(places) == 1
        if name is not None and not self.has_one:
            raise ConfigError("--name names one model, and there are several.", "Give --alias NAME=MODEL.")
        self._given = dict[str, Path]()
        for path in models:
            _add(self._given, served_name(path, name), path)
        self._models = self._looked_up()
        self.aliases = dict(aliases or {})
        for alias, model in self.aliases.items():
            if model not in self._models:
                known = ", ".join(self._models)
                raise ConfigError(f"--alias {alias}: there is no model {model!r}.", f"Give one of {known}.")
            if alias in self._models:
                raise ConfigError(f"--alias {alias}: a model has this name.", "Give another name.")

    def _looked_up(self) -> dict[str, Path]:
        models = dict(self._given)
        for folder in self._folders:
            for name, path in models_in(folder):
                _add(models, name, path)
        return models

    def models(self) -> dict[str, Path]:
        """Return the path of each model by its name, as the folders are now."""
        with contextlib.suppress(OSError, ConfigError):  # a folder is gone, or a name is there twice
            self._models = self._looked_up()
        return self._models

    def aliases_of(self, name: str) -> list[str]:
        """Return the further names of a model."""
        return [alias for alias, model in self.aliases.items() if model == name]

    def find(self, asked: str) -> str | None:
        """Return the name of the model that a request calls ``asked``; None if there is none.

        The tag of a name may be left out if there is one model with this name.
        """
        asked = self.aliases.get(asked, asked)
        if asked in self._models:
            return asked
        tagged = [name for name in self.models() if asked == name or (asked and asked == name.rpartition(":")[0])]
        return tagged[0] if len(tagged) == 1 else None


def _add(models: dict[str, Path], name: str, path: Path) -> None:
    other = models.setdefault(name, path)
    if other is not path and os.path.realpath(other) != os.path.realpath(path):
        raise ConfigError(f"Two models are called {name}: {other} and {path}.", "Rename the folder of one of them.")
