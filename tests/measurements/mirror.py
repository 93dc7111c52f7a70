"""Compare decoding from one disk with decoding from two disks of the same rate, one of which has a mirror.

    python tests/measurements/mirror.py DIR [--ram 1420MiB] [--rate 0.5] [--rounds 5]

Makes two disks on loop devices, whose files are in the folder --into. A control group limits the rate of each disk to
--rate GB/s. The model directory is copied to one disk, and a mirror of it is made on the other. Two processes load the
copy, only one of them with the mirror, and decode the same tokens by turns. Prints tokens/s, as medians (least to most)
of the rounds, and the geometric mean of the ratios with its 95 % interval. Needs root, and control groups of version 1.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

from disks import ThrottledDisks, throttled_disks
from pairs import DECODER
from speculation import student

from moetier.tiers.store.folder import MIRRORS
from moetier.tools.convert.mirror_writer import make_mirror
from moetier.tools.convert.model_files import disk_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ram", default="1420MiB", help="for experts (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.5, help="of each disk, in GB/s (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--into", type=Path, default=Path(), help="folder for the disks (default: this one)")
    arguments = parser.parse_args()
    size = disk_bytes(arguments.directory) * 21 // 20 + (256 << 20)
    with (
        tempfile.TemporaryDirectory(dir=arguments.into) as place,
        throttled_disks(Path(place), 2, size=size, rate=int(arguments.rate * 1e9)) as disks,
        contextlib.ExitStack() as ends,
    ):
        one, two = (folder / "model" for folder in disks.folders)
        shutil.copytree(arguments.directory, one)
        (one / MIRRORS).unlink(missing_ok=True)
        measured: dict[str, list[float]] = {"one disk": [], "two disks": []}
        processes = {"one disk": start(ends, disks, one, arguments.ram)}
        make_mirror(one, two)
        processes["two disks"] = start(ends, disks, one, arguments.ram)
        for number in range(arguments.rounds):
            for name in sorted(processes, reverse=number % 2 == 1):
                measured[name].append(1 / decode(processes[name]))
            print(
                f"{number + 1}: {measured['one disk'][-1]:.3f} {measured['two disks'][-1]:.3f}",
                file=sys.stderr,
                flush=True,
            )
    for name, rates in measured.items():
        print(f"{name:<10} {statistics.median(rates):.3f} ({min(rates):.3f} to {max(rates):.3f}) tokens/s")
    ratios = [math.log(two / one) for one, two in zip(measured["one disk"], measured["two disks"], strict=True)]
    mean, half = statistics.fmean(ratios), student(len(ratios) - 1) * statistics.stdev(ratios) / len(ratios) ** 0.5
    print(f"ratio      {math.exp(mean):.3f} ({math.exp(mean - half):.3f} to {math.exp(mean + half):.3f})")


def start(ends: contextlib.ExitStack, disks: ThrottledDisks, directory: Path, ram: str) -> subprocess.Popen[str]:
    """Start a process that has decoded once."""
    words = disks.command([sys.executable, "-c", DECODER, str(directory), ram])
    process = ends.enter_context(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    ends.callback(process.kill)
    decode(process)
    return process


def decode(process: subprocess.Popen[str]) -> float:
    """Return the seconds of a token."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    return float(process.stdout.readline())


if __name__ == "__main__":
    main()
