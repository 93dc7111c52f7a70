"""What a process has resident."""

from __future__ import annotations

from pathlib import Path


def peak_bytes() -> int:
    """The most that this process ever had resident; getrusage's number begins with the process that started it."""
    return _status("VmHWM:")


def resident_bytes() -> int:
    """What this process has resident now."""
    return _status("VmRSS:")


def _status(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024
