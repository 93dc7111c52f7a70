"""Random reads of a disk, and their rate: by fio if it is installed, else by ``preadv`` in threads."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from moetier.tiers.errors import CheckpointError, StoreReadError

GB = 1e9
DISK_SECONDS = 2.0  # of random reads, to measure the rate
FILE_BLOCK_BYTES = 8 << 20  # size of a read from a file that holds no records
NO_FIO = "fio is not installed: the disk's rate is measured with a loop over preadv in Python"


@dataclass(frozen=True)
class RandomReads:
    """Random reads of ``block_bytes`` each, at multiples of that size in the first ``data_bytes`` of each of ``files``.

    If ``is_direct``, they bypass the page cache (O_DIRECT). Otherwise the files are dropped from the page cache before
    each run, but a block that is read twice in a run may come from the page cache.
    """

    files: tuple[Path, ...]
    data_bytes: int
    block_bytes: int
    is_direct: bool

    @classmethod
    def of_records(cls, directory: Path) -> RandomReads:
        """Choose reads of whole records of a model directory; of the trunk for a cache that lacks records.

        If the blocks have several record layouts, only records of the layout that takes the most bytes are read. Raises
        StoreError.
        """
        from moetier.runtime.stores.registry import open_store

        with open_store(directory, damaged=True) as store:
            for fault in store.faults.values():
                raise fault
            manifest = store.manifest
            if not store.is_local:  # its shards have holes
                return cls.of_files([store.directory / name for name in manifest.trunk])
            array = max(manifest.layouts, key=lambda name: math.prod(manifest.shape(name)))
            files = {store.path(block) for block in manifest.members[array]}
            return cls.of_files(sorted(files), manifest.layouts[array].slot_bytes)

    @classmethod
    def of_files(cls, files: Sequence[Path], block_bytes: int = FILE_BLOCK_BYTES) -> RandomReads:
        """Choose reads of at most ``block_bytes`` each, in the largest of ``files`` and those of the same size.

        Raises CheckpointError if these are smaller than a page.
        """
        sizes = {path: path.stat().st_size for path in files}
        size = max(sizes.values())
        chosen = tuple(path for path in files if sizes[path] == size)
        block = min(block_bytes, size) // 4096 * 4096
        if not block:
            raise CheckpointError(
                f"{chosen[0]} is too small to measure reads: it has fewer than 4,096 bytes.",
                "Give a checkpoint with weights.",
            )
        return cls(chosen, size // block * block, block, is_direct=takes_direct(chosen[0]))

    @classmethod
    @contextlib.contextmanager
    def of_new_file(cls, folder: Path, nbytes: int, block_bytes: int) -> Iterator[RandomReads]:
        """Write a temporary file of ``nbytes`` into ``folder`` and yield reads of it. Raises TargetError."""
        from moetier.tiers.store.atomic import disk_errors

        with disk_errors(folder, lambda: nbytes), tempfile.NamedTemporaryFile(dir=folder, prefix=".moetier-") as file:
            piece = os.urandom(1 << 20)
            for _ in range(max(1, nbytes // len(piece))):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            yield cls.of_files([Path(file.name)], block_bytes)

    @property
    def by(self) -> str:
        """Name of the tool that measures: "fio" if it is installed, else "preadv"."""
        return "preadv" if shutil.which("fio") is None else "fio"

    def rate(self, depth: int, seconds: float) -> float:
        """Measure the rate of these reads, in bytes per second, with ``depth`` reads in flight for ``seconds``.

        Raises StoreReadError if a read fails.
        """
        return self._fio(depth, seconds) if self.by == "fio" else self._plain(depth, seconds)

    def _fio(self, depth: int, seconds: float) -> float:
        names = ":".join(str(path.resolve()).replace(":", "\\:") for path in self.files)
        options = {
            "name": "records",
            "filename": names,
            "filesize": self.data_bytes,
            "file_service_type": "random",
            "rw": "randread",
            "bs": self.block_bytes,
            "direct": int(self.is_direct),
            "ioengine": "psync",  # like the store: one thread for each read in flight
            "numjobs": depth,
            "runtime": f"{max(1, round(1000 * seconds))}ms",
            "randseed": random.getrandbits(31),
            "output-format": "json",
        }
        flags = ["--thread", "--group_reporting", "--readonly", "--time_based", "--norandommap"]
        command = ["fio", *(f"--{name}={value}" for name, value in options.items()), *flags]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise StoreReadError(
                f"fio can't read {self.files[0]}: {next(iter(result.stderr.splitlines()), 'it gives no reason')}",
                "Check the file and its disk, or remove fio from PATH: moetier then measures without it.",
            )
        (job,) = json.loads(result.stdout[result.stdout.index("{") :])["jobs"]
        return float(job["read"]["io_bytes"]) * 1000 / float(job["read"]["runtime"])

    def _plain(self, depth: int, seconds: float) -> float:
        from moetier.tiers.store.atomic import read_errors

        flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if self.is_direct else 0)
        places = range(0, self.data_bytes - self.block_bytes + 1, self.block_bytes)
        with contextlib.ExitStack() as closing:
            closing.enter_context(read_errors(self.files[0]))
            descriptors = []
            for path in self.files:
                descriptors.append(os.open(path, flags))
                closing.callback(os.close, descriptors[-1])
                os.posix_fadvise(descriptors[-1], 0, 0, os.POSIX_FADV_DONTNEED)

            def read(buffer: memoryview) -> None:
                descriptor, place, done = random.choice(descriptors), random.choice(places), 0
                while done < len(buffer):
                    if not (count := os.preadv(descriptor, [buffer[done:]], place + done)):
                        raise StoreReadError(
                            f"{self.files[0]} became shorter while it was read.", "Convert the model again."
                        )
                    done += count

            return read_rate(read, self.block_bytes, depth=depth, seconds=seconds)


def read_rate(read: Callable[[memoryview], None], nbytes: int, *, depth: int, seconds: float) -> float:
    """Measure how many bytes per second ``depth`` threads read together in about ``seconds``.

    Each thread has a page-aligned buffer of ``nbytes``, and calls ``read`` with it at least once.
    """
    began = time.perf_counter()

    def work(_: int) -> int:
        buffer = memoryview(mmap.mmap(-1, nbytes))
        count = 0
        while not count or time.perf_counter() < began + seconds:
            read(buffer)
            count += 1
        return count

    with ThreadPoolExecutor(depth, "moetier-reads") as pool:
        count = sum(pool.map(work, range(depth)))
    return count * nbytes / (time.perf_counter() - began)


def takes_direct(path: Path) -> bool:
    """Return whether a file can be opened with O_DIRECT, which bypasses the page cache."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def fio_version() -> str | None:
    """Return fio's version, or None if it is not installed."""
    if shutil.which("fio") is None:
        return None
    result = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=False)
    return result.stdout.strip().removeprefix("fio-") or None
