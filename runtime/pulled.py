"""Models that were pulled: where they are, and by which names a person calls them.

``$XDG_DATA_HOME/moetier/models`` (XDG Base Directory Specification 0.8) has ORG--NAME/TAG for the hub's ORG/NAME, which
is called ORG/NAME:TAG. A hub's id has no "--" in it.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from pathlib import Path

from moetier.tiers.errors import ConfigError, StoreFormatError
from moetier.tiers.layout import Bits

GROUP = "experts.zarr"  # as tiers/shard.py, which imports numpy, has it: a daemon resolves names before that
NAME = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<tag>[\w.-]+))?")
WIDTH = re.compile(r"(\d+)bit(?:-trunk(\d+)bit)?")


def models_folder() -> Path:
    """Return the folder of all pulled models. Raises ConfigError for a user without a home."""
    folder = Path(os.environ.get("XDG_DATA_HOME", ""))
    if not folder.is_absolute():  # which is to be ignored
        try:
            folder = Path.home() / ".local" / "share"
        except RuntimeError:
            raise ConfigError("There is no home folder to keep models in.", "Set XDG_DATA_HOME to a folder.") from None
    return folder / "moetier" / "models"


def tag_of(bits: Bits, trunk_bits: Bits) -> str:
    """Return the tag of a pulled model: ``4bit``, or ``4bit-trunk8bit`` if its trunk is quantised too."""
    return f"{bits}bit" + (f"-trunk{trunk_bits}bit" if trunk_bits != 16 else "")


def place_of(hub_id: str, tag: str) -> Path:
    """Return the folder that a model is pulled to."""
    return models_folder() / hub_id.replace("/", "--") / tag


def pulled() -> dict[str, Path]:
    """Return the models that are there, whole or in part, by name. A folder that no pull would name so is left out."""
    found = sorted(path for path in models_folder().glob("*/*") if (path / GROUP).is_dir())
    named = {f"{path.parent.name.replace('--', '/')}:{path.name}": path for path in found}
    return {name: path for name, path in named.items() if NAME.fullmatch(name)}


def model_directory(name: str | os.PathLike[str]) -> Path:
    """Return the folder ``name`` if it exists, else that of the pulled model; the tag of an only one may be left out.

    A text that can be no name is taken for a folder. Raises StoreFormatError for a name that no model has.
    """
    text, folder = os.fspath(name), Path(name)
    if not may_be_name(text) or folder.exists():
        return folder
    if (found := _named(text)) is None:
        raise StoreFormatError(f"There is no folder {folder.absolute()}, and no pulled model {text}.", _advice(text))
    return found[1]


def may_be_name(text: str) -> bool:
    """Return whether a text can be a name; one that begins with a dot or a slash can only be a path."""
    return NAME.fullmatch(text) is not None and not text.startswith(".")


def pulled_model(name: str) -> tuple[str, Path]:
    """Return the name, with its tag, and the folder of a pulled model. Raises StoreFormatError."""
    if (found := _named(name)) is None:
        raise StoreFormatError(f"There is no pulled model {name}.", "moetier list says what there is.")
    return found


def _named(name: str) -> tuple[str, Path] | None:
    """Return a model's full name and its folder, if it is there. Raises StoreFormatError for a name of several."""
    there = pulled()
    if name in there:
        return name, there[name]
    widths = [each for each in there if each.rpartition(":")[0] == name]
    if len(widths) == 1:
        return widths[0], there[widths[0]]
    if widths:
        raise StoreFormatError(f"{name} was pulled more than once.", f"Say which: {' or '.join(widths)}.")
    return None


def checkpoint_or_model(source: str) -> str:
    """Resolve the source of a command that takes the hub's ids: only a name with its tag is a pulled model there."""
    return str(model_directory(source)) if ":" in source else source


def name_of(folder: Path) -> str:
    """Return the name under which a model directory was pulled, or else that of its folder."""
    real = folder.resolve()
    names = [name for name, path in pulled().items() if path.resolve() == real]
    return names[0] if names else real.name


def _advice(name: str) -> str:
    there = list(pulled())
    ids = dict.fromkeys(each.rpartition(":")[0] for each in there)
    near = difflib.get_close_matches(name, [*there, *ids], n=3)
    ways = [f"`moetier list` has {', '.join(near)}"] if near else []
    if "/" in name:
        ways.append(f"pull it: moetier pull {shlex.join(pulling(name))}")
    if not ways:
        ways.append("check the name: moetier list shows pulled models, and moetier convert makes model directories")
    said = "; or ".join(ways)
    return said if near else f"{said[0].upper()}{said[1:]}"


def pulling(name: str) -> list[str]:
    """Return the words after ``moetier pull`` that give a model this name."""
    parts = NAME.fullmatch(name)
    assert parts is not None
    words, width = [parts["id"]], WIDTH.fullmatch(parts["tag"] or "")
    if width is not None:
        words += ["--bits", width[1]] + (["--trunk-bits", width[2]] if width[2] else [])
    return words
