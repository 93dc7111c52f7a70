"""Names of the models that a server can load, and where they are."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from moetier.runtime.model.name_files import real_path
from moetier.runtime.model.names import listed_names
from moetier.tiers.errors import ConfigError

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
    """Names and paths of models: those that were given, and those that are in given folders at the moment.

    A model's name is the one that ``moetier list`` shows; if it has none, or the folder of another of the models is
    called so, it is that of its folder. A path keeps its name.
    """

    def __init__(self, places: Sequence[Path], *, name: str | None = None, aliases: Mapping[str, str] | None = None):
        """Use the models and folders of models ``places``.

        Args:
            places: their paths.
            name: name of the model if it is the only one; None: as for the others.
            aliases: names of models, or of their folders, by further names.

        Raises ConfigError if a name is used twice or is not printable, or an alias is of no model.
        """
        self._folders = [place for place in places if is_folder_of_models(place)]
        self._given = [place for place in places if place not in self._folders]
        self.has_one = len(self._given) == len(places) == 1
        if name is not None and not self.has_one:
            raise ConfigError("--name names one model, and there are several.", "Give --alias NAME=MODEL.")
        self._models = dict[str, Path]() if name is None else {name: places[0]}
        self._models, self._by_folder = self._looked_up()
        self.aliases = dict[str, str]()
        further = {alias: (model, self.find(model)) for alias, model in (aliases or {}).items()}
        for alias, (asked, found) in further.items():
            if found is None:
                known = ", ".join(self._models)
                raise ConfigError(f"--alias {alias}: there is no model {asked!r}.", f"Give one of {known}.")
            if alias in self._models:
                raise ConfigError(f"--alias {alias}: a model has this name.", "Give another name.")
            self.aliases[alias] = found

    def _looked_up(self) -> tuple[dict[str, Path], dict[str, set[str]]]:
        """Return the paths of all models by name, and the names of the models by those of their folders."""
        paths, by_folder = dict[Path, Path](), dict[str, list[Path]]()  # real paths have one entry each
        given = [(real_path(path).name, path) for path in self._given]
        for own, path in [*given, *(found for folder in self._folders for found in models_in(folder))]:
            paths.setdefault(real := real_path(path), path)
            by_folder.setdefault(own, []).append(real)
        kept = {real_path(path): (name, path) for name, path in self._models.items()}
        names, models, listed = dict[Path, str](), dict[str, Path](), listed_names()
        for real in paths.keys() & kept.keys():
            names[real], paths[real] = kept[real]
        for own, reals in by_folder.items():
            for real in reals:
                name = listed.get(real, own)
                names.setdefault(real, own if {*by_folder.get(name, ())} - {real} else name)
        for real, path in paths.items():
            _add(models, names[real], path)
        return models, {own: {names[real] for real in reals} for own, reals in by_folder.items()}

    def models(self) -> dict[str, Path]:
        """Return the path of each model by its name, as the folders are now."""
        with contextlib.suppress(OSError, ConfigError):  # a folder is gone, or a name is there twice
            self._models, self._by_folder = self._looked_up()
        return self._models

    def aliases_of(self, name: str) -> list[str]:
        """Return the further names of a model."""
        return [alias for alias, model in self.aliases.items() if model == name]

    def find(self, asked: str) -> str | None:
        """Return the name of the model that a request calls ``asked``; None if there is none.

        That is a model's name or alias, or else the name of one model's folder. The tag of a name may be left out if
        there is one model with this name.
        """
        asked = self.aliases.get(asked, asked)
        if asked in self._models or (asked not in self._by_folder and asked in self.models()):
            return asked
        names = [*((name, {name}) for name in self._models), *self._by_folder.items()]
        untagged = [models for name, models in names if asked and asked == name.rpartition(":")[0]]
        found = self._by_folder.get(asked) or set().union(*untagged)
        return next(iter(found)) if len(found) == 1 else None


def _add(models: dict[str, Path], name: str, path: Path) -> None:
    if not name or not name.isprintable():
        raise ConfigError(f"{name!r} can't be the name of a model.", "Give a printable name: --name NAME.")
    if (other := models.setdefault(name, path)) is not path:
        raise ConfigError(f"Two models are called {name}: {other} and {path}.", "Rename the folder of one of them.")
