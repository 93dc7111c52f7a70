"""Push a model directory to an object store: shards and trunk first, the manifest last.

Until the end, the manifest has the name PUSH. So a push of the same model can resume: objects of the right size stay,
as an object exists only once its last part has arrived.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from moetier.tiers.errors import MissingExpertError, StoreError, TargetExistsError
from moetier.tiers.manifest import TRUNK_NAME
from moetier.tiers.store.atomic import read_errors
from moetier.tiers.store.checksum import READ_PIECE_BYTES, crc32c
from moetier.tiers.store.folder import (
    GROUP,
    MAX_JSON_BYTES,
    METADATA,
    check_directory,
    parse_json,
    read_json,
    store_folder,
)
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.shard import ShardFile
from moetier.tiers.store.trunk import check_trunk

from .cache_folder import Advance, Progress, parse_manifest
from .client import Objects, RefusedReadError
from .small_files import check_small, is_small

MANIFEST = f"{GROUP}/{METADATA}"
CARD = "README.md"
PUSH = f"{GROUP}/push.json"  # the manifest until all else is there


def push(
    directory: Path,
    address: str,
    progress: Progress,
    *,
    overwrite: bool = False,
    card: bytes | None = None,
    card_mark: bytes | None = None,
) -> int:
    """Copy a model directory to ``address``, and return the number of bytes that were written.

    Args:
        directory: a model directory with all its records.
        address: a URL, such as s3://bucket/model.
        progress: shows the progress.
        overwrite: replace another model that is there, and write all of the same one again. What a former model has
            left is removed, if objects can be listed.
        card: content of CARD, for people. It is written if there is no such object, or if ``overwrite`` is true.
        card_mark: also replace an object CARD that contains this.

    Raises StoreError if the directory can't be read, TargetExistsError if another model is there, or an object CARD
    without ``card_mark``, TargetError if an object can't be written, and ConfigError if the address can't be used.
    """
    check_directory(directory)
    store_folder(directory, "pushed")
    with ShardStore.open(directory) as store, Objects(address, uploads=True) as objects:
        manifest = store.manifest
        if manifest.trunk:
            check_trunk(directory, manifest)
        names = [path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file()]
        small = [f"{GROUP}/{array}/{METADATA}" for array in manifest.layouts] + [*filter(is_small, names)]
        shards = [ShardFile.of(Path(GROUP), manifest, block).path.as_posix() for block in range(len(manifest.blocks))]
        own_names = [*small, *manifest.trunk, *shards]
        data = _with_sums(directory, small)
        listed = objects.sizes()
        if card is not None and not overwrite and not _may_write_card(objects, listed, card_mark):
            card = None
        stored = _begin(objects, listed, data, own_names, overwrite)
        if card is not None:
            objects.put(CARD, card)  # no file of the model: older versions would refuse a manifest that has its sum
        sizes = {name: (directory / name).stat().st_size for name in own_names}
        missing = [name for name in own_names if name in small or stored.get(name) != sizes[name]]
        total = sum(sizes[name] for name in missing)
        with progress(total) as advance:
            for name in missing:
                pieces = _pieces(directory / name, advance)
                objects.put(name, b"".join(pieces) if sizes[name] <= READ_PIECE_BYTES else pieces)
        objects.put(MANIFEST, data)
        objects.delete(PUSH)
        return total


def _may_write_card(objects: Objects, sizes: dict[str, int] | None, mark: bytes | None) -> bool:
    """Return whether CARD is missing, or has ``mark``. Without ``mark``, no object is read.

    Raises TargetExistsError if the object lacks ``mark``, and StoreError if it can't be read.
    """
    is_missing = sizes is not None and CARD not in sizes
    if mark is None or is_missing:
        return is_missing
    try:
        if mark in objects.read_whole(CARD, MAX_JSON_BYTES):
            return True
    except MissingExpertError:
        return True
    raise TargetExistsError(
        f"{objects.where} has a {CARD} that moetier did not write.",
        "Leave out --quality, or replace the file and the model: moetier push --overwrite DIR ADDRESS",
    )


def _with_sums(directory: Path, small: Iterable[str]) -> bytes:
    """Return the manifest's file with the sums of small files, which ``fetch`` compares.

    Raises StoreError if a file can't be read, or if ``fetch`` would refuse the manifest.
    """
    sums = {}
    for name in small:
        with read_errors(directory / name):
            data = (directory / name).read_bytes()
        sums[name] = {"bytes": len(data), "crc32c": crc32c(data)}
    group = read_json(directory / MANIFEST)
    group["attributes"]["moetier"]["files"] = dict(sorted(sums.items()))
    data = _file(group)
    files = parse_manifest(data, str(directory)).files.values()
    check_small(
        [entry.bytes for entry in files],
        str(directory),
        "Move files that do not belong to the model out of the folder.",
    )
    return data


def _file(group: Any) -> bytes:
    return json.dumps(group, indent=2).encode()


def _parted(data: bytes) -> tuple[Any, Any]:
    """Split the bytes of a manifest file into its JSON without ``files`` and ``copied``, and ``files``.

    Returns (``data``, None) if they are no manifest.
    """
    try:
        group = parse_json(data, "", "")
        group["attributes"]["moetier"].pop("copied", None)
        return group, group["attributes"]["moetier"].pop("files", None)
    except (StoreError, KeyError, TypeError, AttributeError):
        return data, None


def _begin(
    objects: Objects, sizes: dict[str, int] | None, manifest: bytes, own_names: Iterable[str], overwrite: bool
) -> dict[str, int]:
    """Begin or resume a push of a store. Return the sizes of its stored objects, which need not be written again.

    ``sizes``: sizes of all stored objects; None if they can't be listed.

    Objects of another model with names in ``own_names`` are removed before PUSH is written, which names the model of
    the objects. So are those that a former model has left, as a resumed push may be without ``overwrite``. If small
    files will change, the manifest there loses its sums first, so that it agrees with the old files and with the new
    ones.

    Raises TargetExistsError if another model is there, unless it is to be replaced.
    """
    model, sums = _parted(manifest)
    for name in (MANIFEST, PUSH):
        if sizes is not None and name not in sizes:
            continue
        try:
            data = objects.read_whole(name, MAX_JSON_BYTES)
        except MissingExpertError:
            continue
        except RefusedReadError as error:
            if not overwrite:
                raise TargetExistsError(
                    f"{error.cause} Another model may be there, which can't be seen.",
                    "Use credentials that may list and read, or replace what is there with `moetier push --overwrite`.",
                ) from error
            data = b""
        other, old = _parted(data)
        if is_same := other == model:
            if name == MANIFEST and old not in (None, sums):
                objects.put(MANIFEST, _file(model))
        elif not overwrite:
            raise TargetExistsError(
                f"{objects.where} holds another model.",
                "Choose another address, or replace it: moetier push --overwrite DIR ADDRESS",
            )
        if overwrite:
            for leftover in _leftovers(sizes or {}, own_names):
                objects.delete(leftover)
        if is_same:
            return {} if overwrite and name == MANIFEST else sizes or {}
        objects.delete(name)
    for name in own_names:
        if sizes is None or name in sizes:
            objects.delete(name)
    objects.put(PUSH, manifest)
    return {}


def _leftovers(stored: Collection[str], own_names: Iterable[str]) -> set[str]:
    """Return the names of objects that a former model has left: those that a model may have, and this one lacks.

    ``fetch`` would take small files among them, such as a chat template, for files of this model.
    """
    others = set(stored) - {*own_names, MANIFEST, PUSH}
    return {name for name in others if name.startswith(f"{GROUP}/") or TRUNK_NAME.fullmatch(name) or is_small(name)}


def _pieces(path: Path, advance: Advance) -> Iterator[bytes]:
    with read_errors(path), path.open("rb", buffering=0) as stream:
        while piece := stream.read(READ_PIECE_BYTES):
            yield piece
            advance(len(piece))
