"""Measure decoding while other processes keep cores busy, with one or several releases of moetier.

    python tests/measurements/busy.py DIR [--release NAME=INTERPRETER ...] [--busy 0 1 2] [--tokens 64] [--rounds 5]

One process of each release decodes the same tokens (``decoder.py``), by turns. ``--busy`` gives the numbers of busy
processes to try. The default for ``--release`` is the interpreter that runs this script. Prints, for each release and
number: tokens/s, as median (least to most) of the rounds; this median as a share of the one for the first number; and
the slowest step as a multiple of the median step for the first number. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from moetier.runtime.config import Size
from moetier.tiers.store.folder import read_manifest, store_folder

DECODER = Path(__file__).with_name("decoder.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--release",
        nargs="+",
        metavar="NAME=INTERPRETER",
        default=[f"this={sys.executable}"],
        help="(default: this one)",
    )
    parser.add_argument("--ram", default="100%", help="a share is of all experts (default: %(default)s)")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="processes beside (default: 0 1 2)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of each round (default: %(default)s)")
    parser.add_argument("--warm", type=int, default=32, help="tokens before the first round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    ram = Size.parse(arguments.ram).of(read_manifest(store_folder(arguments.directory)).stored_bytes)
    options = ["--ram", ram, "--threads", arguments.threads, "--tokens", arguments.tokens, "--warm", arguments.warm]
    print(f"machine  {platform.machine()}, {os.cpu_count()} CPUs, load before {os.getloadavg()[0]:.2f}")
    durations: dict[tuple[int, str], list[list[float]]] = {}
    with contextlib.ExitStack() as stack:
        releases = dict(release.split("=", 1) for release in arguments.release)
        decoders = {
            name: stack.enter_context(decoder(interpreter, arguments.directory, [*map(str, options)]))
            for name, interpreter in releases.items()
        }
        for busy in arguments.busy:
            with beside(busy):
                for _ in range(arguments.rounds):
                    for name, process in decoders.items():
                        durations.setdefault((busy, name), []).append(steps_of(process))
    (first, *_) = arguments.busy
    for (busy, name), rounds in durations.items():
        rates = [len(steps) / sum(steps) for steps in rounds]
        quiet = statistics.median(len(steps) / sum(steps) for steps in durations[first, name])
        typical = statistics.median(step for steps in durations[first, name] for step in steps)
        slowest = max(step for steps in rounds for step in steps)
        print(
            f"{busy} beside  {name:<8}{statistics.median(rates):7.2f} ({min(rates):.2f} to {max(rates):.2f}) tokens/s, "
            f"{statistics.median(rates) / quiet:.2f} of quiet; the slowest of {sum(map(len, rounds))} steps took "
            f"{slowest / typical:.1f} times the median quiet one"
        )


def steps_of(process: subprocess.Popen[str]) -> list[float]:
    """Seconds of each step of a round."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    steps: list[float] = json.loads(process.stdout.readline())["steps"]
    return steps


@contextlib.contextmanager
def decoder(interpreter: str, directory: Path, options: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [interpreter, str(DECODER), str(directory), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", "the decoder failed"
        yield process
    finally:
        process.communicate()


@contextlib.contextmanager
def beside(count: int) -> Iterator[None]:
    """So many processes that keep a core busy each."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
