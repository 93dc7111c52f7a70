"""A store's folder as a reader finds it: its manifest, its arrays' metadata, and what is wrong with them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import IncompleteStoreError, StoreFormatError, StoreReadError
from .manifest import Manifest
from .shard import GROUP, JOURNAL, METADATA, ORIGIN, PLAN, ShardFile


def command(name: str, *arguments: str | Path) -> str:
    """What a person types, quoted for a shell."""
    return shlex.join(["moetier", name, *map(str, arguments)])


def store_folder(folder: Path) -> Path:
    """``experts.zarr`` of a model directory; of itself, itself. Raises StoreFormatError for any other place."""
    if (folder / GROUP).is_dir():
        return folder / GROUP
    if folder.name == GROUP and folder.is_dir():
        return folder
    if not folder.exists():
        raise StoreFormatError(f"There is no folder {folder}.", f"Convert a model: {command('convert', 'SRC', folder)}")
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
    """Raises StoreFormatError for the store in a model directory, where the directory is meant."""
    if folder.name == GROUP and folder.is_dir():
        raise StoreFormatError(
            f"{folder} holds the experts of a model directory, and not the model.", f"Give its folder: {folder.parent}"
        )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an ``experts.zarr``. Raises IncompleteStoreError when its conversion was cut."""
    path = folder / METADATA
    if not path.exists():
        raise _incomplete(folder)
    group = _read_json(path)
    attributes = group.get("attributes")
    return Manifest.from_json(attributes.get("moetier") if isinstance(attributes, dict) else None, str(folder.parent))


def read_origin(folder: Path) -> dict[str, str]:
    """``id`` and ``revision`` (a commit) of a model directory that was made from the hub; {} of another."""
    try:
        found = json.loads((folder / ORIGIN).read_bytes())
        return {name: str(found[name]) for name in ("id", "revision")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _incomplete(folder: Path) -> IncompleteStoreError:
    target = folder.parent
    if not (folder / PLAN).exists():
        return IncompleteStoreError(
            f"{target} is incomplete: {folder} has no manifest.",
            f"Convert the model again: {command('convert', 'SRC', target)}",
        )
    plan = Manifest.from_json(_read_json(folder / PLAN), str(target))
    blocks = range(len(plan.blocks))
    there = sum(ShardFile.of(folder, plan, block).path.exists() for block in blocks)
    return IncompleteStoreError(
        f"{target} is incomplete: its conversion was cut; {there} of {len(blocks)} blocks are there.",
        f"Resume it: {resuming(target, plan)}",
    )


def resuming(target: Path, plan: Manifest) -> str:
    """The command, as the converter noted it, with every option that counts."""
    try:
        return shlex.join(json.loads((target / JOURNAL).read_bytes())["command"])
    except (OSError, ValueError, KeyError, TypeError):
        return command("convert", plan.model, target)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with read_errors(path):
            found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StoreFormatError(f"{path} is missing.", "Convert the model again.") from None
    except ValueError as error:
        raise StoreFormatError(f"{path} is not JSON ({error}).", "Convert the model again.") from error
    if not isinstance(found, dict):
        raise StoreFormatError(f"{path} is not a JSON object.", "Convert the model again.")
    return found


def check_array(path: Path, manifest: Manifest, array: str) -> None:
    """Raises StoreFormatError unless an array's zarr metadata says what the manifest says."""
    found = _read_json(path)
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
    for name, value in expected.items():
        if found.get(name) != value:
            raise StoreFormatError(
                f"{path}: {name} is {json.dumps(found.get(name))}, the manifest says {json.dumps(value)}.",
                "Convert the model again.",
            )


class read_errors:
    """Turns what the disk answers into a StoreReadError with the path; FileNotFoundError passes."""

    __slots__ = ("_path",)

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise StoreReadError(
                f"{self._path} can't be read: {error.strerror} (errno {error.errno}).",
                "Check the disk and the file's permissions; if it is lost, convert the model again.",
            ) from error
