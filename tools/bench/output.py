"""Options, alternating runs and output that all ``moetier bench`` commands share.

The things that are compared are called ways. Each way runs once in each round. The order changes from round to round,
so that fluctuations of the machine affect all ways alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from moetier.runtime.config import format_bytes
from moetier.runtime.machine.memory import machine_memory
from moetier.runtime.options import COUNT
from moetier.tiers.errors import TargetError
from moetier.tools.cli.report import table

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spread:
    """Values of several runs."""

    runs: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Make a spread of any number of values."""
        return cls(tuple(values))

    @property
    def median(self) -> float:
        """Median of the runs."""
        return statistics.median(self.runs)

    @property
    def min(self) -> float:
        """Least of the runs."""
        return min(self.runs)

    @property
    def max(self) -> float:
        """Greatest of the runs."""
        return max(self.runs)

    def to_json(self) -> dict[str, Any]:
        """Return median, range and all runs as JSON."""
        return {"median": self.median, "min": self.min, "max": self.max, "runs": list(self.runs)}

    def text(self, unit: float = 1.0, digits: int = 2) -> str:
        """Return the median and the range in multiples of ``unit``: "1.20 (1.10 to 1.30)"."""
        middle, low, high = (f"{value / unit:.{digits}f}" for value in (self.median, self.min, self.max))
        return middle if len(self.runs) == 1 else f"{middle} ({low} to {high})"


def alternate(rounds: int, ways: Mapping[K, Callable[[], T]]) -> dict[K, list[T]]:
    """Run each of ``ways`` once in each round. Return the results of each way, in the order of the rounds.

    Each round begins with another way; every second round goes through the ways in reverse.
    """
    found: dict[K, list[T]] = {name: [] for name in ways}
    names = [*ways]
    for number in range(rounds):
        first = number % len(names)
        order = names[first:] + names[:first]
        for name in order if number % 2 == 0 else reversed(order):
            found[name].append(ways[name]())
    return found


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
        found = {"python": platform.python_version()} | ({"fio": fio} if fio else {})
        for name in PACKAGES:
            try:
                found[name] = version(name)
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
            versions=found,
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
    known: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        known.setdefault(name.strip(), value.strip())
    return known.get("model name", platform.machine()), set(known.get("flags", known.get("Features", "")).split())


def place_of(place: Path) -> str:
    """Return the file system of a file or folder, and the block device under it: "ext4 on vda, 252 GiB"."""
    device = place.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = (line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines())
    kind = next((behind.split()[0] for before, behind in mounts if before.split()[2] == number), "a file system")
    block = Path("/sys/dev/block") / number
    if not block.exists():
        return kind
    sectors = int((block / "size").read_text())
    return f"{kind} on {block.resolve().name}, {format_bytes(512 * sectors)}"


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all `moetier bench` commands share."""
    parser.add_argument(
        "--rounds",
        type=COUNT,
        default=3,
        metavar="N",
        help="times that everything is run, by turns (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file, as one JSON object")


def check_bench(arguments: argparse.Namespace) -> None:
    """Raise TargetError if the folder of the --json file does not exist. Call this before measuring."""
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise TargetError(
            f"There is no folder {arguments.json.parent}.", "Make it, or give --json a path in another folder."
        )


def report(
    arguments: argparse.Namespace,
    machine: Machine,
    rows: list[list[str]],
    results: list[dict[str, Any]],
    *,
    notes: list[str] | None = None,
    **more: Any,
) -> int:
    """Print the machine, the table ``rows`` and the ``notes``. With --json, write the results to a file too. Return 0.

    The file has the machine, the notes, ``results`` (a JSON object for each row of the table) and the fields ``more``.
    """
    from moetier.tiers.store.atomic import write_durably

    print(machine.text())
    print(f"rounds   {arguments.rounds}: median (least to most)")
    print(table(rows))
    for note in notes or []:
        print(note)
    if arguments.json is not None:
        document = {
            "command": arguments.what,
            "rounds": arguments.rounds,
            "machine": asdict(machine),
            "notes": notes or [],
            **more,
            "results": results,
        }
        write_durably(arguments.json, json.dumps(document, indent=2).encode() + b"\n")
    return 0
