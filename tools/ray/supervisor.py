"""Supervise a node's daemon: start it, start it again whenever it dies, and end it when nobody needs it."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO

from moetier.runtime.config import DEFAULT_SHARE, Size
from moetier.runtime.machine.memory import available_memory, budget_for
from moetier.runtime.stores.registry import open_store
from moetier.tiers.cache.budget import smallest_budget
from moetier.tiers.errors import ExhaustedError
from moetier.tiers.threads import start_thread

LINGER = 60.0  # seconds without a call after which the daemon ends
END = 60.0  # longest time in seconds in which a daemon may end by itself
RETRY = 2.0  # seconds before a daemon that could not start is started again

# Python with this code and the id of its parent runs Python with the words after them. When the thread that started it
# ends, the kernel sends it SIGTERM (15), by PR_SET_PDEATHSIG (1). So no daemon outlives its actor, which Ray may kill.
BOUND = """import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() == int(sys.argv[1]):  # it has not ended before
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Supervisor:
    """Runs a daemon, and starts it again whenever it dies.

    After LINGER seconds without a call of ``hold``, it ends the daemon and calls ``end``. The experts in memory survive
    the daemon's death, because replicas map them, and the next daemon takes them over.
    """

    def __init__(self, words: list[str], end: Callable[[], None]) -> None:
        """Start ``moetier daemon`` with ``words``. ``end`` ends this process; it is called until it does."""
        self._words = words
        self._end = end
        self._held_until = time.monotonic() + LINGER
        self._fault: str | None = None  # why the daemon could not start; "" if it is ready, None while it starts
        start_thread("moetier-daemon", self._supervise)

    def hold(self) -> bool:
        """Keep the daemon for LINGER more seconds, and return whether it is ready.

        Raises RuntimeError if it could not start.
        """
        self._held_until = time.monotonic() + LINGER
        if fault := self._fault:
            raise RuntimeError(fault)
        return fault is not None

    def _supervise(self) -> None:
        while self._is_held:
            self._fault = None
            try:
                self._fault = self._run()
            except (OSError, ExhaustedError) as error:  # no descriptor, memory or thread is left
                self._fault = f"moetier daemon can't be started: {error}"
            if self._fault:
                time.sleep(RETRY)
        while True:
            with contextlib.suppress(Exception):  # Ray's control store restarts, for example
                self._end()
            time.sleep(RETRY)

    @property
    def _is_held(self) -> bool:
        return time.monotonic() < self._held_until

    def _run(self) -> str | None:
        """Run a daemon until it dies or is not held. Return why it ended before it was ready; None if it did not."""
        last: deque[str] = deque(maxlen=2)
        words = [str(os.getpid()), "-m", "moetier", "daemon", *self._words, "--ready-fd", "1"]
        with subprocess.Popen(
            [sys.executable, "-c", BOUND, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        ) as daemon:
            assert daemon.stdout is not None
            assert daemon.stderr is not None
            try:
                log = start_thread("moetier-daemon-log", _copy, daemon.stderr, last)
                has_said = False  # whether there is something to read: that it is ready, or that it has ended
                while self._is_held and not has_said:
                    has_said = bool(select.select([daemon.stdout], [], [], 1.0)[0])
                is_ready = has_said and bool(daemon.stdout.readline())
                if is_ready:
                    self._fault = ""
                while is_ready and self._is_held:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        daemon.wait(1.0)
                        break
                self._fault = None  # from now on, replicas wait for the next daemon
            finally:
                daemon.terminate()
                try:
                    status = daemon.wait(END)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    status = daemon.wait()
            log.join()
        return None if is_ready or not has_said else f"moetier daemon ended with status {status}: {' '.join(last)}"


def _copy(log: IO[str], last: deque[str]) -> None:
    """Copy the daemon's log to this actor's, and its last lines to ``last``."""
    for line in log:
        last.append(line.strip())
        print(line, end="", file=sys.stderr, flush=True)


def daemon_bytes(directory: Path, ram: str | None, offered: int) -> int:
    """Return how many bytes of experts a daemon of this node holds.

    Args:
        directory: the model directory.
        ram: the option --ram. A share is a share of the free memory, or of ``offered`` if that is less. Of a size, no
            more is used than the experts have.
        offered: bytes of memory that Ray can offer on this node.

    Raises MoetierError if the model can't be opened, or the memory is too small for it.
    """
    asked = None if ram is None else Size.parse(ram)
    with open_store(directory) as store:
        manifest = store.manifest
    if asked is not None and asked.bytes is not None:
        return min(asked.bytes, manifest.stored_bytes)
    available = replace(available_memory(), share=DEFAULT_SHARE)
    if offered < available.bytes:
        available = replace(available, bytes=offered, limiter="Ray")
    smallest = smallest_budget(manifest)
    return budget_for(asked, smallest=smallest, largest=manifest.stored_bytes, reserve=0, available=available)
