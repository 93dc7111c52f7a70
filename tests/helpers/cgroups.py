"""Control groups: real ones, which skip, saying why, where none can be made, and trees of files that look like them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moetier.tiers.errors import ConfigError
from moetier.tools.bench.sandbox import MemoryGroup, memory_group

FOR_TORCH = (
    "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"
)  # fmt: skip
FREE = {name: value for name, value in os.environ.items() if name not in FOR_TORCH}


@contextlib.contextmanager
def memory_limit(limit: int) -> Iterator[MemoryGroup]:
    """A control group of ``limit`` bytes without swap."""
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(memory_group(limit))
        except ConfigError as error:
            pytest.skip(error.cause)
        yield group


def write(root: Path, group: str, **files: str) -> None:
    folder = root / "sys/fs/cgroup" / group
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def version_2(root: Path, path: str = "/docker/1", **quotas: str) -> Path:
    """A root where this process is in the group ``path``; ``quotas`` by the group's depth below the top."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"0::{path}\n")
    parts = path.strip("/").split("/")
    for depth in range(len(parts) + 1):
        write(root, "/".join(parts[:depth]), cpu__max=quotas.get(f"at_{depth}", "max 100000"))
    return root


@contextlib.contextmanager
def group_below(top: Path, **files: str) -> Iterator[Path]:
    """A real control group, with an empty one in it."""
    if not os.access(top, os.W_OK):
        pytest.skip(f"no writable control groups at {top}")
    outer = top / f"moetier-test-{os.getpid()}"
    inner = outer / "inner"
    outer.mkdir()
    try:
        for name, text in files.items():
            (outer / name.replace("__", ".")).write_text(text)
        inner.mkdir()
        yield inner
    finally:
        inner.rmdir()
        outer.rmdir()


def run_in(group: Path, code: str, *arguments: object, **variables: str) -> list[str]:
    """Return the lines that ``code`` prints as a process of ``group``."""
    enter = f'echo $$ > "{group}/cgroup.procs" && exec "$@"'
    command = ["/bin/sh", "-c", enter, "sh", sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, env=FREE | variables, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.splitlines()
