"""What a daemon read while one of its clients computed, and whether it was lost meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetier.runtime.config import format_bytes
from moetier.tiers.errors import MoetierError

from .failure import plain

if TYPE_CHECKING:
    from moetier.runtime.model.tiers import Tiers


PATIENCE = 2.0  # seconds that a report waits for the daemon's counters: it can do without them


@dataclass(frozen=True, slots=True)
class DaemonReads:
    """The daemon's own counters, which are of all its clients together."""

    place: str
    bytes_read: int | None  # by the daemon since the beginning; since its restart, if it was restarted; None: unknown
    clients: int  # at the beginning or at the end, whichever are more
    restarted: bool
    lost: int  # times that the connection ended
    away: str  # why it is away now; ""
    local_bytes: int  # that this process read from the store instead

    def text(self) -> str:
        """For people."""
        parts = []
        if self.bytes_read is not None:
            whose = "for this run" if self.clients <= 1 else f"for its {self.clients} clients"
            since = " since it was restarted" if self.restarted else ""
            parts.append(f"{self.place} read {format_bytes(self.bytes_read)} {whose}{since}")
        else:
            parts.append(self.place)
        if self.away:
            parts.append(f"it is away: {plain(self.away).removesuffix('.')}")
        elif self.lost:
            parts.append("it was lost and came back" + (f" {self.lost} times" if self.lost > 1 else ""))
        if self.local_bytes:
            parts.append(f"{format_bytes(self.local_bytes)} were read from the local store instead")
        return "; ".join(parts)


class DaemonWatch:
    """Notes a daemon's counters now, and says at ``end`` what has changed."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._before = _look(tiers)
        daemon = tiers.daemon
        self._connections = daemon.connections if daemon is not None else 0

    def end(self) -> DaemonReads | None:
        """None where the experts are no mapped daemon's."""
        daemon = self._tiers.daemon
        if daemon is None:
            return None
        before, now = self._before, _look(self._tiers)
        restarted = before is not None and now is not None and before.daemon != now.daemon
        read = None
        if before is not None and now is not None:
            read = now.bytes_read - (0 if restarted else before.bytes_read)
        away = daemon.away
        return DaemonReads(
            place=str(daemon.address),
            bytes_read=read,
            clients=max((look.clients for look in (before, now) if look is not None), default=0),
            restarted=restarted,
            lost=daemon.connections - self._connections + bool(away),
            away=away,
            local_bytes=self._tiers.host.stats().bytes_in,
        )


@dataclass(frozen=True, slots=True)
class _Look:
    daemon: tuple[int, int]  # its process, and when that was started
    bytes_read: int
    clients: int


def _look(tiers: Tiers) -> _Look | None:
    """None where there is no daemon, or none that answers."""
    if tiers.daemon is None:
        return None
    from moetier.runtime.wire.probe import probe

    try:
        with probe(tiers.daemon.address, patience=PATIENCE) as connected:
            described, stats = connected.describe(), connected.stats()
    except MoetierError:
        return None
    model = next((model for model in stats.models if model.digest == tiers.manifest.digest), None)
    if model is None:
        return None
    return _Look((described.pid, described.started_unix_ms), model.host.bytes_in, model.clients)
