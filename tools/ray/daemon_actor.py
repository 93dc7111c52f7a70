"""The daemon of a node: the actor that supervises it, and how replicas keep it."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moetier.runtime.wire.address import Address, runtime_folder
from moetier.tiers.errors import ConfigError
from moetier.tiers.text import format_bytes
from moetier.tiers.threads import start_thread

from .supervisor import Supervisor

NAMESPACE = "moetier"  # Ray's namespace of the actors
POLL = 0.5  # seconds between two looks of a replica at a daemon that starts
BEAT = 10.0  # seconds between two calls of a replica that keeps the daemon
MEMORY_WAIT = 120.0  # longest time in seconds that a replica waits until Ray has memory for the daemon


class DaemonActor(Supervisor):
    """Ray actor that supervises a daemon on its node, and ends itself after the daemon."""

    def __init__(self, words: list[str]) -> None:
        """Start ``moetier daemon`` with ``words``."""
        super().__init__(words, partial(ray.kill, ray.get_runtime_context().current_actor))


def hold_daemon(words: list[str], needed: Callable[[int], int]) -> Path:
    """Start this node's daemon with the options ``words``, unless it runs, and hold it while this process lives.

    Returns the daemon's folder. ``needed`` returns the number of bytes of the daemon's experts, given the bytes that
    Ray can offer on this node. It is called if the node has no such daemon yet. Ray then counts these bytes as used.
    Raises RuntimeError if the daemon can't start, ConfigError if Ray's resource ``memory`` of the node is smaller, or
    is in use by others for MEMORY_WAIT seconds, and what ``needed`` raises.
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
