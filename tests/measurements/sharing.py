"""Compare processes that share a daemon with processes that divide the same memory among themselves.

    python tests/measurements/sharing.py DIR --ram 50% --clients 4 --tokens 32

Three ways decode the same prompts, one way after the other, each for ``--rounds`` rounds: ``--clients`` processes with
one daemon of ``--ram``; as many processes without a daemon, each with its share of ``--ram``; and one process with
``--ram`` that decodes all prompts as a batch. Prints tokens/s (all tokens, divided by the time from the common start to
the last end), hit ratios, whether the first two ways made the same tokens, and the sum of the proportional set sizes of
the arena in all processes. With ``--clients 1``, it shows what a daemon costs one process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from moetier.runtime.config import Size
from moetier.tiers.store.folder import read_manifest, store_folder
from moetier.tiers.text import format_bytes

DECODER = Path(__file__).with_name("decoder.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ram", default="50%", help="of the daemon; a share is of all experts (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="of each client and round (default: %(default)s)")
    parser.add_argument("--warm", type=int, default=16, help="tokens before the first round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: %(default)s)")
    arguments = parser.parse_args()
    manifest = read_manifest(store_folder(arguments.directory))
    ram = Size.parse(arguments.ram).of(manifest.stored_bytes)
    print(
        f"machine  {platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, {arguments.threads} threads"
    )
    print(f"model    {manifest.model}: {manifest.record_count} experts, {format_bytes(manifest.stored_bytes)}")
    print(f"budget   {format_bytes(ram)}, {arguments.clients} clients, {arguments.tokens} tokens each")

    common = ["--tokens", str(arguments.tokens), "--warm", str(arguments.warm), "--threads", str(arguments.threads)]
    seeds = list(range(arguments.clients))
    with daemon(arguments.directory, ram) as (folder, pid):
        ways = [["--daemon", str(folder), "--seeds", str(seed)] for seed in seeds]
        shared, pss = measure(arguments, [[*common, *way] for way in ways], arenas_of=pid)
        print(f"arena    {format_bytes(pss[1])}, proportional set sizes over {len(seeds) + 1} processes "
              f"{format_bytes(pss[0])}: {pss[0] / pss[1]:.4f} arenas")  # fmt: skip
    share = ram // len(seeds)
    embedded, _ = measure(arguments, [[*common, "--ram", str(share), "--seeds", str(seed)] for seed in seeds])
    say("daemon", shared)
    say("embedded", embedded)
    print(f"daemon to embedded: {rate(shared) / rate(embedded):.3f}")
    if len(seeds) > 1:
        batch, _ = measure(arguments, [[*common, "--ram", str(ram), "--seeds", *map(str, seeds)]])
        say("batch", batch)
    same = {json.dumps([client["tokens"] for client in one["clients"]]) for one in [*shared, *embedded]}
    print(f"tokens   {'all the same' if len(same) == 1 else 'DIFFERENT'} in {len(shared) + len(embedded)} rounds")


def measure(
    arguments: argparse.Namespace, ways: Sequence[list[str]], arenas_of: int | None = None
) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    """``rounds`` rounds of processes that start together; at their end the arena's proportional and whole size."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(decoder(arguments.directory, way)) for way in ways]
        for client in clients:
            assert client.stdout is not None
            assert client.stdout.readline() == "ready\n", "a process failed"
        rounds = []
        for _ in range(arguments.rounds):
            start = time.perf_counter()
            for client in clients:
                assert client.stdin is not None
                client.stdin.write("go\n")
                client.stdin.flush()
            results = [json.loads(client.stdout.readline()) for client in clients if client.stdout is not None]
            wall = time.perf_counter() - start
            count = sum(len(tokens) for client in results for tokens in client["tokens"])
            rounds.append({"clients": results, "rate": count / wall, "count": count})
        pids = [client.pid for client in clients] + ([arenas_of] if arenas_of else [])
        sizes = (0, 0) if arenas_of is None else (sum(pss(pid) for pid in pids), arena_bytes(arenas_of))
        return rounds, sizes


def rate(rounds: list[dict[str, Any]]) -> float:
    return statistics.median(one["rate"] for one in rounds)


def say(name: str, rounds: list[dict[str, Any]]) -> None:
    rates = [one["rate"] for one in rounds]
    hits = sum(client["hits"] for one in rounds for client in one["clients"])
    misses = sum(client["misses"] for one in rounds for client in one["clients"])
    discarded = sum(client["discarded"] for one in rounds for client in one["clients"])
    decode = [
        1e3 * client["seconds"] / (len(client["tokens"][0]) - 1) for one in rounds for client in one["clients"]
    ]  # milliseconds
    print(
        f"{name:<8} {statistics.median(rates):.3f} tokens/s with prefill ({min(rates):.3f} to {max(rates):.3f}), "
        f"a decode step {statistics.median(decode):.2f} ms ({min(decode):.2f} to {max(decode):.2f}), "
        f"hits {hits / max(hits + misses, 1):.1%}, discarded {discarded}"
    )


@contextlib.contextmanager
def decoder(directory: Path, way: list[str]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(DECODER), str(directory), *way]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


@contextlib.contextmanager
def daemon(directory: Path, ram: int) -> Iterator[tuple[Path, int]]:
    """A daemon of its own; its folder and its process."""
    with tempfile.TemporaryDirectory() as base:
        folder, (reading, writing) = Path(base) / "daemon", os.pipe()
        command = [sys.executable, "-m", "moetier.tools.main", "daemon", str(directory), "--ram", str(ram)]
        command += ["--folder", str(folder), "--ready-fd", str(writing)]
        process = subprocess.Popen(command, pass_fds=[writing], stderr=subprocess.DEVNULL)
        os.close(writing)
        try:
            with os.fdopen(reading) as ready:
                assert ready.readline(), "the daemon did not start"
            yield folder, process.pid
        finally:
            process.terminate()
            process.wait()


def pss(pid: int) -> int:
    """Bytes of the arena's maps in a process, each page divided by how many have it mapped."""
    return 1024 * sum(size for name, size in _maps(pid, "Pss"))


def arena_bytes(pid: int) -> int:
    return 1024 * sum(size for name, size in _maps(pid, "Size"))


def _maps(pid: int, field: str) -> Iterator[tuple[str, int]]:
    name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            name = line
        elif line.startswith(f"{field}:") and "/memfd:moetier-arena" in name:
            yield name, int(line.split()[1])


if __name__ == "__main__":
    main()
