"""Description of the machine on which something is measured: CPU, memory, disk, and versions of software."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moetier.runtime.machine.memory import machine_memory
from moetier.tiers.text import format_bytes

PACKAGES = ("moetier", "torch", "transformers", "accelerate", "llama_cpp_python")
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")  # kernels are chosen by these


@dataclass(frozen=True, slots=True)
class Machine:
    """Description of the machine on which something was measured."""

    cpu: str
    features: tuple[str, ...]  # those of FEATURES that the CPU has
    cores: int  # on which this process may run
    threads: int | None  # number of torch's threads; None if torch was not used
    memory_bytes: int
    kernel: str  # release of Linux
    disk: str  # the disk with the measured files, as ``place_of`` describes it; "" if there are none
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
            disk=place_of(place) if place is not None else "",
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


def _cpu() -> tuple[str, set[str]]:
    """Return the CPU's name, and the features that Linux reports."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields.get("model name", platform.machine()), set(fields.get("flags", fields.get("Features", "")).split())


def place_of(place: Path) -> str:
    """Return the file system of a file or folder, and the block device under it: "ext4 on vda, 252 GiB"."""
    device = place.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = (line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines())
    file_system = next((after.split()[0] for before, after in mounts if before.split()[2] == number), "a file system")
    block = Path("/sys/dev/block") / number
    if not block.exists():
        return file_system
    return f"{file_system} on {block.resolve().name}, {format_bytes(512 * int((block / 'size').read_text()))}"
