"""Memory that this process may use, and the budgets that fit it.

psutil sees the machine and not the control group that a container or a service runs in, so the limits of both versions
of control groups are read here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from moetier.tiers.errors import BudgetError

from .config import Size, format_bytes
from .control_groups import ControlGroup, control_groups

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
    """Return the bytes of memory that this machine has."""
    return int(psutil.virtual_memory().total)


def available_memory(root: Path = Path("/")) -> Available:
    """Return the least of what the machine has free and of what each control group above this process leaves.

    ``root`` holds ``proc/self/cgroup`` and ``sys/fs/cgroup``. Pages of files count as free: they can be dropped.
    """
    return _least(int(psutil.virtual_memory().available), _left, root)


def memory_for_model(root: Path = Path("/")) -> Available:
    """Return the memory left for a model after the libraries that compute with it (PROCESS_BYTES) are loaded."""
    left = available_memory(root)
    missing = max(PROCESS_BYTES - _own_bytes("RssAnon"), 0)
    return Available(max(left.bytes - missing, 0), left.limiter)


def shortage(root: Path = Path("/")) -> str:
    """Return a warning if the libraries that compute with a model do not fit into what is left, else ""."""
    left = available_memory(root)
    if left.bytes >= PROCESS_BYTES - _own_bytes("RssAnon"):
        return ""
    return (
        f"Only {format_bytes(left.bytes)} of memory are left by {left.limiter}, and Python, torch and transformers "
        f"alone take {format_bytes(PROCESS_BYTES)}: the process may be killed."
    )


def peak_bytes() -> int:
    """Return the most bytes that this process ever had resident; getrusage counts those of its parent too."""
    return _own_bytes("VmHWM")


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    return _own_bytes("VmRSS")


def _own_bytes(name: str) -> int:
    """Return a size of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def whole_memory(root: Path = Path("/")) -> Available:
    """Return what ``available_memory`` would with nothing in use."""
    return _least(machine_memory(), _limit, root)


def exceeded(asked: Size | None) -> Available | None:
    """Return ``whole_memory`` if more than that is asked for."""
    there = whole_memory()
    return there if asked is not None and asked.of(there.bytes) > there.bytes else None


def _least(of_machine: int, of_group: Callable[[ControlGroup], int | None], root: Path) -> Available:
    """Return the least of the machine's bytes and of those of each control group above this process."""
    found = [Available(of_machine, "this machine")]
    for group in control_groups("memory", root):
        with contextlib.suppress(OSError, ValueError):  # a file is missing, or not as the kernel writes it
            if (count := of_group(group)) is not None:
                found.append(Available(max(count, 0), group.name))
    return min(found, key=lambda available: available.bytes)


def _left(group: ControlGroup) -> int | None:
    """Bytes that a group leaves; None where it has no limit."""
    _, usage_name, prefix = _FILES[group.version]
    usage = int((group.folder / usage_name).read_text())
    stat = dict(line.split() for line in (group.folder / "memory.stat").read_text().splitlines())
    droppable = sum(int(stat.get(f"{prefix}{name}_file", 0)) for name in ("inactive", "active"))
    limit = _limit(group)
    return None if limit is None else limit - (usage - droppable)


def _limit(group: ControlGroup) -> int | None:
    """Bytes of a group's limit; None where it has none."""
    text = (group.folder / _FILES[group.version][0]).read_text().strip()
    return None if text == "max" or int(text) >= _NO_LIMIT else int(text)


def budget_for(
    asked: Size | None,
    *,
    smallest: int,
    largest: int,
    reserve: int,
    available: Available,
    name: str = "ram",
) -> int:
    """Return the bytes of the host tier, or of the device tier.

    Args:
        asked: what the user wants: a size, a share of the most that can be allocated, or None for the default share.
        smallest: the least bytes with which the tier works.
        largest: the most bytes that it can make use of.
        reserve: bytes to leave for the KV cache and for computing. The most is what is left then, less a margin.
        available: what there is now.
        name: the option, for errors: "ram" or "device_memory".

    Raises:
        BudgetError: no budget works, or not the one that was asked for.
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


def mapped_files(process: str = "self") -> Iterator[tuple[range, str]]:
    """Yield the addresses and the path of each mapped file of a process, as the kernel writes paths (proc(5))."""
    for line in os.fsdecode(Path("/proc", process, "maps").read_bytes()).split("\n"):
        fields = line.split(maxsplit=5)  # address, permissions, offset, device, inode, path
        if len(fields) == 6 and fields[4] != "0":
            start, end = fields[0].split("-")
            yield range(int(start, 16), int(end, 16)), fields[5]
