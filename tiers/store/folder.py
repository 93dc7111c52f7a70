"""Find the folder of a store, and read and check its JSON files: the manifest and the metadata of its zarr arrays.

A folder with the file CACHE is the cache of a model in an object store (``tiers.objects``). Until it has all records,
its manifest has the name FETCHED, so that it is not taken for a complete store.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from pathlib import Path
from typing import Any

from moetier.tiers.errors import IncompleteStoreError, NotFoundError, StoreError, StoreFormatError, TargetError
from moetier.tiers.fields import Fields
from moetier.tiers.manifest import Manifest

from .atomic import PARTIAL, read_errors
from .shard import ShardFile

GROUP = "experts.zarr"  # name of the store's folder in a model directory
METADATA = "zarr.json"  # zarr's metadata of the group, which has the manifest and is written last, and of each array
PLAN = "plan.json"  # in the store until the conversion ends: the plan (``Manifest.plan``)
JOURNAL = "conversion.json"  # in the model directory until the conversion ends: its state, and how to resume it
ORIGIN = "origin.json"  # in the model directory, if the checkpoint is from the Hugging Face hub: its id and commit
MIRRORS = "mirrors.json"  # in the model directory: the folders of the mirrors
CACHE = "store-cache.json"  # in a cache of a model in an object store: the model's address, and the cache's limit
BELOW_HOME = {"CACHE": ".cache", "DATA": ".local/share", "STATE": ".local/state"}  # the user's folders
NEW = "~new"  # suffix of the folder beside a model directory in which the model is made that will replace it
REPLACED = "replaced~"  # in a model directory that has just replaced another: the folder of the old one
FETCHED = METADATA + PARTIAL  # in a cache: the manifest until all records are there
MAX_JSON_BYTES = 2 << 20  # size of the largest JSON file or header that is read: ten times the largest known one
MAX_LEVELS = 100  # deepest nesting of JSON values that is accepted


def command(name: str, *arguments: str | Path) -> str:
    """Return the command line ``moetier NAME ARGUMENTS``, quoted for a shell."""
    return shlex.join(["moetier", name, *map(str, arguments)])


def replacement_folder(folder: Path) -> Path:
    """Return the folder for a new model, which is made there and then replaces that in ``folder``."""
    place = folder.resolve()
    return place.parent / f"{place.name}{NEW}"


def has_store(folder: Path) -> bool:
    """Return whether ``folder`` is the folder ``experts.zarr`` of a store, or a model directory that has one."""
    return (folder / GROUP).is_dir() or (folder.name == GROUP and folder.is_dir())


def store_folder(folder: Path, purpose: str = "") -> Path:
    """Return the store's folder ``experts.zarr``. ``folder`` is that folder itself, or the model directory.

    ``purpose``: what only such a store can be, such as "mirrored", for the error of a directory with another store.
    Raises NotFoundError if there is no ``folder``, and StoreFormatError if it is neither.
    """
    if has_store(folder):
        return folder / GROUP if (folder / GROUP).is_dir() else folder
    if not folder.exists():
        if folder.suffix == ".gguf":
            raise NotFoundError(f"There is no file {folder.absolute()}.", "Check the path of the GGUF file.")
        if (new := replacement_folder(folder)).joinpath(REPLACED, GROUP).exists():
            raise NotFoundError(
                f"There is no folder {folder.absolute()}: its replacement was interrupted.",
                f"Put the new model in its place: {shlex.join(['mv', str(new), str(folder.resolve())])}",
            )
        raise NotFoundError(
            f"There is no folder {folder.absolute()}.", f"Convert a model: {command('convert', 'SRC', folder)}"
        )
    if not folder.is_dir():
        raise StoreFormatError(f"{folder} is not a folder.", "Give a model directory.")
    if any(folder.glob("trunk-*.safetensors")):  # files of a conversion
        raise StoreFormatError(
            f"{folder} has no {GROUP}{purpose and f', and only such stores can be {purpose}'}.",
            "If that folder was lost, restore it, or remove the directory and convert the model again.",
        )
    if (folder / "config.json").exists():
        raise StoreFormatError(
            f"{folder} is a checkpoint, and not a model directory.", f"Convert it: {command('convert', folder, 'DST')}"
        )
    raise StoreFormatError(
        f"{folder} is not a model directory: it has no experts.zarr.",
        "Give one that has config.json and experts.zarr: moetier pull ORG/NAME, or moetier convert SRC DST, makes it.",
    )


def check_directory(folder: Path) -> None:
    """Raise StoreFormatError if ``folder`` is a store, and not the model directory that has the store."""
    if folder.name == GROUP and folder.is_dir():
        raise StoreFormatError(
            f"{folder} has only the experts of a model.", f"Give the model directory: {folder.parent}"
        )


def is_cache(folder: Path) -> bool:
    """Return whether a store is the cache of a model in an object store, and lacks records.

    ``folder`` is the folder ``experts.zarr``.
    """
    return (folder.parent / CACHE).exists() and not (folder / METADATA).exists()


def user_folder(kind: str) -> Path | None:
    """Return ``moetier`` in ``$XDG_CACHE_HOME`` or the like (XDG Base Directory Specification 0.8).

    ``kind`` is a key of BELOW_HOME. Returns None if the variable names no folder and the user has no home folder.
    """
    folder = Path(os.environ.get(f"XDG_{kind}_HOME", ""))
    if not folder.is_absolute():  # the specification says to ignore such a value
        try:
            folder = Path.home() / BELOW_HOME[kind]
        except RuntimeError:
            return None
    return folder / "moetier"


def user_cache(name: str) -> Path:
    """Return the path ``name`` in ``$XDG_CACHE_HOME/moetier``.

    Raises TargetError if the user has no home folder.
    """
    if (folder := user_folder("CACHE")) is None:
        raise TargetError("There is no home folder for a cache.", "Set XDG_CACHE_HOME to a folder.")
    return folder / name


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a store, or of a cache of one. ``folder`` is the folder ``experts.zarr``.

    Raises:
        IncompleteStoreError: the conversion was interrupted.
        StoreFormatError: the folder is not a store that this version can read.
        StoreReadError: the system reported an error when the manifest was read.
    """
    path = folder / (FETCHED if is_cache(folder) else METADATA)
    if not path.exists():
        path = folder / METADATA  # another process has just completed the cache
    if not path.exists():
        raise _incomplete(folder)
    group = read_json(path)
    attributes = group.get("attributes")
    if not isinstance(attributes, dict) or "moetier" not in attributes:
        raise StoreFormatError(
            f"{folder.parent} is not a moetier store: {path} has no attributes.moetier.", "Convert the model again."
        )
    manifest = Manifest.from_json(attributes["moetier"], str(folder.parent))
    _compare(path, group, {"zarr_format": 3, "node_type": "group"})
    if not manifest.digest:
        raise StoreFormatError(f"The manifest in {path} has no digest.", remaking(path))
    return manifest


def read_plan(folder: Path) -> Manifest | None:
    """Read the plan (``Manifest.plan``) of a finished or unfinished store. Return None if the folder has no plan.

    Raises StoreError if the manifest or the plan can't be read.
    """
    if (folder / METADATA).exists():
        return read_manifest(folder).plan
    if (folder / PLAN).exists():
        return Manifest.from_json(read_json(folder / PLAN), str(folder.parent))
    return None


def read_origin(folder: Path) -> dict[str, str]:
    """Return the ``id`` and ``revision`` (a commit) on the hub of the checkpoint from which a model directory was made.

    The result is a dictionary with these two names. It is empty if they are not known.
    """
    try:
        fields = Fields(read_json(folder / ORIGIN))
        return {name: fields[name].text() for name in ("id", "revision")}
    except (StoreError, ValueError):
        return {}


def _incomplete(folder: Path) -> IncompleteStoreError:
    target, plan = folder.parent, read_plan(folder)
    if plan is None:
        return IncompleteStoreError(
            f"{target} is incomplete: {folder} has no manifest.",
            f"Convert the model again: {command('convert', 'SRC', target)}",
        )
    blocks = range(len(plan.blocks))
    complete = sum(ShardFile.of(folder, plan, block).path.exists() for block in blocks)
    return IncompleteStoreError(
        f"{target} is incomplete: its conversion was interrupted; {complete} of {len(blocks)} blocks are done.",
        f"Resume it: {resuming(target, plan)}",
    )


def resuming(target: Path, plan: Manifest) -> str:
    """Return the command that resumes the conversion into ``target``. The converter has saved it in that folder."""
    try:
        return shlex.join(word.text() for word in Fields(read_json(target / JOURNAL))["command"].items())
    except (StoreError, ValueError):
        return command("convert", plan.model, target)


def remaking(path: Path, otherwise: str = "Convert the model again.") -> str:
    """Return what to do about a damaged file: if it is in a cache, fetch the model again; else ``otherwise``."""
    for folder in list(path.parents)[:3]:
        if (folder / CACHE).exists():
            return f"Remove the folder {folder}, and give the address of the model again."
    return otherwise


def read_json(path: Path, fix: str = "") -> dict[str, Any]:
    """Return the JSON object in a file of a model directory, which is not trusted.

    Raises:
        StoreFormatError: the file is missing, too large, or not a JSON object. The error has this ``fix``,
            or ``remaking``.
        StoreReadError: the system reported an error when the file was read.
    """
    fix = fix or remaking(path)
    try:
        with read_errors(path), path.open("rb") as stream:
            data = stream.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise StoreFormatError(f"{path} is missing.", fix) from None
    return parse_json(data, str(path), fix)


def parse_json(data: bytes, where: str, fix: str, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Parse a JSON object of at most ``limit`` bytes. A caller that reads a file reads one byte more at most.

    Raises StoreFormatError if ``data`` is larger, not a JSON object, or nested too deeply. The error begins with
    ``where``, the name of the data, and has this ``fix``.
    """
    if len(data) > limit:
        raise StoreFormatError(f"{where} has more than {limit:,} bytes, the most that moetier writes.", fix)
    try:
        value = json.loads(data, parse_int=_whole)
        deep = is_deep(value)
    except ValueError as error:
        raise StoreFormatError(f"{where} is not JSON ({error}).", fix) from error
    except RecursionError:
        deep = True
    if deep:
        raise StoreFormatError(f"{where} has values that are nested in more than {MAX_LEVELS} levels.", fix)
    if not isinstance(value, dict):
        raise StoreFormatError(f"{where} is not a JSON object.", fix)
    return value


def is_deep(value: object) -> bool:
    """Return whether a value has more than MAX_LEVELS levels. A recursive function could overflow the stack."""
    level: list[Any] = [[value]]
    for _ in range(MAX_LEVELS + 2):
        if not level:
            return False
        containers = (container.values() if isinstance(container, dict) else container for container in level)
        level = [inner for container in containers for inner in container if isinstance(inner, dict | list)]
    return bool(level)


def _whole(digits: str) -> float:
    """Parse an integer. If it has 100 digits or more, return infinity, which no field accepts."""
    return int(digits) if len(digits) < 100 else math.inf


def check_array(path: Path, manifest: Manifest, array: str) -> None:
    """Raise StoreFormatError unless zarr's metadata of ``array``, in the file ``path``, agree with the manifest.

    Raises StoreReadError if the system reports an error when the file is read.
    """
    metadata = read_json(path)
    shape = manifest.shape(array)
    inner, outer = [1, 1, shape[2]], [1, shape[1], shape[2]]
    expected = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": inner,
                    "codecs": [{"name": "bytes"}, {"name": "crc32c"}],
                    "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
                    "index_location": "end",
                },
            }
        ],
    }
    if "storage_transformers" in metadata:
        expected["storage_transformers"] = []
    _compare(path, metadata, expected)


def _compare(path: Path, metadata: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        try:
            Fields(metadata)[name].equals(value, "the file does not match the manifest")
        except ValueError as error:
            raise StoreFormatError(f"{path}: {error}.", remaking(path)) from error
