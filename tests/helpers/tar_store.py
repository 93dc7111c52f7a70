"""TarStore: the experts of a model directory in one file, ``experts.tar``. The example in CONTRIBUTING.md.

The file has the manifest as ``manifest.json``, and the record of each expert as ``BLOCK/EXPERT``.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

from faults import flip_bit

from moetier.tiers.errors import StoreFormatError
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey
from moetier.tiers.locks import UseCount
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.atomic import read_errors
from moetier.tiers.store.base import DirectoryStore, Pause
from moetier.tiers.store.folder import MAX_JSON_BYTES, parse_json
from moetier.tiers.store.shard import read_at

NAME = "experts.tar"


class TarStore(DirectoryStore):
    """The records in ``experts.tar``."""

    @classmethod
    def recognises(cls, location: Path) -> bool:
        """Return whether the directory has the file."""
        return (location / NAME).is_file()

    @classmethod
    def open(cls, location: Path, *, damaged: bool = False) -> TarStore:
        """Open the file. ``damaged`` changes nothing, as only reads find out what is bad."""
        return cls(location)

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._path = directory / NAME
        self._use = UseCount(f"The store {self._path}")  # ``close`` waits for reads, and a fork is refused
        fix = "Write the file again."
        try:
            with read_errors(self._path), tarfile.open(self._path) as tar, tar.extractfile("manifest.json") as stream:
                manifest = parse_json(stream.read(MAX_JSON_BYTES + 1), f"The manifest in {self._path}", fix)
                self._offsets = {member.name: member.offset_data for member in tar}
        except (tarfile.TarError, KeyError, FileNotFoundError) as error:
            raise StoreFormatError(f"{self._path} is not a store: {error}.", fix) from error
        self.manifest = Manifest.from_json(manifest, str(self._path), fix)
        if not self.manifest.record_checksums:
            raise StoreFormatError(f"{self._path} has no checksums.", fix)
        with read_errors(self._path):
            self._file = self._path.open("rb", buffering=0)

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Pause | None = None) -> None:
        """Read a record at once. ``pause`` is not called."""
        with self._use.use():
            self.manifest.check_keys(key.block, (key,))
            if (offset := self._offsets.get(f"{key.block}/{key.expert}")) is None:
                raise StoreFormatError(f"{self._path} has no record of {key}.", self.fix)
            read_at(self._path, self._file.fileno(), offset, buffer[:-CHECKSUM_BYTES], direct=False)
            self.check_record(key, buffer)

    def path(self, block: int) -> Path:
        """Return the path of the file."""
        return self._path

    def close(self) -> None:
        """Wait for reads, and close the file."""
        self._use.close()
        self._file.close()


def pack(folder: Path, manifest: Manifest, records: Mapping[ExpertKey, bytes]) -> None:
    """Write such a file."""
    members = {"manifest.json": json.dumps(manifest.to_json()).encode()}
    write_tar(folder, members | {f"{key.block}/{key.expert}": record for key, record in records.items()})


def write_tar(folder: Path, members: Mapping[str, bytes]) -> None:
    """Write a file with these members, by name."""
    with tarfile.open(folder / NAME, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def flip_bit_of_record(folder: Path, key: ExpertKey) -> None:
    """Flip a bit of a record. A second call restores it."""
    with tarfile.open(folder / NAME) as tar:
        offset = tar.getmember(f"{key.block}/{key.expert}").offset_data
    flip_bit(folder / NAME, offset + 1000)
