"""Measuring in a fresh process: the page cache is dropped, and a control group may limit its memory."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetier.runtime.config import format_bytes
from moetier.tiers.errors import BudgetError, ConfigError, MoetierError

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


DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def drop_page_cache(files: Iterable[Path], *, whole: bool) -> str:
    """That of ``files``; with ``whole`` the machine's, so that whatever is read is charged to who reads it, where that
    is allowed. Says which."""
    forget(*files)
    if not whole:
        return "dropped for the model's files"
    try:
        descriptor = os.open(DROP_CACHES, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, b"1")
        finally:
            os.close(descriptor)
    except OSError:
        return "dropped for the model's files, as the machine's can't be"
    return "dropped"


KILLED = -9


def fresh(work: dict[str, Any], *, limit: int | None = None, files: Iterable[Path] = ()) -> dict[str, Any]:
    """What ``child`` says of ``work``, run in a process of its own; before, the page cache is dropped.

    ``files`` are those of the model. With ``limit`` the whole cache is dropped, and the process is in a control group
    of so many bytes, whose peak, pages of files included, is ``group_peak_bytes``. ``page_cache`` says what was
    dropped. Raises MoetierError.
    """
    command = [sys.executable, "-m", "moetier.tools.bench.child"]
    page_cache = drop_page_cache(files, whole=limit is not None)
    with nullcontext() if limit is None else memory_group(limit) as group:
        if group is None:
            result = subprocess.run(command, input=json.dumps(work), capture_output=True, text=True, check=False)
        else:
            result = group.run(command, text=json.dumps(work))
        peak = None if group is None else group.peak
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
