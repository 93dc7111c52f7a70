"""How a daemon comes to host its models: stores and tiers opened, over arenas that are left where there are some."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from moetier.runtime.memory import Available, available_memory
from moetier.tiers.errors import ConfigError
from moetier.tiers.host.staging import staging_bytes
from moetier.tiers.host.tier import HostTier
from moetier.tiers.store.reader import ExpertStore

from .division import plan_slots
from .log import say
from .model import Hosted
from .options import DaemonConfig
from .reclaim import Leftover, find_leftovers
from .reported import ReportedReader
from .systemd import ServiceManager
from .trunk_check import TrunkCheck

_DYING = 2.0  # seconds that a killed daemon's last reads may take

_log = logging.getLogger(__name__)


def open_models(
    config: DaemonConfig,
    manager: ServiceManager,
    closing: contextlib.ExitStack,
    *,
    dying: bool,
) -> dict[str, Hosted]:
    """By digest; all that is opened is closed by ``closing``. A killed daemon may still be ``dying``, with arenas."""
    stores = _open_stores(config.directories, closing)
    manifests = {digest: store.manifest for digest, store in stores.items()}
    found = find_leftovers(manifests, _passed(manager), patience=_DYING if dying else 0.0)
    with contextlib.ExitStack() as unused:
        for leftovers in found.values():
            for leftover in leftovers:
                unused.callback(leftover.arena.close)
        there = available_memory()
        left = max(there.bytes - sum(map(staging_bytes, manifests.values())), 0)
        slots, kept = plan_slots(manifests, config.ram, Available(left, there.limiter), found)
        for digest, leftover in kept.items():
            say(
                _log,
                "leftover",
                model=manifests[digest].model,
                bytes=leftover.arena.plan.nbytes,
                filled=leftover.filled,
                holder=leftover.holder,
            )
        unused.pop_all()
        for leftovers in found.values():
            for leftover in leftovers:
                if leftover not in kept.values():
                    leftover.arena.close()
    models = {}
    for digest, store in stores.items():
        began = time.monotonic()
        taken = kept.get(digest)
        arena = None if taken is None else taken.arena
        host = HostTier(ReportedReader(store), slots=slots[digest], arena=arena, policy=config.policy)
        model = Hosted(store.manifest, host, store.folder.parent, patience=config.wait, learn=config.learn)
        closing.callback(model.close)
        models[digest] = model
        store.on_fault(model.condemn)
        closing.callback(TrunkCheck(store.manifest, model.directory).close)
        _keep(model, taken, manager)
        if taken is not None:
            seconds = f"{time.monotonic() - began:.3f}"
            say(_log, "recovered", model=model.name, slots=host.recovered, of=taken.arena.plan.slots, seconds=seconds)
    for name in {name for name, _ in manager.passed} - set(map(_arena_name, models)):
        manager.forget(name)  # of a model that is served no more: it would hold its memory for ever
    manager.close()
    return models


def _open_stores(directories: Sequence[Path], closing: contextlib.ExitStack) -> dict[str, ExpertStore]:
    """By digest, in order."""
    stores: dict[str, ExpertStore] = {}
    for directory in directories:
        store = closing.enter_context(ExpertStore.open(directory.resolve()))  # what a log says holds anywhere
        if (other := stores.get(store.manifest.digest)) is not None:
            raise ConfigError(
                f"{other.folder.parent} and {directory} hold the same experts.", "Name one of the directories."
            )
        stores[store.manifest.digest] = store
    return stores


def _arena_name(digest: str) -> str:
    return f"arena-{digest[:32]}"


def _passed(manager: ServiceManager) -> list[tuple[str, int]]:
    return [(f"systemd ({name})", descriptor) for name, descriptor in manager.passed]


def _keep(model: Hosted, taken: Leftover | None, manager: ServiceManager) -> None:
    """Gives the arena to systemd, for the next start; it has it already where it has passed it to this process."""
    name = _arena_name(model.digest)
    if taken is not None and taken.holder == f"systemd ({name})":
        return
    manager.forget(name)
    descriptor = model.host.export()
    try:
        manager.store(name, descriptor)
    finally:
        os.close(descriptor)
