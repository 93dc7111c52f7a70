"""gRPC's standard health service for the daemon as a whole, whichever service a request names.

It does not wait for the request, so a call of which only the headers come takes no thread. The servicer of
grpcio-health-checking is not used: it sends while it holds a lock that the end of a call needs too, on the thread that
has to complete the sending. A Watch that begins while another one ends can then stop the server for good.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import DESCRIPTOR, HealthCheckResponse

from moetier.runtime.wire.status_codes import abort
from moetier.tiers.errors import ExhaustedError

from .rpc import run_inline

HEALTH: str = DESCRIPTOR.services_by_name["Health"].full_name
WATCHERS = 8  # calls of Watch at once: each takes a thread of its server


class Health:
    """Health of the daemon: serving until ``end`` is called."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards the two below
        self._serving = True
        self._watchers = 0

    @property
    def is_serving(self) -> bool:
        """Whether the daemon serves."""
        return self._serving

    def end(self) -> None:
        """Report from now on that the daemon does not serve."""
        with self._changed:
            self._serving = False
            self._changed.notify_all()

    def add_to(self, server: grpc.Server) -> None:
        """Add the service to a server."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Check": grpc.stream_unary_rpc_method_handler(
                run_inline(self._check), response_serializer=HealthCheckResponse.SerializeToString
            ),
            "Watch": grpc.stream_stream_rpc_method_handler(
                self._watch, response_serializer=HealthCheckResponse.SerializeToString
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(HEALTH, handlers),))

    def _check(self, requests: object, context: grpc.ServicerContext) -> HealthCheckResponse:
        return HealthCheckResponse(status="SERVING" if self._serving else "NOT_SERVING")

    def _watch(self, requests: object, context: grpc.ServicerContext) -> Iterator[HealthCheckResponse]:
        with self._changed:
            is_full = self._watchers == WATCHERS
            self._watchers += not is_full
        if is_full:
            abort(context, ExhaustedError(f"{WATCHERS} calls watch already.", "Use Check, or end one of them."))
        try:
            context.add_callback(self._wake)
            if self._serving:
                yield HealthCheckResponse(status="SERVING")
                self._wait(lambda: not self._serving or not context.is_active())
            yield HealthCheckResponse(status="NOT_SERVING")
            self._wait(lambda: not context.is_active())
        finally:
            with self._changed:
                self._watchers -= 1

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(condition)

    def _wake(self) -> None:
        """Called when a call has ended."""
        with self._changed:
            self._changed.notify_all()
