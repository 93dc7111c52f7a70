"""Control groups of this process, of versions 1 and 2.

The parameter ``root`` is the folder that holds ``proc/self/cgroup`` and ``sys/fs/cgroup``. It is "/" except in tests.
Kernel documentation: admin-guide/cgroup-v1, admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


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
