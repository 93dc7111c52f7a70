"""How fast a disk gives random reads: by fio, where there is one, else by a plain loop over preadv."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moetier.tiers.errors import CheckpointError, StoreReadError

FILE_BLOCK_BYTES = 8 << 20  # of reads from files that hold no records
NO_FIO = "fio is not installed: the disk's rate is that of a plain loop over preadv, in Python"


@dataclass(frozen=True)
class RandomReads:
    """Reads of ``block_bytes`` at multiples of them, anywhere in the first ``data_bytes`` of ``files``.

    With ``direct`` past the page cache (O_DIRECT); without, it is dropped beforehand, and what is read twice within a
    run may come out of it.
    """

    files: tuple[Path, ...]
    data_bytes: int
    block_bytes: int
    direct: bool

    @classmethod
    def of_records(cls, directory: Path, *, direct: bool) -> RandomReads:
        """Of whole records, in the files of the record geometry that takes the most bytes."""
        from moetier.tiers.store.folder import read_manifest, store_folder
        from moetier.tiers.store.shard import ShardFile

        folder = store_folder(directory)
        manifest = read_manifest(folder)
        shards = [ShardFile.of(folder, manifest, block) for block in range(len(manifest.blocks))]
        array = max(
            manifest.layouts,
            key=lambda name: sum(s.data_bytes for s, b in zip(shards, manifest.blocks, strict=True) if b.array == name),
        )
        chosen = [shard for shard, block in zip(shards, manifest.blocks, strict=True) if block.array == array]
        return cls(tuple(shard.path for shard in chosen), chosen[0].data_bytes, chosen[0].slot_bytes, direct)

    @classmethod
    def of_files(cls, files: Sequence[Path], block_bytes: int = FILE_BLOCK_BYTES) -> RandomReads:
        """From the largest of ``files``, in blocks of ``block_bytes`` at most."""
        largest = max(files, key=lambda path: path.stat().st_size)
        size = largest.stat().st_size
        block = min(block_bytes, size) // 4096 * 4096
        if not block:
            raise CheckpointError(f"{largest} is smaller than a page.", "Give a checkpoint with weights.")
        return cls((largest,), size // block * block, block, direct=takes_direct(largest))

    @property
    def by(self) -> str:
        return "fio" if fio_version() else "preadv"

    def rate(self, depth: int, seconds: float) -> float:
        """Bytes a second with ``depth`` reads in flight. Raises StoreReadError."""
        return self._fio(depth, seconds) if fio_version() else self._plain(depth, seconds)

    def _fio(self, depth: int, seconds: float) -> float:
        names = ":".join(str(path.resolve()).replace(":", "\\:") for path in self.files)
        options = {
            "name": "records",
            "filename": names,
            "filesize": self.data_bytes,
            "file_service_type": "random",
            "rw": "randread",
            "bs": self.block_bytes,
            "direct": int(self.direct),
            "ioengine": "psync",  # as the store reads: a thread for each read in flight
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
                f"fio can't read {self.files[0]}: {next(iter(result.stderr.splitlines()), 'it says nothing')}",
                "Try its command line by hand, or take it out of PATH: a plain loop takes its place.",
            )
        (job,) = json.loads(result.stdout[result.stdout.index("{") :])["jobs"]
        return float(job["read"]["io_bytes"]) * 1000 / float(job["read"]["runtime"])

    def _plain(self, depth: int, seconds: float) -> float:
        from moetier.tiers.store.atomic import read_errors

        with contextlib.ExitStack() as stack:
            descriptors = []
            flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if self.direct else 0)
            for path in self.files:
                with read_errors(path):
                    descriptors.append(os.open(path, flags))
                stack.callback(os.close, descriptors[-1])
                os.posix_fadvise(descriptors[-1], 0, 0, os.POSIX_FADV_DONTNEED)
            places = range(0, self.data_bytes - self.block_bytes + 1, self.block_bytes)

            def read(buffer: memoryview) -> None:
                descriptor, place, done = random.choice(descriptors), random.choice(places), 0
                while done < len(buffer):
                    with read_errors(self.files[0]):
                        count = os.preadv(descriptor, [buffer[done:]], place + done)
                    if not count:
                        raise StoreReadError(f"{self.files[0]} was cut.", "Convert the model again.")
                    done += count

            return read_rate(read, self.block_bytes, depth=depth, seconds=seconds)


def read_rate(read: Callable[[memoryview], None], nbytes: int, *, depth: int, seconds: float) -> float:
    """Bytes a second that ``depth`` threads read, each into a buffer of ``nbytes`` of its own that begins on a page."""
    counts, errors = [0] * depth, list[BaseException]()
    end = threading.Event()

    def work(number: int) -> None:
        buffer = memoryview(mmap.mmap(-1, nbytes))
        try:
            while not end.is_set():
                read(buffer)
                counts[number] += 1
        except BaseException as error:
            errors.append(error)
            end.set()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(depth)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    end.wait(seconds)
    end.set()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(counts) * nbytes / (time.perf_counter() - began)


def takes_direct(path: Path) -> bool:
    """Whether a file can be read past the page cache."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def fio_version() -> str | None:
    """None where it is not installed."""
    if shutil.which("fio") is None:
        return None
    found = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=False)
    return found.stdout.strip().removeprefix("fio-") or None
