"""``moetier list``: list the models that have names: pulled, converted and linked ones."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.tools.cli.failure import plain
from moetier.tools.cli.parser import add_json

if TYPE_CHECKING:
    from moetier.tiers.manifest import Manifest

EXAMPLES = ("moetier list", "moetier list --json")
LOOKS = 3
HEAD = ["name", "type", "bits", "trunk", "size", "experts", "made", "last use"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier list`."""
    add_json(parser, "one JSON array")


def run(arguments: argparse.Namespace) -> None:
    """Print the models."""
    from moetier.runtime.model.name_files import last_use, registered
    from moetier.runtime.model.names import pulled

    models = []
    for look, named in ((_pulled, pulled()), (_registered, registered())):
        for name, path in named.items():
            if (found := _looked_at(look, name, path)) is not None:
                models.append({"name": name, "folder": str(path), **found, "used_unix": last_use(name)})
    text = _text(models) if models else "No models yet. Try: moetier demo, or moetier pull ORG/NAME"
    print(json.dumps(models, indent=2) if arguments.json else text)


def _looked_at(look: Callable[[str, Path], dict[str, Any]], name: str, path: Path) -> dict[str, Any] | None:
    """Return the description of a model that ``look`` returns.

    If the model can't be read, describe the error; if it was removed meanwhile, return None.
    """
    for _ in range(LOOKS):  # again if a conversion that ends, or a removal, deletes a file between two reads
        try:
            return look(name, path)
        except FileNotFoundError:
            continue
        except OSError as error:
            return _description(None, 0, None) | {"complete": False, "error": error.strerror or str(error)}
    return None


def _pulled(name: str, folder: Path) -> dict[str, Any]:
    from moetier.runtime.model.names import pulling

    return _converted(folder, pulling(name)) | {"origin": "pulled"}


def _registered(name: str, path: Path) -> dict[str, Any]:
    """Return a description of a converted or linked model as JSON. ``origin`` is None if the model is gone."""
    from moetier.tiers.store.folder import GROUP

    try:
        path.stat()
    except FileNotFoundError:
        return _description(None, 0, None) | {"complete": False}
    # (path / GROUP).is_dir() is False, from Python 3.14 on, for a folder that can't be read; this raises OSError
    if path.is_dir() and path / GROUP in path.iterdir():
        return _converted(path, None) | {"origin": "converted"}
    return _linked(path) | {"origin": "linked"}


def _linked(path: Path) -> dict[str, Any]:
    """Return a description of a checkpoint that is used as it is, from the table that `moetier link` made."""
    from moetier.tiers.errors import StoreError
    from moetier.tiers.extents.table import cached, read_table, table_path
    from moetier.tiers.store.folder import command

    table = None
    with contextlib.suppress(StoreError):
        table = read_table(path)
    if table is None:
        return _description(path, 0, None) | {"resume": command("link", path), "complete": False}
    nbytes = sum(shard.bytes for shard in table.shards)
    made = next((where.stat().st_mtime for where in (cached(path), table_path(path)) if where.exists()), None)
    return _description(path, nbytes, table.manifest) | {"pulled_unix": made}


def _converted(folder: Path, pulling: list[str] | None) -> dict[str, Any]:
    """Return a description of a model directory as JSON.

    It is from the model's manifest or, if the model is incomplete, from the plan of the conversion. The value of
    ``resume`` is None for a complete model. Otherwise it is the command that completes the model, or replaces it if the
    plan can't be read. ``pulling``: the arguments with which the model was pulled, if it was.
    """
    from moetier.tiers.errors import StoreError
    from moetier.tiers.manifest import Manifest
    from moetier.tiers.store.folder import (
        GROUP,
        METADATA,
        PLAN,
        command,
        read_json,
        read_manifest,
        read_origin,
        resuming,
    )
    from moetier.tiers.store.mirror import read_mirrors
    from moetier.tools.convert.model_files import disk_bytes

    store, resume = folder / GROUP, None
    mirrors: list[Path] = []
    with contextlib.suppress(StoreError):
        mirrors = read_mirrors(folder)
    last = next((path for path in (store / METADATA, store / PLAN) if path.exists()), store)
    manifest: Manifest | None = None
    try:
        if last.name == PLAN:
            manifest = Manifest.from_json(read_json(last), str(folder))
            resume = resuming(folder, manifest)
        else:
            manifest = read_manifest(store)
    except StoreError:
        again = ("pull", *pulling) if pulling else ("convert", "SRC", folder)
        resume = command(*map(str, again), "--overwrite")
    return _description(folder, disk_bytes(folder), manifest) | {  # with the bytes of an incomplete download
        "pulled_unix": last.stat().st_mtime,  # time when the model was completed, or last worked on
        "revision": read_origin(folder).get("revision"),
        "mirrors": [*map(str, mirrors)],
        "resume": resume,
        "complete": resume is None,
    }


def _description(path: Path | None, nbytes: int, manifest: Manifest | None) -> dict[str, Any]:
    return {
        "origin": None,
        "type": None if path is None else _type_of(path),
        "bits": None if manifest is None else manifest.bits,
        "trunk_bits": None if manifest is None else manifest.trunk_bits,
        "blocks": None if manifest is None else len(manifest.blocks),
        "experts": None if manifest is None else manifest.record_count,
        "bytes": nbytes,
        "pulled_unix": None,
        "revision": None,
        "mirrors": [],
        "resume": None,
        "complete": True,
        "error": None,
    }


def _type_of(path: Path) -> str | None:
    """Return the type of a model by its config.json, such as "mixtral"; "GGUF" for a GGUF file; None if unknown."""
    from moetier.tiers.errors import StoreError
    from moetier.tiers.store.folder import read_json

    if path.is_file():
        return "GGUF"
    try:
        model_type = read_json(path / "config.json").get("model_type")
    except StoreError:
        return None
    return model_type if isinstance(model_type, str) else None


def _text(models: list[dict[str, Any]]) -> str:
    from moetier.tiers.text import format_bytes
    from moetier.tools.cli.report import table

    rows, states = [HEAD], ["from"]
    for model in models:
        states.append(_state(model))
        blocks, experts = model["blocks"], model["experts"]
        rows.append(
            [
                model["name"],
                plain(model["type"] or "?"),
                str(model["bits"] or "?"),
                str(model["trunk_bits"] or "?"),
                format_bytes(model["bytes"]),
                "?" if experts is None else f"{blocks} x {experts // (blocks or 1)}",
                _time(model["pulled_unix"], "?"),
                _time(model["used_unix"], "never"),
            ]
        )
    return "\n".join(f"{row}  {state}".rstrip() for row, state in zip(table(rows).split("\n"), states, strict=True))


def _time(seconds: float | None, none: str) -> str:
    return none if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _state(model: dict[str, Any]) -> str:
    """Return where a model is from, and what is missing, as text."""
    if model["error"]:
        return f"{plain(model['folder'])} can't be read ({model['error']})"
    if model["origin"] is None:
        return f"{plain(model['folder'])} is gone: moetier rm {model['name']} forgets it"
    if not model["complete"]:
        does = (
            "makes its checksums" if model["origin"] == "linked" else "resumes it" if model["bits"] else "replaces it"
        )
        return f"incomplete: {plain(model['resume'])} {does}"
    place = "" if model["origin"] == "pulled" else f" in {plain(model['folder'])}"
    return ", ".join([f"{model['origin']}{place}", *(f"mirror {plain(path)}" for path in model["mirrors"])])
