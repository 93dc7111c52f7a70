"""Disks of their own, on loop devices, that are read at a bounded rate, and what of a file is in the page cache."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BLKIO = Path("/sys/fs/cgroup/blkio")  # version 1 of control groups
_LIBRARY = ctypes.CDLL(None, use_errno=True)
_LIBRARY.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


@dataclass(frozen=True)
class ThrottledDisks:
    """Folders on disks, and the control group whose processes read from each disk at a bounded rate."""

    folders: list[Path]
    group: Path

    def command(self, words: Sequence[str]) -> list[str]:
        """Return the words that run a command in the group."""
        return ["sh", "-c", f'echo $$ > "{self.group}/cgroup.procs" && exec "$@"', "sh", *words]


@contextlib.contextmanager
def throttled_disks(place: Path, count: int, *, size: int, rate: int) -> Iterator[ThrottledDisks]:
    """Make ``count`` disks of ``size`` bytes in ``place``, of which ``rate`` bytes a second can be read.

    Raises OSError or CalledProcessError where that is not possible.
    """
    with contextlib.ExitStack() as undo:
        group = BLKIO / f"moetier-{os.getpid()}"
        group.mkdir()
        undo.callback(group.rmdir)
        disks = ThrottledDisks([], group)
        for number in range(count):
            image, folder = place / f"disk-{number}.img", place / f"disk-{number}"
            with image.open("wb") as stream:
                undo.callback(image.unlink)
                stream.truncate(size)
            device = _run("losetup", "--find", "--show", "--direct-io=on", image)
            undo.callback(_run, "losetup", "--detach", device)
            _run("mkfs.ext4", "-q", "-m", "0", device)
            folder.mkdir()
            undo.callback(folder.rmdir)
            _run("mount", device, folder)
            undo.callback(_run, "umount", folder)
            node = Path(device).stat().st_rdev
            (group / "blkio.throttle.read_bps_device").write_text(f"{os.major(node)}:{os.minor(node)} {rate}")
            disks.folders.append(folder)
        yield disks


def cached_part(path: Path) -> float:
    """Return the part of a file that is in the page cache, from 0 to 1.

    A read with RWF_NOWAIT can't say this: the kernel begins to read what is missing, and may be done before it answers.
    """
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, mmap.MAP_PRIVATE) as pages:
        resident = (ctypes.c_ubyte * (-(-len(pages) // mmap.PAGESIZE)))()
        start = (ctypes.c_char * len(pages)).from_buffer(pages)
        status = _LIBRARY.mincore(ctypes.byref(start), len(pages), resident)
        del start  # pages can't be closed while it is exported
    if status:
        raise OSError(ctypes.get_errno(), f"mincore can't say what of {path} is in the page cache")
    return sum(page & 1 for page in resident) / len(resident)


def _run(*words: str | Path) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=True)
    return done.stdout.strip()
