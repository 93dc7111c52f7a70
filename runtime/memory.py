"""What memory there is for this process, and which budgets work.

psutil sees the machine and not the control group that a container or a service runs in, so the limits of both versions
of control groups are read here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from moetier.tiers.errors import BudgetError

from .config import Size, format_bytes
from .control_groups import control_groups

DEFAULT_SHARE = 0.8  # of what is left: a page cache, a second program and a longer context need some too
MARGIN_SHARE = 1 / 64  # of what is left: page tables and the kernel's index of shared memory grow with what is mapped
MARGIN_BYTES = 16 << 20  # the kernel charges in batches for each core, and the loaders have stacks
PROCESS_BYTES = 330 << 20  # anonymous: Python, torch, transformers and a tokenizer, beside a model
LEAST_BYTES = 10_000  # a number below that was given without its unit
_NO_LIMIT = 1 << 60  # version 1 writes a huge number where there is none
# by version: the files of a group's limit and usage, and the prefix of the names in memory.stat that count its children
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: ("memory.max", "memory.current", ""),
}


@dataclass(frozen=True, slots=True)
class Available:
    """``bytes`` more can be allocated; ``limiter`` says by whom that is limited."""

    bytes: int
    limiter: str


def machine_memory() -> int:
    """Bytes of memory that this machine has."""
    return int(psutil.virtual_memory().total)


def available_memory(root: Path = Path("/")) -> Available:
    """The least of what the machine has free and of what each control group above this process leaves.

    ``root`` holds ``proc/self/cgroup`` and ``sys/fs/cgroup``. Pages of files count as free: they can be dropped.
    """
    left = [
        Available(max(count, 0), group.name)
        for group in control_groups("memory", root)
        if (count := _left(group.folder, *_FILES[group.version])) is not None
    ]
    return min([Available(psutil.virtual_memory().available, "this machine"), *left], key=_bytes)


def memory_for_model(root: Path = Path("/")) -> Available:
    """Return the memory left for a model after the libraries that compute with it (PROCESS_BYTES) are loaded."""
    left = available_memory(root)
    missing = max(PROCESS_BYTES - _own_bytes("RssAnon"), 0)
    return Available(max(left.bytes - missing, 0), left.limiter)


def shortage(root: Path = Path("/")) -> str:
    """Why this process may be killed while it imports the libraries that compute with a model; "" where they fit."""
    left = available_memory(root)
    if left.bytes >= PROCESS_BYTES - _own_bytes("RssAnon"):
        return ""
    return (
        f"Only {format_bytes(left.bytes)} of memory are left by {left.limiter}, and Python, torch and transformers "
        f"alone take {format_bytes(PROCESS_BYTES)}: the process may be killed."
    )


def peak_bytes() -> int:
    """The most that this process ever had resident; getrusage's number begins with the process that started it."""
    return _own_bytes("VmHWM")


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    return _own_bytes("VmRSS")


def _own_bytes(name: str) -> int:
    """A size that /proc/self/status has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def whole_memory(root: Path = Path("/")) -> Available:
    """The same, but with nothing in use."""
    groups = [
        Available(limit, group.name)
        for group in control_groups("memory", root)
        if (limit := _limit(group.folder / _FILES[group.version][0])) is not None
    ]
    return min([Available(machine_memory(), "this machine"), *groups], key=_bytes)


def exceeded(asked: Size | None) -> Available | None:
    """What there is in all, where more is asked for."""
    there = whole_memory()
    return there if asked is not None and asked.of(there.bytes) > there.bytes else None


def _bytes(known: Available) -> int:
    return known.bytes


def _left(folder: Path, limit_name: str, usage_name: str, prefix: str) -> int | None:
    """Bytes that a group leaves; None where it has no limit."""
    try:
        usage = int((folder / usage_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if (limit := _limit(folder / limit_name)) is None:
        return None
    droppable = sum(int(stat.get(f"{prefix}{name}_file", 0)) for name in ("inactive", "active"))
    return limit - (usage - droppable)


def _limit(file: Path) -> int | None:
    """Bytes; None where there is none."""
    try:
        text = file.read_text().strip()
        return None if text == "max" or int(text) >= _NO_LIMIT else int(text)
    except (OSError, ValueError):
        return None


def budget_for(
    asked: Size | None,
    *,
    smallest: int,
    largest: int,
    reserve: int,
    available: Available,
    name: str = "ram",
) -> int:
    """Bytes for the host tier, or for the device tier, whose parameter has the ``name`` device_memory.

    ``smallest`` and ``largest`` are what the tier can work with and make use of; ``reserve`` is kept for the KV cache
    and for computing. What is left then, less a margin, is the most that can be allocated, and what a share is of.
    Raises BudgetError when nothing works, or when what was asked for doesn't.
    """
    left = available.bytes - reserve
    most = int(left * (1 - MARGIN_SHARE)) - MARGIN_BYTES
    if most < smallest:
        shorter = "shorten `context`, " if reserve else ""
        raise BudgetError(
            f"Of the {format_bytes(available.bytes)} that {available.limiter} leaves, "
            f"{format_bytes(available.bytes - most)} are for the KV cache, computing and the kernel: "
            f"too little for the {format_bytes(smallest)} of a token's experts of a block.",
            f"Free some memory, raise the limit, {shorter}or convert the model to fewer bits.",
        )
    if asked is None:
        return min(largest, max(smallest, int(most * DEFAULT_SHARE)))
    budget = min(asked.of(most), largest)
    if not smallest <= budget <= most:
        what = "too small" if budget < smallest else f"more than {available.limiter} leaves for experts"
        ends = (f"{count} bytes ({format_bytes(count)})" for count in (smallest, min(largest, most)))
        meant = f"Did you mean {asked.bytes}GiB? " if asked.bytes is not None and asked.bytes < LEAST_BYTES else ""
        raise BudgetError(
            f"`{name}` of {format_bytes(budget)} is {what}.", f"{meant}Give `{name}` from {' to '.join(ends)}."
        )
    return budget


def mapped_files() -> list[range]:
    """The addresses at which this process has files mapped."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            start, end = addresses.split("-")
            found.append(range(int(start, 16), int(end, 16)))
    return found
