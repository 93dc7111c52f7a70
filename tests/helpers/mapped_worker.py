"""A client of a daemon in a process of its own: a program that workers.py starts. Reads commands as lines of its
standard input, answers each with a line of JSON.

A *check* computes on a record as a model would: slowly enough that it may be replaced meanwhile. It uses what it
found only if the lease held, and what it used must be right.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import google_crc32c

from moetier.runtime.client.mapped_arena import Proof
from moetier.runtime.client.tier import DaemonTier
from moetier.tiers.errors import MoetierError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import Lease
from moetier.tiers.store.folder import read_manifest, store_folder


class Worker:
    def __init__(self, folder: Path, directory: Path, truth: Path, fallback: Path, timeout: float) -> None:
        self.manifest = read_manifest(store_folder(directory))
        words = truth.read_text().split()
        keys = [ExpertKey(b, e) for b, block in enumerate(self.manifest.blocks) for e in range(block.experts)]
        self.truth = dict(zip(keys, map(int, words), strict=True))
        self.random = random.Random(os.getpid())
        self.used = self.thrown = self.wrong = 0
        self.open_leases: list[Generator[Lease[memoryview], None, None]] = []
        self._open = lambda: DaemonTier.open(folder, fallback, self.manifest, timeout=timeout)
        self._tier: DaemonTier | None = None

    @property
    def tier(self) -> DaemonTier:
        if self._tier is None:
            self._tier = self._open()
        return self._tier

    def open(self) -> None:
        _ = self.tier

    def close(self) -> None:
        for leases in self.open_leases:
            leases.close()
        self.open_leases.clear()
        if self._tier is not None:
            self._tier.close()
            self._tier = None

    # -- commands -----------------------------------------------------------------------------------------------------

    def take(self, block: int, *experts: int) -> list[int]:
        """Checks them; the experts in order of arrival."""
        return [key.expert for key in self._check(block, list(experts), pause=0.0)]

    def work(self, seconds: float, pause: float = 0.0) -> None:
        """Checks random experts; a check lasts ``pause`` seconds or longer."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            block = self.random.randrange(len(self.manifest.blocks))
            entry = self.manifest.blocks[block]
            wanted = self.random.sample(range(entry.experts), self.random.randint(1, entry.top_k))
            if self.random.random() < 0.1:
                self.tier.prefetch(block, [ExpertKey(block, self.random.randrange(entry.experts))])
            arrived = self._check(block, wanted, pause)
            assert sorted(key.expert for key in arrived) == sorted(wanted), f"{arrived} for {wanted}"

    def hold(self, block: int, *experts: int) -> int:
        """Keeps one lease of them, the others granted or on their way."""
        leases = self.tier.acquire([ExpertKey(block, expert) for expert in experts])
        self.open_leases.append(leases)
        return next(leases).key.expert

    def drop(self) -> None:
        for leases in self.open_leases:
            leases.close()
        self.open_leases.clear()

    def break_proof(self) -> None:
        """Let every lease be valid from now on, whatever the generations say."""
        Proof.__call__ = lambda self: True  # type: ignore[method-assign]

    def fork_hold(self, block: int, *experts: int) -> int:
        """A child of this process, which has not opened a tier, holds a lease for ever; its process id."""
        assert self._tier is None
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            self.hold(block, *experts)
            os.write(writing, b"x")
            while True:
                signal.pause()
        os.close(writing)
        try:
            assert os.read(reading, 1) == b"x"
        finally:
            os.close(reading)
        return child

    def fork_sleep(self) -> int:
        """A child of this process, which has its tier open, that does nothing; its process id."""
        self.open()
        child = os.fork()
        if not child:
            while True:
                signal.pause()
        return child

    def reap(self, child: int) -> int:
        return os.waitpid(child, 0)[1]

    def stats(self) -> dict[str, Any]:
        counters = asdict(self.tier.stats()) | {"connections": self.tier.connections}
        return counters | {"used": self.used, "thrown": self.thrown, "wrong": self.wrong}

    def census(self) -> dict[str, Any]:
        """Return the numbers of open descriptors, maps and threads of this process."""
        maps = sum("/memfd:moetier-arena" in line for line in Path("/proc/self/maps").read_text().splitlines())
        threads = len(list(Path("/proc/self/task").iterdir()))
        return {"descriptors": len(list(Path("/proc/self/fd").iterdir())), "maps": maps, "threads": threads}

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check(self, block: int, experts: list[int], pause: float) -> list[ExpertKey]:
        arrived = []
        with contextlib.closing(self.tier.acquire([ExpertKey(block, expert) for expert in experts])) as leases:
            for lease in leases:
                first = bytes(lease.record[: len(lease.record) // 2])
                if pause:
                    time.sleep(pause)
                crc = google_crc32c.extend(google_crc32c.value(first), bytes(lease.record[len(first) :]))
                if not lease.validate():
                    self.thrown += 1
                    continue
                self.used += 1
                self.wrong += crc != self.truth[lease.key]
                arrived.append(lease.key)
        return arrived


def main() -> None:
    folder, directory, truth, fallback, timeout = sys.argv[1:]
    worker = Worker(Path(folder), Path(directory), Path(truth), Path(fallback), float(timeout))
    print(json.dumps("here"), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = {"value": getattr(worker, name)(*arguments)}
        except MoetierError as error:
            answer = {"error": type(error).__name__, "cause": error.cause}
        print(json.dumps(answer), flush=True)
    worker.close()


if __name__ == "__main__":
    main()
