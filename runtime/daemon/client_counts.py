"""Counts of the clients of a model that the daemon serves."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, replace

from moetier.tiers.stats import Counts


@dataclass(slots=True)
class StreamCounts(Counts):
    """Counts of all streams of a client."""

    requests: int = 0  # requests for experts
    reported_hits: int = 0  # hits that the client has reported
    requested: int = 0  # experts of these requests, which the client has not found in the arena
    bytes_in: int = 0
    bytes_out: int = 0


class ClientCounts:
    """Counts of each client of a model, by its number. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards: ``_by_client``, ``_gone``
        self._by_client: dict[int, StreamCounts] = {}
        self._gone = StreamCounts()  # of all clients that have gone

    def register(self, client: int) -> None:
        """Count what this client does, from now on."""
        with self._lock:
            self._by_client[client] = StreamCounts()

    def unregister(self, client: int) -> None:
        """Keep the counts of a client that has gone only in the sum."""
        with self._lock:
            self._gone.count(**asdict(self._by_client.pop(client)))

    def count(self, client: int, **events: int) -> None:
        """Count events of a client, by the names of ``StreamCounts``."""
        with self._lock:
            self._by_client.get(client, self._gone).count(**events)

    def of(self, client: int) -> StreamCounts:
        """Return the counts of a client; zeros if it has gone."""
        with self._lock:
            return replace(self._by_client.get(client, StreamCounts()))

    def sum(self) -> StreamCounts:
        """Return the counts of all clients since the start of the daemon."""
        with self._lock:
            counts = replace(self._gone)
            for client in self._by_client.values():
                counts.count(**asdict(client))
            return counts
