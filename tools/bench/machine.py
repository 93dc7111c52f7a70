"""The machine that a figure was measured on."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moetier.runtime.config import format_bytes
from moetier.runtime.memory import machine_memory

PACKAGES = ("moetier", "torch", "transformers", "accelerate", "llama_cpp_python")
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")  # that kernels are chosen by


@dataclass(frozen=True, slots=True)
class Machine:
    """``threads`` are torch's, None where it was not used; the disk is the one that the measured files lie on."""

    cpu: str
    features: tuple[str, ...]
    cores: int  # that this process may run on
    threads: int | None
    memory_bytes: int
    kernel: str
    disk: str
    versions: dict[str, str]

    @classmethod
    def here(cls, *, threads: int | None = None, place: Path | None = None, fio: str | None = None) -> Machine:
        """``place``: a file or folder on the disk; ``fio``: its version, where it was used."""
        model, flags = _cpu()
        found = {"python": platform.python_version()} | ({"fio": fio} if fio else {})
        for name in PACKAGES:
            try:
                found[name] = version(name)
            except PackageNotFoundError:  # an optional one
                continue
        return cls(
            cpu=model,
            features=tuple(name for name in FEATURES if name in flags),
            cores=len(os.sched_getaffinity(0)),
            threads=threads,
            memory_bytes=machine_memory(),
            kernel=platform.release(),
            disk=place_of(place) if place is not None else "",
            versions=found,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"features": list(self.features)}

    def text(self) -> str:
        """For people."""
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
    """Its name, and the features that the kernel knows of."""
    known: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        known.setdefault(name.strip(), value.strip())
    return known.get("model name", platform.machine()), set(known.get("flags", known.get("Features", "")).split())


def place_of(place: Path) -> str:
    """The file system of a file or folder, and the block device under it: "ext4 on vda, 252 GiB"."""
    device = place.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = (line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines())
    kind = next((behind.split()[0] for before, behind in mounts if before.split()[2] == number), "a file system")
    block = Path("/sys/dev/block") / number
    if not block.exists():
        return kind
    sectors = int((block / "size").read_text())
    return f"{kind} on {block.resolve().name}, {format_bytes(512 * sectors)}"
