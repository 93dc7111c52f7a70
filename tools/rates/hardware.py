"""The machine on which something is measured: its CPU, memory, disk and software, and what else it does meanwhile."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moetier.runtime.machine.memory import ControlGroup, machine_memory
from moetier.runtime.machine.threads import cpu_limit, usable_cpus
from moetier.tiers.text import format_bytes

PACKAGES = ("moetier", "torch", "transformers", "accelerate", "llama_cpp_python")
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")  # kernels are chosen by these
FREE = 0.75  # share of the CPUs for this process; if others leave less, measured speeds are too low
WORKING = (0, 1, 2, 5, 6)  # fields of a CPU in /proc/stat that count its work here, not that of other machines


@dataclass(frozen=True, slots=True)
class Machine:
    """Description of the machine on which something was measured."""

    cpu: str
    features: tuple[str, ...]  # those of FEATURES that the CPU has
    cores: int  # on which this process may run
    threads: int | None  # number of torch's threads; None if torch was not used
    memory_bytes: int
    kernel: str  # release of Linux
    disk: str  # the disk with the measured files, as ``disk_of`` describes it; "" if there are none
    versions: dict[str, str]

    @classmethod
    def here(cls, *, threads: int | None = None, place: Path | None = None, fio: str | None = None) -> Machine:
        """Describe this machine.

        ``place``: a file or folder on the measured disk; ``fio``: version of fio, if it was used.
        """
        model, flags = _cpu()
        versions = {"python": platform.python_version()} | ({"fio": fio} if fio else {})
        for name in PACKAGES:
            try:
                versions[name] = version(name)
            except PackageNotFoundError:  # an optional package
                continue
        return cls(
            cpu=model,
            features=tuple(name for name in FEATURES if name in flags),
            cores=len(os.sched_getaffinity(0)),
            threads=threads,
            memory_bytes=machine_memory(),
            kernel=platform.release(),
            disk=disk_of(place) if place is not None else "",
            versions=versions,
        )

    def text(self) -> str:
        """Return the description as one line."""
        parts = [
            f"{self.cpu} ({', '.join(self.features) or platform.machine()})",
            f"{self.cores} cores" + (f", {self.threads} threads" if self.threads is not None else ""),
            f"{format_bytes(self.memory_bytes)} of memory",
            *([f"disk {self.disk}"] if self.disk else []),
            f"Linux {self.kernel}",
            *(f"{name} {number}" for name, number in self.versions.items()),
        ]
        return f"machine  {'; '.join(parts)}"


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds that the CPUs of this process have worked until now, and how many of them for this process.

    With a quota, only the work of the quota's control group is counted. What uses the CPUs outside it is not seen.
    """

    now: float
    work: float
    own: float  # children that have ended are included

    @classmethod
    def read(cls, root: Path = Path("/")) -> CpuTimes:
        """Read the times from the system. ``root`` is as in ``control_groups``."""
        _, group = cpu_limit(root)
        work = _work_of_machine(root) if group is None else _work_of(group)
        return cls(time.monotonic(), work, sum(os.times()[:4]))

    def used_by_others(self) -> float:
        """Return how many CPUs other processes have used, on average, since these times were read."""
        end = CpuTimes.read()
        others = (end.work - self.work) - (end.own - self.own)
        return max(others, 0.0) / max(end.now - self.now, 1e-3)


def busy(others: float, threads: int | None = None) -> str:
    """Return that other processes used ``others`` CPUs, if that makes measured speeds too low; otherwise "".

    ``threads``: number of threads that computed; None: one for each CPU.
    """
    cpus = usable_cpus()
    wanted = min(threads or cpus, cpus)
    return f"other processes used {others:.1f} of {cpus} CPUs" if cpus - others < FREE * wanted else ""


def _work_of_machine(root: Path) -> float:
    """Return the seconds that this process's CPUs have worked for any process; 0 if that can't be read."""
    cpus = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = [line.split() for line in (root / "proc/stat").read_text().splitlines() if line]
        ticks = sum(int(fields[1 + place]) for fields in lines if fields[0] in cpus for place in WORKING)
        return ticks / os.sysconf("SC_CLK_TCK")
    return 0.0


def _work_of(group: ControlGroup) -> float:
    """Return the seconds that CPUs have worked for the processes of a control group; 0 if that can't be read."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        if group.version == 2:
            stat = dict(line.split() for line in (group.folder / "cpu.stat").read_text().splitlines())
            return int(stat["usage_usec"]) / 1e6
        return int((group.folder / "cpuacct.usage").read_text()) / 1e9
    return 0.0


def _cpu() -> tuple[str, set[str]]:
    """Return the CPU's name, and the features that Linux reports."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields.get("model name", platform.machine()), set(fields.get("flags", fields.get("Features", "")).split())


def disk_of(place: Path) -> str:
    """Return the file system of a file or folder, and the block device under it: "ext4 on vda, 252 GiB"."""
    device = place.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = (line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines())
    file_system = next((after.split()[0] for before, after in mounts if before.split()[2] == number), "a file system")
    block = Path("/sys/dev/block") / number
    if not block.exists():
        return file_system
    return f"{file_system} on {block.resolve().name}, {format_bytes(512 * int((block / 'size').read_text()))}"
