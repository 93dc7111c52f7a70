"""Outbox: what is said on one stream to a daemon, and between it what was found in the directory meanwhile."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from queue import Empty, SimpleQueue

from moetier.proto import expert_store_pb2 as wire
from moetier.tiers.layout import ExpertKey

from .traffic import Meter

REPORT_SECONDS = 0.5  # the longest that the daemon does not hear of hits


class Outbox:
    """gRPC's thread iterates over ``messages``; ``used`` is the link's, and outlives the stream."""

    def __init__(self, used: deque[ExpertKey], meter: Meter) -> None:
        self._used = used
        self._meter = meter
        self._queue: SimpleQueue[wire.ClientMessage | None] = SimpleQueue()
        self._ended = threading.Event()

    def put(self, message: wire.ClientMessage) -> None:
        """Never waits: a finalizer may call it."""
        self._queue.put(message)

    def end(self, patience: float) -> None:
        """Nothing is said any more. Waits for gRPC's thread, so many seconds at most."""
        self._queue.put(None)
        self._ended.wait(patience)

    def messages(self) -> Iterator[wire.ClientMessage]:
        try:
            while True:
                message: wire.ClientMessage | None = wire.ClientMessage()
                with contextlib.suppress(Empty):
                    message = self._queue.get(timeout=REPORT_SECONDS)
                if message is None:
                    return
                # before a request, which would else evict what was used last
                if self._used and not message.HasField("release"):
                    report = self._report()
                    self._meter.sent(report)
                    yield report
                if message.WhichOneof("message"):
                    self._meter.sent(message)
                    yield message
        finally:
            self._ended.set()

    def _report(self) -> wire.ClientMessage:
        blocks: list[wire.Experts] = []
        for _ in range(len(self._used)):
            block, expert = self._used.popleft()
            if not blocks or blocks[-1].block != block:
                blocks.append(wire.Experts(block=block))
            blocks[-1].experts.append(expert)
        return wire.ClientMessage(used=wire.Used(blocks=blocks))
