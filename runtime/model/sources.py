"""Choose where a process's experts come from: a tier of its own, on a store or on other hosts' daemons, or a daemon."""

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
from moetier.tiers.errors import MoetierError, NoDaemonError, UnknownModelError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.host.warmup import Learner
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import Lender, RecordReader
from moetier.tiers.stats import Share
from moetier.tiers.store.reader import ExpertStore

if TYPE_CHECKING:
    from moetier.runtime.client.tier import DaemonTier

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Host tier that a process computes from. ``close`` closes it and what it reads from; idempotent."""

    host: Lender[memoryview]
    where: str  # for people
    close: Callable[[], None]
    learner: Learner | None = None  # if the tier is this process's and learns
    shares: Callable[[], list[Share]] = list  # what came from daemons of other hosts, and from the store beside them
    daemon: DaemonTier | None = None  # the host tier, if it is a daemon's of this host, whose memory is mapped


def open_origin(folder: Path, manifest: Manifest, config: TierConfig, slots: Callable[[], Mapping[str, int]]) -> Origin:
    """Open the host tier for the model directory ``folder``.

    ``slots``: returns the slots for a tier of this process. Called only if there will be one; may raise BudgetError.
    Raises StoreError, and DaemonError where a daemon was asked for.
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
            except (NoDaemonError, UnknownModelError) as error:  # it has ended, and left its address behind
                _log.info("not used: the daemon %s: %s", daemon, error.cause)
            except MoetierError as error:  # it is full, or of another version
                refusals[daemon] = error
            else:
                _warn_of_ignored_options(config, daemon)
                return found
        for daemon, refusal in refusals.items():
            _log.warning("The daemon %s serves this store, and is not used: %s %s", daemon, refusal.cause, refusal.fix)
    return _own(folder, slots(), config)


def _warn_of_ignored_options(config: TierConfig, daemon: Address) -> None:
    """Warn of options for a tier of this process. With a named daemon these are errors (``TierConfig.of``); a daemon
    that was found may be unexpected."""
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
        closing.callback(reader.close)  # closed first: the tier waits for its reads, and these may wait for daemons
        where = f"the daemons {', '.join(map(str, config.daemon.addresses))}"
        return Origin(host, where, closing.pop_all().close, learner, reader.shares)


def _host(
    reader: RecordReader, slots: Mapping[str, int], config: TierConfig, closing: contextlib.ExitStack
) -> tuple[HostTier, Learner | None]:
    """Open the tier and its learner, which ``closing`` closes."""
    host = closing.enter_context(HostTier(reader, slots=slots, policy=config.policy))
    if not config.learn:
        return host, None
    learner = Learner(host)
    closing.callback(learner.close)
    return host, learner
