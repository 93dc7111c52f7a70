"""Count the bytes that a daemon read, and the connections that were lost, while one of its clients ran."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetier.tiers.errors import MoetierError
from moetier.tiers.text import format_bytes

from .failure import plain

if TYPE_CHECKING:
    from moetier.runtime.model.tiers import Tiers


COUNTERS_TIMEOUT = 2.0  # longest wait for the daemon's counters, in seconds; a report can do without them


@dataclass(frozen=True, slots=True)
class DaemonReads:
    """Reads of a daemon during a run, for all its clients together, and its connection to this process."""

    place: str  # address of the daemon
    bytes_read: int | None  # since the beginning of the run, or since the daemon was restarted; None: unknown
    clients: int  # number of clients at the beginning or at the end of the run, whichever is greater
    restarted: bool
    lost: int  # how often the connection was lost
    away: str  # why the daemon can't be reached now, or ""
    local_bytes: int  # bytes that this process read from the store instead

    def text(self) -> str:
        """Return a line of a report as text."""
        parts = [self.place]
        if self.bytes_read is not None:
            whose = "for this run" if self.clients <= 1 else f"for its {self.clients} clients"
            since = " since it was restarted" if self.restarted else ""
            parts = [f"{self.place} read {format_bytes(self.bytes_read)} {whose}{since}"]
        if self.away:
            parts.append(f"it can't be reached: {plain(self.away).removesuffix('.')}")
        elif self.lost:
            parts.append("the connection was lost and restored" + (f" {self.lost} times" if self.lost > 1 else ""))
        if self.local_bytes:
            parts.append(f"{format_bytes(self.local_bytes)} were read from the local store instead")
        return "; ".join(parts)


class DaemonWatch:
    """Compare a daemon's counters at construction and at ``end``."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._before = _look(tiers)
        self._connections = tiers.origin.daemon.connections if tiers.origin.daemon is not None else 0

    def end(self) -> DaemonReads | None:
        """Return how the daemon's counters have changed since this object was made.

        Returns None if this process maps no daemon's memory.
        """
        if (daemon := self._tiers.origin.daemon) is None:
            return None
        (was, before, clients), (now, after, clients_now) = self._before, _look(self._tiers)
        is_counted, away = bool(was and now), daemon.away
        restarted = is_counted and was != now
        return DaemonReads(
            place=str(daemon.address),
            bytes_read=after - (0 if restarted else before) if is_counted else None,
            clients=max(clients, clients_now),
            restarted=restarted,
            lost=daemon.connections - self._connections + bool(away),
            away=away,
            local_bytes=self._tiers.host.stats().bytes_in,
        )


def _look(tiers: Tiers) -> tuple[tuple[int, ...], int, int]:
    """Return the mapped daemon's identity, the bytes that it has read for this model, and its number of clients.

    The identity is (process id, start in ms since 1970). Returns (), 0, 0 if no daemon answers.
    """
    if tiers.origin.daemon is not None:
        from moetier.runtime.wire.probe import probe

        with (
            contextlib.suppress(MoetierError),
            probe(tiers.origin.daemon.address, timeout=COUNTERS_TIMEOUT) as connected,
        ):
            described, stats = connected.describe(), connected.stats()
            for model in stats.models:
                if model.digest == tiers.manifest.digest:
                    return (described.pid, described.started_unix_ms), model.host.bytes_in, model.clients
    return (), 0, 0
