"""Check all records and files of a model, and of its mirrors, against their checksums."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from moetier.runtime.checkpoint.containers import container_of
from moetier.runtime.model.names import listed_name
from moetier.runtime.stores.registry import open_store
from moetier.tiers.errors import StoreError, StoreFormatError
from moetier.tiers.store.base import DirectoryStore
from moetier.tiers.store.folder import command
from moetier.tiers.store.mirror import open_mirror, read_mirrors
from moetier.tiers.store.scrub import scrub
from moetier.tiers.store.scrubbable import Problem
from moetier.tiers.text import format_bytes
from moetier.tools.cli.failure import plain
from moetier.tools.cli.progress import ByteProgress
from moetier.tools.convert.model_files import small_faults


@dataclass(frozen=True)
class Verification:
    """Result of ``verify``. The store is closed."""

    store: DirectoryStore
    mirrors: Sequence[Path]
    absent: Sequence[Path]  # folders of mirrors that are missing: their disk may not be mounted
    tokenizer: bool  # whether there is one, or the folder is a mirror, which needs none
    bytes_read: int
    seconds: float
    bad: Sequence[Problem]

    def text(self) -> str:
        """Return the result as one line."""
        manifest, paths = self.store.manifest, self.store.other_files
        name = listed_name(self.store.directory) or manifest.model
        files = f"{len(paths)} file{'s' * (len(paths) > 1)}"
        if manifest.trunk:
            trunk = f"{files} of the trunk"
        else:
            trunk = f"the other bytes of {files}" if paths else "no checksums of the trunk"
        copies = f" in {1 + len(self.mirrors)} copies" if self.mirrors else ""
        return (
            f"{plain(name)}: {manifest.record_count:,} records in {len(manifest.blocks)} blocks{copies}, "
            f"{trunk}, {format_bytes(self.bytes_read)} read in {self.seconds:.1f} s "
            f"({self.bytes_read / self.seconds / 1e9:.2f} GB/s, {'O_DIRECT' if self.store.is_direct else 'buffered'}): "
            f"{f'{len(self.bad)} bad' if self.bad else 'all good'}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the result as ``moetier verify --json`` prints it."""
        manifest = self.store.manifest
        return {
            "model": manifest.model,
            "digest": manifest.digest,
            "blocks": len(manifest.blocks),
            "records": manifest.record_count,
            "trunk_files": len(manifest.trunk),
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
            "tokenizer": self.tokenizer,
            "direct": self.store.is_direct,
            "mirrors": [*map(str, self.mirrors)],
            "absent_mirrors": [*map(str, self.absent)],
            "bad": [asdict(problem) for problem in self.bad],
        }


def verify(directory: Path, *, shows: bool) -> Verification:
    """Read all records and files of a model, and of its mirrors, and compare them with their checksums.

    The progress is shown on standard error, and each problem as it is found if ``shows``. Raises StoreError if nothing
    can be checked.
    """
    with ExitStack() as closing:
        store = closing.enter_context(open_store(directory, damaged=True))
        manifest, folder = store.manifest, store.directory
        if not store.has_checksums:
            raise StoreFormatError(
                f"{folder} is a checkpoint without checksums to compare with.", f"Make them: {command('link', folder)}"
            )
        mirrors, absent, problems = _open_mirrors(folder, manifest.digest, closing)
        stores = [store, *mirrors]
        small = small_faults(folder) if manifest.trunk else ()  # small files, such as config.json, have no checksums
        checks = chain(
            problems,
            store.scrub_other_files(),
            *map(scrub, stores),
            (Problem(None, None, str(folder), fault.cause) for fault in small),
        )
        total = sum(map(_record_bytes, stores)) + sum(store.other_files.values())
        bad, nbytes, seconds = _run(checks, total, shows=shows)
        return Verification(
            store,
            mirrors=[mirror.directory for mirror in mirrors],
            absent=absent,
            tokenizer=not manifest.trunk or container_of(folder).has_vocabulary(folder),
            bytes_read=nbytes,
            seconds=seconds,
            bad=bad,
        )


def _record_bytes(store: DirectoryStore) -> int:
    """Return the bytes of all records of a store, without those of bad files."""
    manifest = store.manifest
    return sum(
        entry.experts * manifest.layouts[entry.array].slot_bytes
        for block, entry in enumerate(manifest.blocks)
        if block not in store.faults
    )


def _run(checks: Iterable[int | Problem], total: int, *, shows: bool) -> tuple[list[Problem], int, float]:
    """Go through ``checks``, which read ``total`` bytes. Return the problems, the bytes read, and the seconds.

    ``checks`` yields problems, and the number of bytes of each read. A problem is returned once, even if several blocks
    have it, as they share a file.
    """
    bad: dict[str, Problem] = {}  # by cause
    nbytes = 0
    with ByteProgress("verify", total) as progress:
        for result in checks:
            if isinstance(result, int):
                nbytes += result
                progress.advance(result)
            elif bad.setdefault(result.cause, result) is result and shows:
                progress.say(f"bad: {result.cause}")
        return [*bad.values()], nbytes, progress.seconds


def _open_mirrors(
    folder: Path, digest: str, closing: ExitStack
) -> tuple[list[DirectoryStore], list[Path], list[Problem]]:
    """Open the mirrors of the store in ``folder``, whose digest is ``digest``; ``closing`` will close them.

    Return the mirrors, the folders of mirrors that are missing, because their disk may not be mounted, and the problems
    of mirrors that can't be used.
    """
    mirrors: list[DirectoryStore] = []
    absent, problems = [], []
    try:
        listed = read_mirrors(folder)
    except StoreError as error:
        return [], [], [Problem(None, None, str(folder), error.cause)]
    for path in listed:
        if not path.exists():
            absent.append(path)
            continue
        try:
            mirrors.append(closing.enter_context(open_mirror(path, digest)))
        except StoreError as error:
            problems.append(Problem(None, None, str(path), error.cause))
    return mirrors, absent, problems
