"""Real faults for tests: flipped bits, full disks, disks that fail. Skips, saying why, where one can't be made."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    """Flip a bit of a file at byte ``position``, counted from the end if negative. A second call restores the file."""
    with path.open("r+b") as stream:
        stream.seek(position, os.SEEK_SET if position >= 0 else os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ (1 << bit)]))


@contextlib.contextmanager
def mounted(file_system: str, folder: Path, options: str = "", source: str | Path = "moetier-test") -> Iterator[Path]:
    """A small file system of its own on ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", file_system, *(["-o", options] if options else []), str(source), str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip(f"mounting {file_system} needs root")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"can't mount {file_system}: {result.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def remounted(folder: Path, options: str) -> Iterator[None]:
    """A file system of ``mounted`` with other options meanwhile, such as "ro"."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)


def only(calls: str) -> list[str]:
    """strace's options for system calls by name: the process stops at no others, which would take many times longer."""
    return ["--seccomp-bpf", "-e", f"trace={calls}"]


def strace(options: list[str], script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a Python script under strace; what strace itself says is in ``stderr``."""
    need_strace()
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(
        ["strace", "-f", "-qq", *options, *command], capture_output=True, text=True, check=False, timeout=120
    )


def need_strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    allowed = subprocess.run(["strace", "-qq", "-e", "trace=none", "true"], capture_output=True, check=False)
    if allowed.returncode:
        pytest.skip(f"strace is not allowed here: {allowed.stderr.decode().strip()}")
