"""Open the daemon's models: divide the memory, reclaim arenas, open stores and host tiers.

A *reclaimed arena* is one that a dead daemon has left, and that this daemon takes over with the records in it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from moetier.runtime.config import DEFAULT_SHARE, Size
from moetier.runtime.machine.memory import Available, available_memory, budget_for
from moetier.runtime.stores.registry import open_store
from moetier.tiers.cache.budget import slots_for, smallest_budget
from moetier.tiers.errors import ConfigError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.base import DirectoryStore

from .daemon_config import DaemonConfig
from .hosted_model import HostedModel
from .log import log_event
from .reclaim import ReclaimedArena, reclaim_arenas
from .systemd import ServiceManager

_DYING = 2.0  # seconds for the last reads of a killed daemon, during which it still locks its arenas
_UNLIMITED = Available(1 << 62, "")

_log = logging.getLogger(__name__)


def open_models(
    config: DaemonConfig,
    stores: Mapping[str, DirectoryStore],
    manager: ServiceManager,
    closing: contextlib.ExitStack,
    *,
    was_killed: bool,
) -> dict[str, HostedModel]:
    """Open the models of ``stores``, and return a dictionary from digests to models.

    ``closing`` will close everything that is opened here. ``was_killed``: whether the last daemon in this folder was
    killed. If so, that daemon may not have ended yet, and may lock its arenas for a moment.

    Raises BudgetError if the memory is too small.
    """
    manifests = {digest: store.manifest for digest, store in stores.items()}
    passed = [(_systemd_holder(name), descriptor) for name, descriptor in manager.passed]
    by_digest = reclaim_arenas(manifests, closing, passed, timeout=_DYING if was_killed else 0.0)
    named = dict(zip(stores, config.names, strict=False))  # they have the order of config.directories
    slots, kept = divide_memory(manifests, config.ram, available_memory(), by_digest)
    for digest, arenas in by_digest.items():
        for reclaimed in arenas:
            if reclaimed is not kept.get(digest):
                reclaimed.arena.close()
                continue
            log_event(
                _log,
                "leftover",
                model=named.get(digest) or manifests[digest].model,
                bytes=reclaimed.arena.layout.nbytes,
                filled=reclaimed.arena.directory.ready,
                holder=reclaimed.holder,
            )
    models = {}
    for digest, store in stores.items():
        began = time.monotonic()
        taken = kept.get(digest)
        arena = None if taken is None else taken.arena
        host = closing.enter_context(
            HostTier(
                store,
                slots=slots[digest],
                loaders=config.loaders,
                arena=arena,
                policy=config.policy,
                loads_rest=store.is_local,
            )
        )
        model = HostedModel(
            store.manifest,
            host,
            store.directory,
            timeout=config.slot_timeout,
            learn=config.learn,
            name=named.get(digest, ""),
        )
        closing.callback(model.close)
        models[digest] = model
        store.on_fault(model.log_condemned)
        _give_to_systemd(model, taken, manager)
        if taken is not None:
            seconds = f"{time.monotonic() - began:.3f}"
            of = taken.arena.layout.slots
            log_event(_log, "recovered", model=model.name, slots=host.recovered, of=of, seconds=seconds)
    for name in {name for name, _ in manager.passed} - set(map(_arena_name, models)):
        # the arena of a model that is no longer served: systemd would keep its memory for ever
        manager.remove(name)
    manager.close()
    return models


def open_stores(directories: Sequence[Path], closing: contextlib.ExitStack) -> dict[str, DirectoryStore]:
    """Open the experts of directories, and return a dictionary from digests to stores. ``closing`` will close them.

    Raises StoreError or CheckpointError if one can't be opened, and ConfigError if two hold the same experts.
    """
    stores: dict[str, DirectoryStore] = {}
    for directory in directories:
        store = closing.enter_context(open_store(Path(os.path.normpath(directory.absolute()))))  # for the log
        if (other := stores.get(store.manifest.digest)) is not None:
            raise ConfigError(
                f"{other.directory} and {directory} hold the same experts.", "Name one of the directories."
            )
        stores[store.manifest.digest] = store
    return stores


def _arena_name(digest: str) -> str:
    return f"arena-{digest[:32]}"


def _systemd_holder(name: str) -> str:
    return f"systemd ({name})"


def _give_to_systemd(model: HostedModel, taken: ReclaimedArena | None, manager: ServiceManager) -> None:
    """Let systemd keep the model's arena open for the next start of the daemon.

    ``taken`` is the reclaimed arena that the model uses, or None. Does nothing if that arena came from systemd,
    which still has it open.
    """
    name = _arena_name(model.digest)
    if taken is not None and taken.holder == _systemd_holder(name):
        return
    manager.remove(name)
    descriptor = model.host.export()
    try:
        manager.store(name, descriptor)
    finally:
        os.close(descriptor)


def divide_memory(
    manifests: Mapping[str, Manifest],
    ram: Size | None,
    available: Available,
    reclaimed: Mapping[str, Sequence[ReclaimedArena]],
) -> tuple[dict[str, Mapping[str, int]], dict[str, ReclaimedArena]]:
    """Return two dictionaries from digests: to each model's number of slots, and to the reclaimed arena that it uses.

    Slots are counted for each record layout. If ``ram`` is a number of bytes, it is divided among all models. A model
    then uses a reclaimed arena only if the arena has exactly the number of slots that the model gets.

    If ``ram`` is None or a share of free memory, a model with reclaimed arenas uses the fullest of them, with the slots
    that it has. The other models divide that share of the ``available`` memory.

    Raises BudgetError if ``ram`` is too small for the models, or more than is available.
    """
    slots: dict[str, Mapping[str, int]] = {}
    if ram is not None and ram.bytes is not None:
        slots = _divide(manifests, ram, _UNLIMITED)
        kept = {
            digest: one
            for digest, arenas in reclaimed.items()
            for one in reversed(arenas)
            if one.arena.layout.slots_by_array == slots[digest]
        }
    else:
        kept = {digest: arenas[0] for digest, arenas in reclaimed.items()}
    others = {digest: manifest for digest, manifest in manifests.items() if digest not in kept}
    if others and slots:  # check the memory of models without a reclaimed arena, as it has yet to be allocated
        ram = Size(
            bytes=sum(
                manifest.layouts[array].slot_bytes * count
                for digest, manifest in others.items()
                for array, count in slots[digest].items()
            )
        )
    divided = _divide(others, ram, available) if others else {}
    return divided | {digest: one.arena.layout.slots_by_array for digest, one in kept.items()} | slots, kept


def _divide(manifests: Mapping[str, Manifest], ram: Size | None, available: Available) -> dict[str, Mapping[str, int]]:
    """Divide a budget among models, and return a dictionary from digests to numbers of slots.

    Each model gets its smallest budget. The rest is divided in proportion to what each model can use beyond that.
    """
    smallest = {digest: smallest_budget(manifest) for digest, manifest in manifests.items()}
    largest = {digest: manifest.stored_bytes for digest, manifest in manifests.items()}
    least, most = sum(smallest.values()), sum(largest.values())
    whole = replace(available, share=DEFAULT_SHARE)  # clients may be in the same control group, and need memory, too
    budget = budget_for(ram, smallest=least, largest=most, reserve=0, available=whole)
    slots = {}
    for digest, manifest in manifests.items():
        more = (budget - least) * (largest[digest] - smallest[digest]) // max(most - least, 1)
        slots[digest] = slots_for(manifest, smallest[digest] + more)
    return slots
