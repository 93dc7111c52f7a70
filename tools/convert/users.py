"""Who uses a model directory at the moment, as far as one may look: what would lose it must not be removed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from moetier.tiers.errors import TargetError


def check_unused(name: str, folder: Path) -> None:
    """Raises TargetError where another process uses the model that is called ``name``."""
    if users := users_of(folder):
        which = "; ".join(f"process {pid} ({command})" for pid, command in users.items())
        raise TargetError(f"{name} is in use: {which}.", "End that first.")


def users_of(folder: Path) -> dict[int, str]:
    """The other processes, as far as one may look at them, that have files of a folder open or mapped: a daemon, a
    server, a conversion. pid -> command line."""
    prefix = f"{folder.resolve()}/"
    mapped = prefix.replace("\n", r"\012")  # as the kernel writes it there
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            opened = any(f"{path}/".startswith(prefix) for path in _opened(process))
            if opened or any(path.startswith(mapped) for path in _mapped(process)):
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                found[int(process.name)] = " ".join(words).strip()[:100]
    return found


def _opened(process: Path) -> Iterator[str]:
    for link in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            yield str(link.readlink())


def _mapped(process: Path) -> Iterator[str]:
    for line in os.fsdecode((process / "maps").read_bytes()).split("\n"):
        yield from line.split(maxsplit=5)[5:]  # address, permissions, offset, device, inode, path
