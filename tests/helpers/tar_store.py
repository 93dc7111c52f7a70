"""TarStore: the experts of a model directory in one file, ``experts.tar``. The example in CONTRIBUTING.md.

The file has the manifest as ``manifest.json``, and the record of each expert as ``BLOCK/EXPERT``.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

from moetier.tiers.errors import ChecksumError, StoreFormatError
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey
from moetier.tiers.locks import UseCount
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.atomic import read_errors
from moetier.tiers.store.base import DirectoryStore, Pause
from moetier.tiers.store.checksum import checksum_bytes, crc32c
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
        except (tarfile.TarError, KeyError) as error:
            raise StoreFormatError(f"{self._path} is not a store: {error}.", fix) from error
        self.manifest = Manifest.from_json(manifest, str(self._path), fix)
        if not self.manifest.record_checksums:
            raise StoreFormatError(f"{self._path} has no checksums.", fix)
        self._file = self._path.open("rb", buffering=0)

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Pause | None = None) -> None:
        """Read a record at once. ``pause`` is not called."""
        with self._use:
            self.manifest.check_keys(key.block, (key,))
            record = buffer[:-CHECKSUM_BYTES]
            offset = self._offsets[f"{key.block}/{key.expert}"]
            read_at(self._path, self._file.fileno(), offset, record, direct=False)
            crc = crc32c(record)
            if crc != self.manifest.checksums(key.block)[key.expert]:
                raise ChecksumError(f"{self._path}: checksum mismatch in {key}.", self.remedy)
            buffer[-CHECKSUM_BYTES:] = checksum_bytes(crc)

    def path(self, block: int) -> Path:
        """Return the path of the file."""
        return self._path

    def close(self) -> None:
        """Wait for reads, and close the file."""
        self._use.close()
        self._file.close()
