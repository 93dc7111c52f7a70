"""The daemon of a node: the actor that supervises it, and how replicas keep it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moetier.runtime.wire.address import Address, runtime_folder
from moetier.tiers.errors import ConfigError
from moetier.tiers.text import format_bytes
from moetier.tiers.threads import start_thread

NAMESPACE = "moetier"  # Ray's namespace of the actors
POLL = 0.5  # seconds between two looks of a replica at a daemon that starts
BEAT = 10.0  # seconds between two calls of a replica that keeps the daemon
LINGER = 60.0  # seconds without a call after which the daemon ends
END = 60.0  # longest time in seconds in which a daemon may end by itself
MEMORY_WAIT = 120.0  # longest time in seconds that a replica waits until Ray has memory for the daemon
RETRY = 2.0  # seconds before a daemon that could not start is started again

# Python with this code and the id of its parent runs Python with the words after them. When the thread that started it
# ends, the kernel sends it SIGTERM (15), by PR_SET_PDEATHSIG (1). So no daemon outlives its actor, which Ray may kill.
BOUND = """import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() == int(sys.argv[1]):  # it has not ended before
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class DaemonActor:
    """Ray actor that runs a daemon on its node, and starts it again whenever it dies.

    After LINGER seconds without a call of ``hold``, it ends the daemon and itself. The experts in memory survive the
    daemon's death, because replicas map them, and the next daemon takes them over.
    """

    def __init__(self, words: list[str]) -> None:
        """Start ``moetier daemon`` with ``words``."""
        self._words = words
        self._held_until = time.monotonic() + LINGER
        self._fault: str | None = None  # why the daemon could not start; "" if it is ready, None while it starts
        self._actor = ray.get_runtime_context().current_actor
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
            except (OSError, RuntimeError) as error:  # no descriptor, memory or thread is left
                self._fault = f"moetier daemon can't be started: {error}"
            if self._fault:
                time.sleep(RETRY)
        while True:
            with contextlib.suppress(Exception):  # Ray's control store restarts, for example
                ray.kill(self._actor)
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


def hold_daemon(words: list[str], needed: Callable[[int], int]) -> Path:
    """Return the folder of this node's daemon with the options ``words``, and hold the daemon while this process lives.

    ``needed`` returns the number of bytes of the daemon's experts, given the bytes that Ray can offer on this node. It
    is called if the node has no such daemon yet. Ray then counts these bytes as used. Raises RuntimeError if the daemon
    can't start, ConfigError if Ray's resource ``memory`` of the node is smaller, or is in use by others for MEMORY_WAIT
    seconds, and what ``needed`` raises.
    """
    node = ray.get_runtime_context().get_node_id()
    name = f"ray-{node[:12]}-{hashlib.blake2b(repr(words).encode(), digest_size=4).hexdigest()}"
    folder = Address.of(runtime_folder() / name).folder
    assert folder is not None
    memory = 0

    def hold() -> Any:
        nonlocal memory
        with contextlib.suppress(ValueError):  # there is no such actor
            return ray.get_actor(name, namespace=NAMESPACE).hold.remote()
        memory = memory or needed(_memory_of(node))
        actor = ray.remote(DaemonActor).options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            memory=memory,
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        return actor.remote([*words, f"--ram={memory}", "--folder", str(folder)]).hold.remote()

    def beat() -> None:
        while True:
            time.sleep(BEAT)
            with contextlib.suppress(Exception):  # Ray's control store restarts, for example
                hold()

    try:
        while not ray.get(hold(), timeout=MEMORY_WAIT):
            time.sleep(POLL)
    except ray.exceptions.ActorUnschedulableError:
        raise ConfigError(
            f"Ray offers its actors less memory on this node than the {format_bytes(memory)} of --ram.",
            "Start the node with ray start --memory=BYTES, or give --ram as a share.",
        ) from None
    except ray.exceptions.GetTimeoutError:  # the actor waits for memory; one that runs answers at once
        raise ConfigError(
            f"Ray has had no memory for the daemon on this node for {MEMORY_WAIT:.0f} s: others have reserved it.",
            "If the application runs with other options, end it first (serve shutdown); or give a smaller --ram.",
        ) from None
    start_thread("moetier-hold", beat)
    return folder


def _memory_of(node: str) -> int:
    """Return the bytes of memory that Ray offers to actors on a node, whether they are in use or not."""
    return next(int(entry["Resources"].get("memory", 0)) for entry in ray.nodes() if entry["NodeID"] == node)
