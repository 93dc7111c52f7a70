"""Choose where a process's experts come from: its own host tier, or the host tier of a daemon on this machine.

A process's own host tier reads from the store, or from daemons on other hosts and the store.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moetier.runtime.config import RemoteComputeMode, TierConfig
from moetier.runtime.stores.registry import open_store
from moetier.runtime.wire.address import Address
from moetier.tiers.disk_order import DiskOrder
from moetier.tiers.errors import ExhaustedError, MoetierError, NoDaemonError, StoreFormatError, UnknownModelError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.host.warmup import Learner
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import CopySource
from moetier.tiers.stats import Share
from moetier.tiers.store.base import Store

if TYPE_CHECKING:
    from moetier.runtime.client.remote_compute import RemoteCompute
    from moetier.runtime.client.spread import SpreadStore
    from moetier.runtime.client.tier import DaemonTier

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """The host tier that a process uses. ``close`` closes the tier and the store that it reads; it is idempotent."""

    host: CopySource[memoryview]
    where: str  # description of the tier for a user
    close: Callable[[], None]
    disk_order: DiskOrder  # when pages of keys and values may be read and written beside the records
    learner: Learner | None = None  # only of a tier of this process, with the option `learn`
    shares: Callable[[], list[Share]] = list  # returns what came from daemons of other hosts and from the store
    daemon: DaemonTier | None = None  # ``host``, if it is the mapped tier of a daemon on this machine
    remote_compute: RemoteCompute | None = None  # computes experts at daemons of other hosts


def open_origin(
    location: Path, manifest: Manifest, config: TierConfig, slots: Callable[[], Mapping[str, int]], *, computes: bool
) -> Origin:
    """Open the host tier for the model at ``location``.

    ``slots`` returns the number of slots for each record layout, for a tier of this process. It is called only if
    there will be such a tier, and may raise BudgetError. ``computes``: whether compiled code of this machine computes
    experts, so that daemons of other hosts may do it, too.

    Raises StoreError if the store can't be opened or was replaced, DaemonError if ``config`` names a daemon that can't
    be used, and ExhaustedError if the system gives no thread.
    """
    if config.mapped is not None:
        return _mapped(config.mapped, location, manifest)
    if config.daemon.find:
        from moetier.runtime.wire.address import daemons_serving

        refusals: dict[Address, MoetierError] = {}
        for daemon in daemons_serving(manifest.digest):
            try:
                origin = _mapped(daemon, location, manifest)
            except (NoDaemonError, UnknownModelError) as error:  # the daemon has ended without removing its card
                _log.info("The daemon %s is not used: %s", daemon, error.cause)
            except ExhaustedError:  # the system gives no thread: a tier of this process would need more of them
                raise
            except MoetierError as error:  # the daemon is full, or has another version
                refusals[daemon] = error
            else:
                if config.of_own_tier:  # an error only for a daemon that the user names (``TierConfig.of``)
                    _log.warning(
                        "Without effect: %s, because the experts are those of the daemon %s. Give these options to the "
                        'daemon, or set `daemon` to "none".',
                        " and ".join(config.of_own_tier),
                        daemon,
                    )
                return origin
        for daemon, refusal in refusals.items():
            _log.warning("The daemon %s serves this store, but is not used: %s %s", daemon, refusal.cause, refusal.fix)
    return _own(location, manifest, slots(), config, computes=computes)


def _mapped(daemon: Address, location: Path, manifest: Manifest) -> Origin:
    from moetier.runtime.client.tier import DaemonTier

    assert daemon.folder is not None
    host = DaemonTier.open(daemon.folder, location, manifest)
    return Origin(host, f"the daemon {daemon}", host.close, host.disk_order, daemon=host)


def _own(location: Path, manifest: Manifest, slots: Mapping[str, int], config: TierConfig, *, computes: bool) -> Origin:
    """Open a host tier of this process. It reads from the store, or from daemons of other hosts and the store."""
    store: Store
    spread: SpreadStore | None = None
    with contextlib.ExitStack() as closing:
        if config.daemon.addresses:
            from moetier.runtime.client.spread import SpreadStore

            store = spread = SpreadStore.open(config.daemon.addresses, config.credentials, manifest, location)
            where = store.where
        else:
            store = open_store(location)
            where = f"this process, from {store.where}" if store.where else "this process"
        closing.enter_context(store)
        if store.manifest != manifest:
            raise StoreFormatError(f"{location} was replaced while it was loaded.", "Load the model again.")
        host = closing.enter_context(
            HostTier(store, slots=slots, loaders=config.loaders, policy=config.policy, loads_rest=store.is_local)
        )
        learner = closing.enter_context(Learner(host)) if config.learn else None
        remote_compute = None
        if spread is not None:
            if computes and config.remote_compute is not RemoteComputeMode.OFF:
                from moetier.runtime.client.remote_compute import RemoteCompute

                remote_compute = RemoteCompute(spread, host)
            # closed before the tier, whose close() waits for reads, which may wait for daemons
            closing.callback(store.close)
        close = closing.pop_all().close
        return Origin(host, where, close, host.disk_order, learner, store.shares, remote_compute=remote_compute)
