"""Number of threads that this process computes with.

torch takes one for each CPU that the process may run on. It knows affinity and cpusets, but no quota of a control
group: in a container with two CPUs' time on a host of 64 cores it would begin 64 threads, which the kernel stops for
most of each period while they wait for each other.
"""

from __future__ import annotations

import os
from pathlib import Path

import moetier

from .control_groups import control_groups

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by which a user says the number, and torch takes it


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use, by its affinity, its cpuset, and the quotas of its control groups; at least 1.

    ``root`` is as in ``control_groups``. A quota is rounded to the nearest whole number: with more threads than the
    quota they are all stopped for a part of each period, with fewer a part of the quota is never used; half a CPU is
    the most that either costs then. The kernel applies a cpuset to the affinity, so that nothing else is read of it.
    """
    cpus = len(os.sched_getaffinity(0))
    quotas = [quota for group in control_groups("cpu", root) if (quota := _quota(group.folder, group.version))]
    return max(1, min(cpus, *(int(quota + 0.5) for quota in quotas))) if quotas else cpus


def _quota(folder: Path, version: int) -> float | None:
    """CPUs' time that a group may use; None without a limit."""
    try:
        if version == 2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number
        return None


def use_threads(threads: int | None = None) -> int:
    """Set how many threads torch, and with it this process, computes with; return the number.

    None keeps what torch has, but no more than ``usable_cpus``; a number that the environment gives stays as it is.
    """
    import torch  # here: commands ask for CPUs before they import it

    if threads is None:
        threads = torch.get_num_threads()
        if not any(os.environ.get(name) for name in VARIABLES):
            threads = min(threads, usable_cpus())
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    return threads


def spin_as_others_do() -> None:
    """Take back the spin of OpenMP that ``import moetier`` set, before a library is loaded: another engine is measured
    as its own users run it."""
    if os.environ.get("GOMP_SPINCOUNT") == moetier._SPIN:
        del os.environ["GOMP_SPINCOUNT"]
