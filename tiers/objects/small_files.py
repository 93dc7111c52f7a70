"""Small files of a model in an object store: its config, its tokenizer's files and so on.

If the manifest has their sums, as `moetier push` writes them, a file whose bytes are others is refused. Else those that
can be listed are fetched, or those of usual names.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moetier.tiers.errors import ChecksumError, MissingExpertError, StoreFormatError
from moetier.tiers.manifest import FileSum, Manifest
from moetier.tiers.small_names import USUAL
from moetier.tiers.store.atomic import make_folders, write_durably
from moetier.tiers.store.checksum import crc32c
from moetier.tiers.store.folder import CACHE, GROUP, MAX_JSON_BYTES, METADATA, ORIGIN
from moetier.tiers.store.trunk import INDEX

from .client import Objects, RefusedReadError, wait_for_all

MAX_SMALL_BYTES = 256 << 20  # most bytes of all small files, such as the tokenizer's
MAX_SMALL_FILES = 100
SLACK_BYTES = 1 << 20  # by which an answer may be longer than the small file, so that the error can describe it
WEB_PAGE = re.compile(rb"\s*<(!doctype html|html)\b", re.IGNORECASE)
DAMAGED = (
    "Nothing of it was cached. See what the server sends (a proxy or a sign-in page may answer in its place). If the "
    "object itself is damaged, write it again: moetier push --overwrite DIR ADDRESS"
)
ENDS = re.compile(rb"\{\}|\[\]")  # first and last byte of a large JSON file
# names of the small files that are fetched, if objects can be listed
SMALL = re.compile(r"(additional_chat_templates/)?\w[\w.-]*\.(json|jinja|txt|tiktoken|model(\.v\d+)?)")
NOT_SMALL = ("mirrors.json", "conversion.json", CACHE)
REQUIRED = ("config.json", INDEX)
_log = logging.getLogger(__name__)


def is_small(name: str) -> bool:
    """Return whether an object or file of this name is one of the small files that are fetched with a model."""
    return SMALL.fullmatch(name) is not None and name not in NOT_SMALL


def check_small(sizes: Iterable[int], where: str, fix: str) -> None:
    """Raise StoreFormatError with this ``fix`` if small files are too many or too large, given their sizes."""
    all_sizes = list(sizes)
    if len(all_sizes) > MAX_SMALL_FILES or sum(all_sizes) > MAX_SMALL_BYTES:
        raise StoreFormatError(
            f"{where} has {len(all_sizes):,} small files with {sum(all_sizes):,} bytes, more than the "
            f"{MAX_SMALL_FILES:,} files or {MAX_SMALL_BYTES:,} bytes that are allowed.",
            fix,
        )


def fetch_small(
    objects: Objects,
    pool: ThreadPoolExecutor,
    folder: Path,
    manifest: Manifest,
    names: Iterable[str] = (),
    *,
    fresh: bool,
) -> None:
    """Fetch and check the small files of a model, or only those of ``names``. ``fresh`` is as in ``Objects.read``.

    Raises StoreError: ChecksumError or StoreFormatError if a file is damaged.
    """
    required = [f"{GROUP}/{name}/{METADATA}" for name in manifest.layouts]
    if manifest.trunk:
        required += REQUIRED
    sizes: dict[str, int] | None
    if manifest.files:
        sizes = {name: entry.bytes for name, entry in manifest.files.items()}
        if strangers := [name for name in sizes if not is_small(name) and name not in required]:
            raise StoreFormatError(
                f"The manifest at {objects.where} has the file {strangers[0]}, which is not one that models have.",
                DAMAGED,
            )
    else:
        _log.warning(
            "%s has no checksums of its config and tokenizer, so they are used without a check: `moetier push` of this "
            "version writes them.",
            objects.where,
        )
        sizes = pool.submit(objects.sizes).result()
    known_names = (*USUAL, ORIGIN) if sizes is None and manifest.trunk else sizes or ()
    wanted = list(names) or list(dict.fromkeys([*required, *filter(is_small, known_names)]))
    check_small([(sizes or {}).get(name, 0) for name in wanted], objects.where, "Check the address.")

    def copy(name: str, most: int) -> int:
        """Fetch a file, and return its size; 0 if it does not exist."""
        try:
            data = _read_small(objects, name, manifest.files.get(name), most, fresh)
        except MissingExpertError:
            if name in required or name in manifest.files:
                raise
            return 0
        except RefusedReadError:  # S3 answers so for what does not exist, where it may not be listed
            if name in required or sizes is not None:
                raise
            return 0
        make_folders((folder / name).parent)
        write_durably(folder / name, data)
        return len(data)

    if sizes is not None:
        # none may write when the files are fetched again
        copies = [pool.submit(copy, name, sizes.get(name, 0) + SLACK_BYTES) for name in wanted]
        wait_for_all(objects, copies, lambda size: None)
        return
    left = MAX_SMALL_BYTES
    for name in wanted:
        left -= pool.submit(copy, name, left).result()


def _read_small(objects: Objects, name: str, entry: FileSum | None, most: int, fresh: bool) -> bytes:
    """Return a small file, of at most ``most`` bytes. Raises ChecksumError or StoreFormatError if it is damaged.

    Without a sum (``entry`` is None), a file is damaged if it is a web page, or is called .json and is not JSON. JSON
    of more than MAX_JSON_BYTES is not parsed, as a hostile one may take fifty times its size in memory.
    """
    data, where = objects.read_whole(name, most, fresh=fresh), f"{name} at {objects.where}"
    if WEB_PAGE.match(data):
        raise StoreFormatError(f"{where} is a web page, and not the file of a model.", DAMAGED)
    if entry is not None and entry != FileSum(len(data), crc32c(data)):
        raise ChecksumError(f"{where} has other bytes than the manifest says.", DAMAGED)
    if entry is None and name.endswith(".json"):
        try:
            if len(data) <= MAX_JSON_BYTES:
                json.loads(data)
            elif not ENDS.fullmatch(data.lstrip()[:1] + data.rstrip()[-1:]):
                raise ValueError("it does not end as its first bracket requires")
        except (ValueError, RecursionError) as error:
            raise StoreFormatError(f"{where} is not JSON ({error}).", DAMAGED) from error
    return data
