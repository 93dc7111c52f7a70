"""A real limit on a process's memory. Skips, saying why, where none can be set."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

VERSION_1 = Path("/sys/fs/cgroup/memory")
VERSION_2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryGroup:
    folder: Path
    peak_file: str

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """In the group from its first instruction on; -9 if it is killed for memory."""
        enter = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        return subprocess.run(["sh", "-c", enter, "sh", *command], capture_output=True, text=True, check=False)

    @property
    def peak(self) -> int:
        """Bytes, pages of files included."""
        return int((self.folder / self.peak_file).read_text())


@contextlib.contextmanager
def memory_limit(limit: int) -> Iterator[MemoryGroup]:
    """A control group of ``limit`` bytes without swap."""
    first = VERSION_1.is_dir()
    folder = (VERSION_1 if first else VERSION_2) / f"moetier-test-{os.getpid()}"
    files = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"] if first else ["memory.max", "memory.swap.max"]
    try:
        folder.mkdir()
        (folder / files[0]).write_text(str(limit))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"can't limit memory by a control group: {error}")
    with contextlib.suppress(OSError):  # where swap is not counted
        (folder / files[1]).write_text(str(limit if first else 0))
    try:
        yield MemoryGroup(folder, "memory.max_usage_in_bytes" if first else "memory.peak")
    finally:
        deadline = time.monotonic() + 60
        while True:  # the last process may still be ending
            try:
                folder.rmdir()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
