"""Where a process's experts come from: a tier of its own, on a store or on daemons of other hosts; or a daemon's."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moetier.runtime.config import TierConfig
from moetier.runtime.wire.address import Address
from moetier.tiers.cache.orders import DEFAULT_ORDER
from moetier.tiers.errors import MoetierError, NobodyError, UnknownModelError
from moetier.tiers.host.learner import Learner
from moetier.tiers.host.tier import HostTier
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import Lender, RecordReader
from moetier.tiers.stats import Share
from moetier.tiers.store.reader import ExpertStore

if TYPE_CHECKING:
    from moetier.runtime.client.tier import DaemonTier

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """The host tier that a process computes from. ``close`` closes it and what it stands on; idempotent."""

    host: Lender[memoryview]
    where: str  # for people
    close: Callable[[], None]
    learner: Learner | None = None  # of a tier of this process that learns
    shares: Callable[[], list[Share]] = list  # of daemons of other hosts, and of the store beside them
    daemon: DaemonTier | None = None  # of this host, whose memory is mapped


def open_origin(folder: Path, manifest: Manifest, config: TierConfig, slots: Callable[[], Mapping[str, int]]) -> Origin:
    """Of the model directory ``folder``. ``slots`` says what a tier of this process may take; it is asked for only
    where there will be one, and may raise BudgetError. Raises StoreError, or DaemonError where a daemon was asked for.
    """
    if config.mapped is not None:
        return _mapped(config.mapped, folder, manifest)
    if config.daemon.addresses:
        return _remote(config, folder, manifest, slots())
    if config.daemon.find:
        from moetier.runtime.wire.address import daemons_serving

        refusals: dict[Address, MoetierError] = {}
        for daemon in daemons_serving(manifest.digest):
            try:
                found = _mapped(daemon, folder, manifest)
            except (NobodyError, UnknownModelError) as error:  # it has ended; what it said of itself is still there
                _log.info("not used: the daemon %s: %s", daemon, error.cause)
            except MoetierError as error:  # it is full, or of another version
                refusals[daemon] = error
            else:
                _say_what_is_without_effect(config, daemon)
                return found
        for daemon, refusal in refusals.items():
            _log.warning("The daemon %s serves this store, and is not used: %s %s", daemon, refusal.cause, refusal.fix)
    return _own(folder, slots(), config)


def _say_what_is_without_effect(config: TierConfig, daemon: Address) -> None:
    """Of what a tier of this process would do: a named daemon refuses it (``TierConfig.of``), one that was found may
    not have been thought of."""
    asked = {"`ram`": config.ram is not None, "`policy`": config.policy != DEFAULT_ORDER, "`learn`": config.learn}
    if names := " and ".join(name for name in asked if asked[name]):
        _log.warning(
            "Without effect: %s, as the experts are those of the daemon %s. Give this to the daemon, or set "
            '`daemon` to "none".',
            names,
            daemon,
        )


def _own(folder: Path, slots: Mapping[str, int], config: TierConfig) -> Origin:
    with contextlib.ExitStack() as closing:
        store = closing.enter_context(ExpertStore.open(folder))
        host, learner = _host(store, slots, config, closing)
        store.on_fault(host.condemn)
        return Origin(host, "this process", closing.pop_all().close, learner)


def _mapped(daemon: Address, folder: Path, manifest: Manifest) -> Origin:
    from moetier.runtime.client.tier import DaemonTier

    assert daemon.folder is not None
    host = DaemonTier.open(daemon.folder, folder, manifest)
    return Origin(host, f"the daemon {daemon}", host.close, daemon=host)


def _remote(config: TierConfig, folder: Path, manifest: Manifest, slots: Mapping[str, int]) -> Origin:
    from moetier.runtime.client.spread import SpreadReader

    with contextlib.ExitStack() as closing:
        reader = closing.enter_context(SpreadReader.open(config.daemon.addresses, config.credentials, manifest, folder))
        host, learner = _host(reader, slots, config, closing)
        if reader.local is not None:
            reader.local.on_fault(host.condemn)
        closing.callback(reader.close)  # first: the tier waits for its reads, and they may wait for daemons
        where = f"the daemons {', '.join(map(str, config.daemon.addresses))}"
        return Origin(host, where, closing.pop_all().close, learner, reader.shares)


def _host(
    reader: RecordReader, slots: Mapping[str, int], config: TierConfig, closing: contextlib.ExitStack
) -> tuple[HostTier, Learner | None]:
    """Both are closed by ``closing``."""
    host = closing.enter_context(HostTier(reader, slots=slots, policy=config.policy))
    if not config.learn:
        return host, None
    learner = Learner(host)
    closing.callback(learner.close)
    return host, learner
