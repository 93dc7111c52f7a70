"""Decoding beside busy processes, with a bounded spin of OpenMP's threads and with OpenMP's own.

    python tests/measurements/busy.py DIR [--busy 0 1 2] [--threads 2] [--tokens 64] [--rounds 5]

One process for each spin decodes the same tokens (``decoder.py``), by turns, beside so many processes that only count.
``bounded`` is what moetier sets (GOMP_SPINCOUNT=2000), ``own`` is libgomp's default, 300,000. Prints tokens/s: medians
(least to most) of the rounds, and each as a share of ``own`` with nothing beside. Nothing else should run.
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
SPINS = {"own": "300000", "bounded": "2000"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
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
    found: dict[tuple[int, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        decoders = {
            spin: stack.enter_context(decoder(arguments.directory, [*map(str, options)], count))
            for spin, count in SPINS.items()
        }
        for busy in arguments.busy:
            with beside(busy):
                for _ in range(arguments.rounds):
                    for spin, process in decoders.items():
                        found.setdefault((busy, spin), []).append(tokens_per_second(process))
    (first, *_) = arguments.busy
    quiet = statistics.median(found[first, "own"])
    for (busy, spin), rates in found.items():
        median = statistics.median(rates)
        spread = f"{median:7.2f} ({min(rates):.2f} to {max(rates):.2f})"
        print(f"{busy} beside  {spin:<8}{spread} tokens/s, {median / quiet:.2f}")


def tokens_per_second(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    found = json.loads(process.stdout.readline())
    return float((len(found["tokens"][0]) - 1) / found["seconds"])


@contextlib.contextmanager
def decoder(directory: Path, options: list[str], spin: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(DECODER), str(directory), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"GOMP_SPINCOUNT": spin},
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
