"""Names of models, and addresses in object stores. Each is resolved to a folder, or to a GGUF file.

``moetier pull`` converts the hub's model ORG/NAME to a model directory: the folder ORG--NAME/TAG in
``$XDG_DATA_HOME/moetier/models`` (XDG Base Directory Specification 0.8). The name of the pulled model is ORG/NAME:TAG.
An id on the hub never contains "--". Converted and linked models have names without a tag (``name_files``).
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moetier.tiers.addresses import ADDRESS, check_address
from moetier.tiers.errors import ConfigError, NotFoundError, StoreFormatError
from moetier.tiers.layout import Bits
from moetier.tiers.redaction import redacted

from .name_files import data_folder, note_use, real_path, registered

if TYPE_CHECKING:
    from moetier.tiers.objects.cache_folder import Progress

GROUP = "experts.zarr"  # repeated from tiers/store/folder.py, as a daemon resolves names before it imports numpy
NAME = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<tag>[\w.-]+))?")
WIDTH = re.compile(r"(?:(\d+)bit|(native))(?:-trunk(\d+)bit)?")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")  # of an address, be it right or wrong


def models_folder() -> Path:
    """Return the folder of all pulled models. Raises ConfigError if the user has no home folder."""
    return data_folder() / "models"


def tag_of(bits: Bits | Literal["native"], trunk_bits: Bits) -> str:
    """Return the tag of a pulled model: ``4bit`` or ``native``, or ``4bit-trunk8bit`` if its trunk is quantised too."""
    return ("native" if bits == "native" else f"{bits}bit") + (f"-trunk{trunk_bits}bit" if trunk_bits != 16 else "")


def folder_of(hub_id: str, tag: str) -> Path:
    """Return the folder to which the model ``hub_id`` is pulled with the tag ``tag``."""
    return models_folder() / hub_id.replace("/", "--") / tag


def pulled() -> dict[str, Path]:
    """Return a dictionary from the names of all pulled models to their folders. Incomplete models are included.

    Folders that can't be read, or with a name that ``moetier pull`` would not give, are left out.
    """
    folders = sorted(path for path in models_folder().glob("*/*") if os.path.isdir(path / GROUP))  # noqa: PTH112
    named = {f"{path.parent.name.replace('--', '/')}:{path.name}": path for path in folders}
    return {name: path for name, path in named.items() if NAME.fullmatch(name)}


def all_named() -> dict[str, Path]:
    """Return a dictionary from the names of all pulled, converted and linked models to their paths.

    A pulled model may be incomplete; a converted or linked one may be gone.
    """
    return registered() | pulled()


def model_directory(name: str | os.PathLike[str]) -> Path:
    """Return the model directory for ``name``: the folder ``name`` if it exists, else that of the model so called.

    The tag may be left out if the model was pulled with one tag only. A text that can't be a name is taken for the path
    of a folder, which need not exist. An address means the folder that ``directory_at`` returns for it.

    Raises NotFoundError if there is neither such a folder or GGUF file nor such a model, StoreFormatError if
    ``name`` has no tag and the model was pulled with several tags, or if an address is not that of an object store; and
    as ``directory_at``.
    """
    text, folder = os.fspath(name), Path(name)
    if is_address(text):
        return directory_at(text)
    if SCHEME.match(text) and not folder.exists():
        raise StoreFormatError(
            f"{redacted(text.replace(' ', '%20'))} is not an address that moetier knows.",
            "Give s3://BUCKET/NAME, or an address that begins with gs://, az://, https://, http:// or file://.",
        )
    if text.endswith(".gguf") and not folder.exists():
        raise NotFoundError(f"There is no file {folder.absolute()}.", "Check the path of the GGUF file.")
    if not may_be_name(text) or folder.exists():
        return folder
    if (named := _named(text)) is None:
        raise NotFoundError(f"There is no folder {folder.absolute()}, and no model called {text}.", _fix(text))
    if not os.path.exists(named[1]):  # noqa: PTH110 - Path.exists may raise
        raise NotFoundError(
            f"{text} is the model in {named[1]}, which is gone.",
            f"If it was moved, give its path; to forget the name: moetier rm {text}",
        )
    return named[1]


def may_be_name(text: str) -> bool:
    """Return whether a text can be the name of a model. A text that begins with a dot or a slash is a path."""
    return NAME.fullmatch(text) is not None and not text.startswith(".")


def is_address(text: str) -> bool:
    """Return whether a text is the address of a model in an object store, such as s3://bucket/model."""
    return ADDRESS.fullmatch(text) is not None


def directory_at(
    address: str,
    cache: Path | None = None,
    size: str | int | None = None,
    *,
    progress: Progress | None = None,
    outline: bool = False,
) -> Path:
    """Return the model directory of an address: its folder in a cache, to which experts are fetched on demand.

    Args:
        cache: folder of all caches; None: ``$XDG_CACHE_HOME/moetier/objects``.
        size: most bytes of the model's experts in the cache, such as "50GiB"; None: the size given last, or all.
        progress: shows the progress of the trunk's download.
        outline: do without the trunk's weights if they are not in the cache (``tiers.objects.cache_folder.outline``).

    Raises ConfigError if ``size`` is no size, and as ``tiers.objects.cache_folder.fetch``.
    """
    check_address(address)  # before anything is imported
    from moetier.runtime.config import Size
    from moetier.tiers.objects import cache_folder

    limit = None if size is None else Size.parse(size).bytes
    if size is not None and not limit:
        raise ConfigError(f"`store_cache_size` is {size!r}.", 'Give a size, such as "50GiB".')
    if outline:
        return cache_folder.outline(address, cache)
    return cache_folder.fetch(address, cache, limit, *([progress] if progress else []))


def named_model(name: str) -> tuple[str, Path]:
    """Return the full name, with its tag, and the path of a pulled, converted or linked model.

    Raises NotFoundError if there is none, and StoreFormatError if ``name`` has no tag and the model was pulled with
    several tags.
    """
    if (named := _named(name)) is None:
        raise NotFoundError(f"There is no model called {name}.", "Run moetier list to see the names of all models.")
    return named


def _named(name: str) -> tuple[str, Path] | None:
    """Return the full name, with its tag, and the path of a named model; None if there is none.

    Raises StoreFormatError if ``name`` has no tag and the model was pulled with several tags.
    """
    models = all_named()
    if name in models:
        return name, models[name]
    widths = [model for model in models if model.rpartition(":")[0] == name]
    if len(widths) == 1:
        return widths[0], models[widths[0]]
    if widths:
        raise StoreFormatError(f"{name} was pulled with several tags.", f"Give one of them: {' or '.join(widths)}.")
    return None


def checkpoint_or_model(source: str) -> str:
    """Return the path of the model that ``source`` names: with a tag (NAME:TAG), or a converted or linked one.

    Return ``source`` itself if it is no such name. This is for commands that also take an id on the hub, which has no
    tag.
    """
    is_name = ":" in source or source in registered()
    return str(model_directory(source)) if is_name else source


def note_use_of(model: Path) -> None:
    """Note that a model is used now, if it has a name. Does nothing if names can't be read."""
    if (name := listed_name(model)) is not None:
        note_use(name)


def listed_name(model: Path) -> str | None:
    """Return the name by which ``moetier list`` shows the model at a path; None if it has none."""
    return listed_names().get(real_path(model))


def listed_names() -> dict[Path, str]:
    """Return the names by which ``moetier list`` shows models, by their paths without links; none if unreadable."""
    names = dict[Path, str]()
    with contextlib.suppress(OSError, ConfigError):
        for name, path in all_named().items():
            names.setdefault(real_path(path), name)
    return names


def _fix(name: str) -> str:
    names = list(all_named())
    ids = dict.fromkeys(tagged.rpartition(":")[0] for tagged in names if ":" in tagged)
    near = difflib.get_close_matches(name, [*names, *ids], n=3)
    ways = [f"`moetier list` has {', '.join(near)}"] if near else []
    if "/" in name and ":" in name:
        ways.append(f"pull it: moetier pull {shlex.join(pulling(name))}")
    elif "/" in name:
        ways.append(f"run moetier plan {shlex.quote(name)}: its last lines pull and run it")
    if not ways:
        ways.append("check the name: moetier list shows all models, and moetier convert makes model directories")
    said = "; or ".join(ways)
    return said if near else f"{said[0].upper()}{said[1:]}"


def pulling(name: str) -> list[str]:
    """Return the arguments of ``moetier pull`` that pull the model called ``name``."""
    parts = NAME.fullmatch(name)
    assert parts is not None
    words, width = [parts["id"]], WIDTH.fullmatch(parts["tag"] or "")
    if width is not None:
        words += ["--bits", width[1] or width[2]] + (["--trunk-bits", width[3]] if width[3] else [])
    return words
