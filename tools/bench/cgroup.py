"""A real limit on the memory of child processes: a control group, of version 1 or 2."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moetier.tiers.errors import ConfigError

VERSION_1 = Path("/sys/fs/cgroup/memory")
VERSION_2 = Path("/sys/fs/cgroup")
EMPTY_SECONDS = 60


@dataclass(frozen=True)
class MemoryGroup:
    folder: Path
    peak_file: str

    def run(self, command: Sequence[str], *, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """In the group from its first instruction on, ``text`` its standard input; -9 if it is killed for memory."""
        enter = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        return subprocess.run(
            ["sh", "-c", enter, "sh", *command], input=text, capture_output=True, text=True, check=False
        )

    @property
    def peak(self) -> int:
        """Bytes, pages of files included."""
        return int((self.folder / self.peak_file).read_text())


@contextlib.contextmanager
def memory_group(limit: int | None) -> Iterator[MemoryGroup]:
    """A control group of at most ``limit`` bytes, without swap; None only counts. Raises ConfigError where there can't
    be one."""
    first = VERSION_1.is_dir()
    folder = (VERSION_1 if first else VERSION_2) / f"moetier-{os.getpid()}-{time.monotonic_ns()}"
    files = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"] if first else ["memory.max", "memory.swap.max"]
    try:
        folder.mkdir()
        if limit is not None:
            (folder / files[0]).write_text(str(limit))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise ConfigError(
            f"Memory can't be limited by a control group ({error}).", "Run it as root, where cgroups have memory."
        ) from error
    if limit is not None:
        with contextlib.suppress(OSError):  # where swap is not counted
            (folder / files[1]).write_text(str(limit if first else 0))
    try:
        yield MemoryGroup(folder, "memory.max_usage_in_bytes" if first else "memory.peak")
    finally:
        deadline = time.monotonic() + EMPTY_SECONDS
        while True:  # the last process may still be ending
            try:
                folder.rmdir()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def forget(*paths: Path) -> None:
    """Drops files, and those in folders, from the page cache. Pages there are charged to whom they were read for first:
    a run with a limit that finds them gets memory that it does not pay for."""
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)
