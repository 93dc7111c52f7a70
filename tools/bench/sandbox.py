"""Run a measurement in a fresh process, with the page cache dropped and, if asked for, its memory limited."""

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

from moetier.tiers.errors import BudgetError, ConfigError, MoetierError
from moetier.tiers.text import format_bytes

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
    """Yield a control group whose processes may use at most ``limit`` bytes of memory, and no swap.

    Raises ConfigError if the control group can't be made.
    """
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
            "Run the command as root, on a system that has the memory controller of cgroups, or leave out --limit.",
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

    Linux counts a cached page only in the control group that read it first. So a run with a limit could otherwise use
    cached pages that do not count against its limit.
    """
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def drop_page_cache(files: Iterable[Path], *, whole: bool) -> str:
    """Drop ``files`` from the page cache. With ``whole``, drop the whole page cache if that is permitted.

    Return a text that says what was dropped.
    """
    forget(*files)
    if not whole:
        return "dropped for the model's files"
    try:
        DROP_CACHES.write_text("1")
    except OSError:
        return "dropped only for the model's files: to drop all of it is not permitted"
    return "dropped"


def run_limited(
    command: Sequence[str], text: str, limit: int | None, *, seconds: float | None = None
) -> tuple[subprocess.CompletedProcess[str], int | None]:
    """Run a command with ``text`` as its standard input; if ``limit`` is given, in a control group of so many bytes.

    Returns the ended process, and the peak memory of the group in bytes, with cached pages of files; None if there is
    no limit. Without a limit, the process is killed after ``seconds``. Raises ConfigError if it was killed, or if the
    control group can't be made.
    """
    if limit is None:
        try:
            return subprocess.run(
                command, input=text, capture_output=True, text=True, check=False, timeout=seconds
            ), None
        except subprocess.TimeoutExpired:
            raise ConfigError(
                f"The measuring process did not end within {seconds:.0f} s.",
                "Measure a smaller model, or use moetier bench decode, which takes the time that it needs.",
            ) from None
    with memory_group(limit) as group:
        return group.run(command, text=text), group.peak


def fresh(
    work: dict[str, Any], *, limit: int | None = None, files: Iterable[Path] = (), seconds: float | None = None
) -> dict[str, Any]:
    """Drop the page cache, run ``work`` in a process of its own, and return the result that ``child`` prints.

    ``files``: files of the model. If ``limit`` is None, only these are dropped. Otherwise the whole page cache is
    dropped, and the process runs in a control group of ``limit`` bytes; ``group_peak_bytes`` in the result is the peak
    memory of this group, with cached pages of files. ``page_cache`` in the result says what was dropped. ``seconds`` is
    as in ``run_limited``. Raises MoetierError if the process fails.
    """
    command = [sys.executable, "-m", "moetier.tools.bench.child"]
    page_cache = drop_page_cache(files, whole=limit is not None)
    result, peak = run_limited(command, json.dumps(work), limit, seconds=seconds)
    if limit is not None and result.returncode in (KILLED, 128 - KILLED):
        raise BudgetError(
            f"The process ran out of memory in a control group of {format_bytes(limit)}, and was killed.",
            "Give a greater --limit, or a smaller --ram.",
        )
    lines = result.stdout.splitlines()
    if result.returncode or not lines:
        said = next(reversed(result.stderr.splitlines()), f"exit status {result.returncode}")
        raise ConfigError(
            f"The measuring process failed: {said}", "Check that moetier generate works with the same model."
        )
    printed: dict[str, Any] = json.loads(lines[-1])
    if "error" in printed:
        raise MoetierError(*printed["error"])
    return printed | {"group_peak_bytes": peak, "page_cache": page_cache}
