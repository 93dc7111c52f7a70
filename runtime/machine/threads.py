"""Choose the number of threads that this process computes with.

By default torch starts a thread for each CPU that the process may run on. It respects CPU affinity and cpusets, but not
the CPU quota of a control group. In a container with a quota of two CPUs on a host of 64 cores it would start 64
threads, and the kernel would stop all of them for most of each scheduling period.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .memory import ControlGroup, control_groups

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # with these variables a user sets torch's number of threads


def usable_cpus(root: Path = Path("/")) -> int:
    """Return how many CPUs this process may use, as limited by CPU affinity and control groups' quotas; at least 1.

    A quota is rounded to the nearest whole number. With more threads than the quota, the kernel stops all of them for a
    part of each period; with fewer, a part of the quota is never used. Rounding costs at most half a CPU either way.
    The affinity already respects the cpuset. ``root`` is as in ``control_groups``.
    """
    return max(1, int(cpu_limit(root)[0] + 0.5))


def cpu_limit(root: Path = Path("/")) -> tuple[float, ControlGroup | None]:
    """Return how many CPUs this process may use, and the control group whose quota that is; None: it is the affinity.

    ``root`` is as in ``control_groups``.
    """
    limits: list[tuple[float, ControlGroup | None]] = [(len(os.sched_getaffinity(0)), None)]
    limits += ((quota, group) for group in control_groups("cpu", root) if (quota := _quota(group)))
    return min(limits, key=lambda limit: limit[0])


def _quota(group: ControlGroup) -> float | None:
    """Return the CPU quota of a control group, such as 1.5 CPUs; None if it has none."""
    try:
        if group.version == 2:
            quota, period = (group.folder / "cpu.max").read_text().split()
        else:
            quota, period = ((group.folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max" for no quota
        return None


def use_threads(threads: int | None = None) -> int:
    """Set the number of threads that torch and moetier's kernels compute with, and return it.

    With None, torch's number is reduced to ``usable_cpus()`` if it is larger. If one of VARIABLES is set, None changes
    nothing.
    """
    import torch  # imported late: commands call ``usable_cpus`` before they import torch

    if threads is None:
        threads = torch.get_num_threads()
        if not any(os.environ.get(name) for name in VARIABLES):
            threads = min(threads, usable_cpus())
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    return threads


@contextmanager
def threads_for(threads: int | None = None) -> Iterator[None]:
    """Compute with ``threads`` threads, as ``use_threads``. If the block raises, the number is again what it was."""
    import torch

    before = torch.get_num_threads()
    use_threads(threads)
    try:
        yield
    except BaseException:
        torch.set_num_threads(before)
        raise
