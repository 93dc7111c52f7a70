"""Read and check the folder of a store: its manifest and the metadata of its arrays."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

from moetier.tiers.errors import IncompleteStoreError, StoreError, StoreFormatError
from moetier.tiers.fields import Fields
from moetier.tiers.manifest import Manifest

from .atomic import read_errors
from .shard import ShardFile

GROUP = "experts.zarr"  # the store's folder in a model directory
METADATA = "zarr.json"  # metadata of the group, which holds the manifest and is written last, and of each array
PLAN = "plan.json"  # the plan of an unfinished conversion (``Manifest.plan``)
JOURNAL = "conversion.json"  # beside the store during a conversion: its state, and the command that resumes it
ORIGIN = "origin.json"  # beside a store whose source is on the Hugging Face hub: the source's id and commit
MIRRORS = "mirrors.json"  # beside a store: the folders of its mirrors
MAX_JSON_BYTES = 2 << 20  # largest JSON file or header that is read: ten times the largest known one
MAX_LEVELS = 100  # deepest nesting of JSON values


def command(name: str, *arguments: str | Path) -> str:
    """Format the command line ``moetier NAME ARGUMENTS``, quoted for a shell."""
    return shlex.join(["moetier", name, *map(str, arguments)])


def store_folder(folder: Path) -> Path:
    """Return the folder ``experts.zarr``, given it or its model directory. Raises StoreFormatError for any other."""
    if (folder / GROUP).is_dir():
        return folder / GROUP
    if folder.name == GROUP and folder.is_dir():
        return folder
    if not folder.exists():
        raise StoreFormatError(
            f"There is no folder {folder.absolute()}.", f"Convert a model: {command('convert', 'SRC', folder)}"
        )
    if not folder.is_dir():
        raise StoreFormatError(f"{folder} is not a folder.", "Name the model directory that it is in.")
    if (folder / "config.json").exists():
        raise StoreFormatError(
            f"{folder} is not a model directory: it is a checkpoint, which is not converted.",
            f"Convert it: {command('convert', folder, 'DST')}",
        )
    raise StoreFormatError(
        f"{folder} is not a model directory: it has no experts.zarr.",
        f"Convert a model into it: {command('convert', 'SRC', folder)}",
    )


def check_directory(folder: Path) -> None:
    """Raise StoreFormatError if ``folder`` is a store itself. Its model directory is expected."""
    if folder.name == GROUP and folder.is_dir():
        raise StoreFormatError(
            f"{folder} holds the experts of a model directory, and not the model.", f"Give its folder: {folder.parent}"
        )


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the store in ``folder``, an ``experts.zarr``.

    Raises IncompleteStoreError if the store's conversion was interrupted, StoreFormatError or StoreReadError.
    """
    path = folder / METADATA
    if not path.exists():
        raise _incomplete(folder)
    group = read_json(path)
    attributes = group.get("attributes")
    manifest = Manifest.from_json(
        attributes.get("moetier") if isinstance(attributes, dict) else None, str(folder.parent)
    )
    _compare(path, group, {"zarr_format": 3, "node_type": "group"})
    if not manifest.digest:
        raise StoreFormatError(f"{path}: its manifest has no digest.", "Convert the model again.")
    return manifest


def read_plan(folder: Path) -> Manifest | None:
    """Read the plan (``Manifest.plan``) of a finished or unfinished store; None if there is none. Raises StoreError."""
    if (folder / METADATA).exists():
        return read_manifest(folder).plan
    if (folder / PLAN).exists():
        return Manifest.from_json(read_json(folder / PLAN), str(folder.parent))
    return None


def read_origin(folder: Path) -> dict[str, str]:
    """Read which hub ``id`` and ``revision`` (a commit) a model directory was made from; {} if that is not known."""
    try:
        found = Fields(read_json(folder / ORIGIN))
        return {name: found[name].text() for name in ("id", "revision")}
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
    there = sum(ShardFile.of(folder, plan, block).path.exists() for block in blocks)
    return IncompleteStoreError(
        f"{target} is incomplete: its conversion was cut; {there} of {len(blocks)} blocks are there.",
        f"Resume it: {resuming(target, plan)}",
    )


def resuming(target: Path, plan: Manifest) -> str:
    """Format the command that resumes the conversion into ``target``, as the converter has saved it there."""
    try:
        return shlex.join(word.text() for word in Fields(read_json(target / JOURNAL))["command"].items())
    except (StoreError, ValueError):
        return command("convert", plan.model, target)


def read_json(path: Path, fix: str = "Convert the model again.") -> dict[str, Any]:
    """Read a JSON object from a file of an untrusted model directory. Raises StoreFormatError or StoreReadError.

    ``fix`` is the advice in a StoreFormatError.
    """
    try:
        with read_errors(path), path.open("rb") as stream:
            data = stream.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise StoreFormatError(f"{path} is missing.", fix) from None
    if len(data) > MAX_JSON_BYTES:
        raise StoreFormatError(
            f"{path} has {path.stat().st_size:,} bytes; what moetier writes has at most {MAX_JSON_BYTES:,}.", fix
        )
    return parse_json(data, str(path), fix)


def parse_json(data: bytes, where: str, fix: str) -> dict[str, Any]:
    """Parse a JSON object of at most ``MAX_JSON_BYTES``. Raises StoreFormatError with ``where`` and ``fix`` in it."""
    try:
        found = json.loads(data, parse_int=_whole)
        deep = _is_deep(found)
    except ValueError as error:
        raise StoreFormatError(f"{where} is not JSON ({error}).", fix) from error
    except RecursionError:
        deep = True
    if deep:
        raise StoreFormatError(f"{where} has values that are nested in more than {MAX_LEVELS} levels.", fix)
    if not isinstance(found, dict):
        raise StoreFormatError(f"{where} is not a JSON object.", fix)
    return found


def _is_deep(value: object) -> bool:
    """Return whether a value has more than MAX_LEVELS levels. A recursive check could overflow the stack."""
    level: list[Any] = [[value]]
    for _ in range(MAX_LEVELS + 2):
        if not level:
            return False
        containers = (each.values() if isinstance(each, dict) else each for each in level)
        level = [inner for each in containers for inner in each if isinstance(inner, dict | list)]
    return bool(level)


def _whole(digits: str) -> float:
    """Parse an integer. If it has too many digits for Python to convert, return infinity, which no field accepts."""
    return int(digits) if len(digits) < 100 else math.inf


def check_array(path: Path, manifest: Manifest, array: str) -> None:
    """Raise StoreFormatError unless the zarr metadata of an array agrees with the manifest."""
    found = read_json(path)
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
    if "storage_transformers" in found:
        expected["storage_transformers"] = []
    _compare(path, found, expected)


def _compare(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        try:
            Fields(found)[name].equals(value, "which the manifest says")
        except ValueError as error:
            raise StoreFormatError(f"{path}: {error}.", "Convert the model again.") from error
