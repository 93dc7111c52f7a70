"""Scrubbable: what ``moetier verify`` checks of a store, besides its records one by one.

The defaults are for a store that compares each read with ``record_checksums`` of its manifest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moetier.tiers.errors import StoreError
from moetier.tiers.manifest import Manifest

from .trunk import check_sum, trunk_faults


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault of a store or of the files beside it."""

    block: int | None  # number of the block; None if the fault is not in one block
    expert: int | None  # number of the expert in its block; None if the fault is not in one record
    file: str  # path of the file or folder
    cause: str  # what is wrong, as a sentence


class Scrubbable:
    """Checks of what only all records together can show, and of the files beside them."""

    manifest: Manifest
    directory: Path

    def check_digest(self) -> None:
        """Begin to compare what only all records together can show. The result comes through ``on_fault``.

        Called for a store that was opened with ``damaged`` and has no faults. The default does nothing. Stores without
        ``record_checksums`` compare the manifest's digest. Raises ChecksumError if the records are found to be wrong at
        once.
        """

    def compare_digest(self, checksums: Sequence[int]) -> None:
        """Raise ChecksumError if all records together, with these checksums, are not those of the manifest.

        ``moetier verify`` calls it with what it has read. The default does nothing.
        """

    @property
    def other_files(self) -> Mapping[Path, int]:
        """The files that ``scrub_other_files`` checks, and how many bytes of each it reads.

        The default is the files of the trunk that the manifest lists.
        """
        return {self.directory / name: entry.bytes for name, entry in sorted(self.manifest.trunk.items())}

    def other_file_faults(self) -> dict[str, StoreError]:
        """Check sizes and headers of the files in ``other_files``. Return a dictionary from name to error."""
        return trunk_faults(self.directory, self.manifest) if self.manifest.trunk else {}

    def scrub_other_files(self) -> Iterator[int | Problem]:
        """Check the bytes in ``other_files``. Yield problems, and as progress the size of each read in bytes."""
        faults = self.other_file_faults()
        for name, fault in faults.items():
            yield Problem(None, None, str(self.directory / name), fault.cause)
        for name, entry in sorted(self.manifest.trunk.items()):
            if name not in faults:
                try:
                    yield from check_sum(self.directory / name, entry)
                except StoreError as error:
                    yield Problem(None, None, str(self.directory / name), error.cause)
