"""A checkpoint on the hub, opened to be converted while its files pass by: its headers are fetched, and no weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moetier.runtime.checkpoint import hub
from moetier.runtime.checkpoint.files import (
    INDEX,
    WEIGHTS,
    Checkpoint,
    contained,
    copied_files,
    gathered,
    read_json,
    read_places,
    refuse_code,
    some,
    weights_of,
    without_weights,
)
from moetier.runtime.checkpoint.hub import RemoteFile
from moetier.runtime.checkpoint.safetensors import StoredTensor, listed, read_header
from moetier.tiers.errors import CheckpointError

from .streaming import Passage, moved, shard_path

MIN_START = 8 + len("{}")


def open_on_hub(
    name: str,
    folder: Path,
    *,
    revision: str | None = None,
    keep: bool = False,
    or_folder: bool = False,
    ignore_code: bool = False,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> tuple[Checkpoint, Passage]:
    """Of a hub id; its files will pass through ``folder``, which need not be there, or with ``keep`` stay in
    huggingface_hub's cache. What that has already is read where it is.

    ``revision`` is a branch, a tag or a commit. ``or_folder``: a folder of this name was looked for before. ``check``
    may raise on the config. Raises CheckpointError or UnsafeCheckpointError. Needs no network where all that is wanted
    is here.
    """
    snapshot = hub.fetch(name, revision=revision, or_folder=or_folder)
    config = read_json(snapshot, "config.json")
    if not ignore_code:
        refuse_code(snapshot, config)
    if check is not None:
        check(config)
    commit, wanted = snapshot.name, weights_of(snapshot, config)
    for file in wanted:
        contained(snapshot, file)
    place = folder / commit
    here = {file: path for file in wanted if (path := _here(name, file, commit, place)) is not None}
    files = _files(name, commit, wanted, here)
    headers = _headers(name, commit, files, here, place)
    places: dict[str, Path] = {}
    if (snapshot / INDEX).is_file() and not config.get("transformers_weights"):
        places = {tensor: shard_path(place, file) for tensor, file in read_places(snapshot, INDEX).items()}
    tensors = gathered(headers, places, snapshot / INDEX)
    checkpoint = Checkpoint(
        name=name,
        folder=snapshot,
        source=name,
        ignored_code=ignore_code,
        config=config,
        tensors=tensors,
        copied=copied_files(snapshot),
        revision=commit,
    )
    return checkpoint, Passage(name, commit, place, files, tensors, keep=keep)


def _here(name: str, file: str, commit: str, place: Path) -> Path | None:
    """Where a file is, or what is left of it: either has its header and its size."""
    path = shard_path(place, file)
    return path if path.exists() else hub.cached(name, file, commit)


def _files(name: str, commit: str, wanted: Sequence[str], here: Mapping[str, Path]) -> dict[str, RemoteFile]:
    if len(here) == len(wanted):
        return {file: RemoteFile(path.stat().st_size, None) for file, path in here.items()}
    listing = hub.listing(name, commit)
    missing = [file for file in wanted if file not in listing]
    if missing == [WEIGHTS]:
        raise without_weights(name, listing)
    if missing:
        raise CheckpointError(f"{name} lacks {some(missing)}, which its index names.", "Choose another revision.")
    return {file: listing[file] for file in wanted}


def _headers(
    name: str, commit: str, files: Mapping[str, RemoteFile], here: Mapping[str, Path], place: Path
) -> dict[Path, dict[str, StoredTensor]]:
    """The tensors of each file, by the path at which it will be read."""
    fetched = hub.headers(name, [file for file in files if file not in here], commit) if len(here) < len(files) else {}
    found = {}
    for file, remote in files.items():
        path = shard_path(place, file)
        if file in here:
            found[path] = moved(read_header(here[file]), path)
            continue
        try:
            end = max((entry["data_offsets"][1] for entry in fetched[file].values()), default=0)
            if remote.size - end < MIN_START:  # what comes before its tensors
                raise ValueError(f"its tensors take {end} bytes, and the file {remote.size}")
            found[path] = dict(listed(path, fetched[file], remote.size - end))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} of {name} has a malformed header ({error}).", "Choose another.") from error
    return found
