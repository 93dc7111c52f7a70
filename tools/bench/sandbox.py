"""Measurements in a fresh process: the page cache is dropped first, and a control group may limit the memory."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetier.runtime.config import format_bytes
from moetier.tiers.errors import BudgetError, ConfigError, MoetierError

VERSION_1 = Path("/sys/fs/cgroup/memory")
VERSION_2 = Path("/sys/fs/cgroup")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
EMPTY_SECONDS = 60
KILLED = -9  # status of a process that the kernel killed because its group was out of memory


@dataclass(frozen=True)
class MemoryGroup:
    """Control group (cgroups version 1 or 2) that limits the memory of child processes."""

    folder: Path
    peak_file: str

    def run(self, command: Sequence[str], *, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command in the group and return the ended process. Its status is -9 if it was killed for memory.

        ``text`` is its standard input. The process joins the group before the command starts.
        """
        enter = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        return subprocess.run(
            ["sh", "-c", enter, "sh", *command], input=text, capture_output=True, text=True, check=False
        )

    @property
    def peak(self) -> int:
        """Peak memory of the group in bytes, including cached pages of files."""
        return int((self.folder / self.peak_file).read_text())


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    """Make a control group of at most ``limit`` bytes, without swap. Raises ConfigError where that is not possible."""
    first = VERSION_1.is_dir()
    folder = (VERSION_1 if first else VERSION_2) / f"moetier-{os.getpid()}-{time.monotonic_ns()}"
    files = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"] if first else ["memory.max", "memory.swap.max"]
    try:
        folder.mkdir()
        (folder / files[0]).write_text(str(limit))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise ConfigError(
            f"Memory can't be limited by a control group ({error}).",
            "Run it as root, on a system that has the memory controller of cgroups.",
        ) from error
    with contextlib.suppress(OSError):  # without that file, swap is not counted
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
    """Drop files, and all files in folders, from the page cache.

    A cached page counts only against the limit of the group that read it first, so a limited run could use pages that
    do not count against its limit.
    """
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def drop_page_cache(files: Iterable[Path], *, whole: bool) -> str:
    """Drop ``files`` from the page cache, with ``whole`` everything if that is allowed; say what was dropped."""
    forget(*files)
    if not whole:
        return "dropped for the model's files"
    try:
        DROP_CACHES.write_text("1")
    except OSError:
        return "dropped for the model's files, as the machine's can't be"
    return "dropped"


def run_limited(
    command: Sequence[str], text: str, limit: int | None
) -> tuple[subprocess.CompletedProcess[str], int | None]:
    """Run a command with ``text`` as its standard input, in a control group where there is a ``limit`` in bytes.

    Returns the ended process, and the group's peak in bytes, pages of files included; None without a limit.
    """
    if limit is None:
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False), None
    with memory_group(limit) as group:
        return group.run(command, text=text), group.peak


def fresh(work: dict[str, Any], *, limit: int | None = None, files: Iterable[Path] = ()) -> dict[str, Any]:
    """Drop the page cache, run ``work`` in a process of its own, and return the result that ``child`` prints.

    ``files`` are those of the model. With ``limit``, in bytes, the whole cache is dropped and the process runs in a
    control group with that limit; ``group_peak_bytes`` in the result is the group's peak, pages of files included.
    ``page_cache`` says what was dropped. Raises MoetierError.
    """
    command = [sys.executable, "-m", "moetier.tools.bench.child"]
    page_cache = drop_page_cache(files, whole=limit is not None)
    result, peak = run_limited(command, json.dumps(work), limit)
    if limit is not None and result.returncode in (KILLED, 128 - KILLED):
        raise BudgetError(
            f"It was killed for memory in a control group of {format_bytes(limit)}.",
            "Give a greater --limit, or a smaller --ram.",
        )
    lines = result.stdout.splitlines()
    if result.returncode or not lines:
        said = next(reversed(result.stderr.splitlines()), f"exit status {result.returncode}")
        raise ConfigError(f"What was measured failed: {said}", "Its process said more with MOETIER_DEBUG=1.")
    found: dict[str, Any] = json.loads(lines[-1])
    if "error" in found:
        raise MoetierError(*found["error"])
    return found | {"group_peak_bytes": peak, "page_cache": page_cache}
