"""Memory that this process may use, and the memory budgets of tiers.

psutil sees the machine, but not the control group in which a container or a service runs. So the limits of control
groups, versions 1 and 2, are read here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from moetier.runtime.config import DEFAULT_SHARE, GROUP_SHARE, Size
from moetier.tiers.errors import BudgetError, MoetierError
from moetier.tiers.text import format_bytes


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """Control group that limits this process: its own group, or a parent of it.

    ``name`` is text for a user, and always names the process's own group. ``folder`` is the group's folder.
    """

    name: str
    folder: Path
    version: int


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[ControlGroup]:
    """Yield the groups of ``controller`` ("memory", "cpu") that limit this process: its own first, then the parents."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            top, version = root / "sys/fs/cgroup" / controller, 1
            if not top.is_dir():  # mounted together as "cpu,cpuacct"; most systems have links from "cpu" and "cpuacct"
                top = top.with_name(controllers)
        elif not controllers:
            top, version = root / "sys/fs/cgroup", 2
        else:
            continue
        group = top / path.lstrip("/")
        # in a container, the path is the one on the host, and the group itself is mounted as ``top``
        if not group.is_dir():
            group = top
        for folder in (group, *group.parents):
            yield ControlGroup(f"the control group {path}", folder, version)
            if folder == top:
                break


MARGIN_SHARE = 1 / 64  # share of the free memory: page tables and the kernel's index grow with the mapped memory
MARGIN_BYTES = 16 << 20  # for memory that the kernel charges in batches for each core, and stacks of loader threads
# anonymous memory of a command: Python, torch, transformers, a tokenizer and compiled products, without a model
PROCESS_BYTES = 250 << 20
MIN_BYTES = 1024  # a smaller budget was probably given without its unit: "6" for "6GiB"
# what libraries and Python say when memory, address space or a thread can't be allocated
_ALLOCATES = re.compile(
    r"allocate memory|failed to map segment|start new thread|std::bad_alloc|out of memory", re.IGNORECASE
)
_NO_LIMIT = 1 << 60  # version 1 of control groups writes a huge number for "no limit"
# for each version of control groups: the files with a group's limit and usage, and the prefix of the entries of
# memory.stat that include the group's children
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: ("memory.max", "memory.current", ""),
}


@dataclass(frozen=True, slots=True)
class Available:
    """Amount of memory in bytes. ``limiter`` tells a user which machine, control group or device limits it.

    ``share`` is the part of it, from 0 to 1, that a budget takes by default.
    """

    bytes: int
    limiter: str
    share: float = DEFAULT_SHARE


def machine_memory() -> int:
    """Return the bytes of memory that this machine has."""
    return int(psutil.virtual_memory().total)


def available_memory(root: Path = Path("/")) -> Available:
    """Return how much more memory this process can allocate: the least that the machine or a control group leaves.

    The page cache counts as free, because the kernel can drop it. ``root`` is as in ``control_groups``.
    """
    return _least(int(psutil.virtual_memory().available), _left, root)


def memory_for_model(root: Path = Path("/")) -> Available:
    """Return the memory that is left for a model once Python, torch and transformers (PROCESS_BYTES) are loaded."""
    left = available_memory(root)
    missing = max(PROCESS_BYTES - _own_bytes("RssAnon"), 0)
    return replace(left, bytes=max(left.bytes - missing, 0))


def shortage() -> str:
    """Return a warning if Python, torch and transformers do not fit into the memory that is left; else ""."""
    left = available_memory()
    if left.bytes >= PROCESS_BYTES - _own_bytes("RssAnon"):
        return ""
    return (
        f"Only {format_bytes(left.bytes)} of the memory of {left.limiter} are free, but Python, torch and transformers "
        f"alone take {format_bytes(PROCESS_BYTES)}. The process may be killed."
    )


def shortage_in(error: BaseException) -> BudgetError | None:
    """Return an error that says that memory, or a thread, could not be allocated, if that has caused ``error``."""
    cause: BaseException | None = error
    while cause is not None and not _is_shortage(cause):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    said = next((f": {line.strip().rstrip('.')}" for line in str(cause).splitlines() if _ALLOCATES.search(line)), "")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    raised = "raise the limits of this process or its control group"
    if limit != resource.RLIM_INFINITY:
        raised = f"raise the limit on the process's address space (ulimit -v), which is {format_bytes(limit)}"
    return BudgetError(
        f"Memory could not be allocated{said}.",
        f"Free some memory, {raised}, or give smaller values of `ram` and `context`.",
    )


def _is_shortage(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # libraries raise OSError without a number, ImportError, RuntimeError, or errors of their own
    said = "" if isinstance(error, MoetierError) else str(error)
    is_limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    return _ALLOCATES.search(said) is not None or (is_limited and "could not create a primitive" in said)  # oneDNN


def peak_bytes() -> int:
    """Return the peak resident memory of this process, in bytes. (getrusage may return the peak of its parent.)"""
    return _own_bytes("VmHWM")


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    return _own_bytes("VmRSS")


def _own_bytes(name: str) -> int:
    """Return the entry ``name`` of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def whole_memory(root: Path = Path("/")) -> Available:
    """Return how much memory this process could allocate if none were in use."""
    return _least(machine_memory(), _limit, root)


def exceeded(asked: Size | None) -> Available | None:
    """Return ``whole_memory()`` if the size ``asked`` is more than that; else None."""
    whole = whole_memory()
    return whole if asked is not None and asked.of(whole.bytes) > whole.bytes else None


def _least(of_machine: int, of_group: Callable[[ControlGroup], int | None], root: Path) -> Available:
    """Return the smallest of ``of_machine`` and of the results of ``of_group`` for the control groups of this process.

    Both are in bytes. ``of_group`` returns None for a group without a limit.
    """
    limits = [Available(of_machine, "this machine")]
    for group in control_groups("memory", root):
        with contextlib.suppress(OSError, ValueError):  # a file is missing, or not as the kernel writes it
            if (count := of_group(group)) is not None:
                limits.append(Available(max(count, 0), group.name, GROUP_SHARE))
    return min(limits, key=lambda available: available.bytes)


def _left(group: ControlGroup) -> int | None:
    """Return the bytes that a group's limit leaves free; None if it has no limit."""
    _, usage_name, prefix = _FILES[group.version]
    usage = int((group.folder / usage_name).read_text())
    stat = dict(line.split() for line in (group.folder / "memory.stat").read_text().splitlines())
    droppable = sum(int(stat.get(f"{prefix}{name}_file", 0)) for name in ("inactive", "active"))
    limit = _limit(group)
    return None if limit is None else limit - (usage - droppable)


def _limit(group: ControlGroup) -> int | None:
    """Return the limit of a group in bytes; None if it has none."""
    text = (group.folder / _FILES[group.version][0]).read_text().strip()
    return None if text == "max" or int(text) >= _NO_LIMIT else int(text)


def usable(left: int) -> int:
    """Return how many of ``left`` free bytes can be allocated: the margin is for the kernel and for stacks."""
    return int(left * (1 - MARGIN_SHARE)) - MARGIN_BYTES


def budget_for(
    asked: Size | None,
    *,
    smallest: int,
    largest: int,
    reserve: int,
    available: Available,
    name: str = "ram",
) -> int:
    """Return the budget of the host tier or of the device tier, in bytes.

    Args:
        asked: what the user has given: a size, a share of the most that can be allocated, or None for the default.
        smallest: the smallest number of bytes with which the tier works.
        largest: the largest number of bytes that the tier can use.
        reserve: bytes of ``available`` to leave for the KV cache and for computing. ``usable`` says how many of the
            rest can be allocated.
        available: the memory that is free now.
        name: the option, for errors: "ram" or "device_memory".

    Raises:
        BudgetError: no budget is possible, or the one that was asked for is too small or too large.
    """
    most = usable(available.bytes - reserve)
    if most < smallest:
        shorter = "shorten `context`, " if reserve else ""
        raise BudgetError(
            f"Of the {format_bytes(available.bytes)} that {available.limiter} leaves, "
            f"{format_bytes(available.bytes - most)} are needed for the KV cache, computing and the kernel. The rest "
            f"is less than the {format_bytes(smallest)} that the experts of one token in one block take.",
            f"Free some memory, raise the limit, {shorter}or convert the model to fewer bits.",
        )
    if asked is None:
        return min(largest, max(smallest, int(most * available.share)))
    asked_bytes = asked.of(most)
    budget = min(asked_bytes, largest)
    if not smallest <= budget <= most:
        what = "too small" if budget < smallest else f"more than {available.limiter} leaves for experts"
        ends = (f"{count} bytes ({format_bytes(count)})" for count in (smallest, min(largest, most)))
        meant = f"Did you mean {asked.bytes}GiB? " if asked.bytes is not None and asked.bytes < MIN_BYTES else ""
        raise BudgetError(
            f"`{name}` of {format_bytes(asked_bytes)} is {what}.", f"{meant}Give `{name}` from {' to '.join(ends)}."
        )
    return budget


def mapped_files(process: str = "self") -> Iterator[tuple[range, str]]:
    """Yield the addresses and the path of each mapped file of ``process``, a process id or "self".

    A path is written as in /proc/PID/maps (proc(5)).
    """
    for line in os.fsdecode(Path("/proc", process, "maps").read_bytes()).split("\n"):
        fields = line.split(maxsplit=5)  # address, permissions, offset, device, inode, path
        if len(fields) == 6 and fields[4] != "0":
            start, end = fields[0].split("-")
            yield range(int(start, 16), int(end, 16)), fields[5]
