"""Checks the credential of a gRPC call, as soon as its headers are there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn
from urllib.parse import unquote

import grpc

from moetier.runtime.wire.status_codes import abort
from moetier.tiers.errors import RefusedError

from .log import Sparing

_log = logging.getLogger(__name__)


class CallerCheck(grpc.ServerInterceptor):
    """Refuses calls whose bearer is not accepted.

    A refusal needs neither a message of the call nor a thread of the server's, and does not count as a call under way.
    So calls that are refused take nothing from those that are accepted, however many are left half-open.
    """

    def __init__(self, accepts: Callable[[str | None], bool], *, exempt: str | None = None) -> None:
        """``accepts`` gets the bearer, None without one; calls of the service ``exempt`` need none."""
        self._accepts = accepts
        self._exempt = f"/{exempt}/"
        self._refusals = Sparing(_log, "client-refused")

    def intercept_service(self, continuation: Callable[..., Any], handler_call_details: Any) -> Any:
        bearer = bearer_of(handler_call_details.invocation_metadata)
        if self._accepts(bearer) or handler_call_details.method.startswith(self._exempt):
            return continuation(handler_call_details)
        cause = "no credential" if bearer is None else "a credential that is not known"

        def refuse(requests: object, context: grpc.ServicerContext) -> NoReturn:
            self._refusals.say(peer=peer_of(context), cause=cause)
            abort(
                context,
                RefusedError(
                    "The call shows no credential that this daemon has issued or knows.",
                    "Give its token (`credentials.token_file`); over a Unix socket, connect to its control socket "
                    "first.",
                ),
            )

        # of whatever kind the call is: gRPC waits for the message of a unary one before it runs the handler
        return grpc.stream_stream_rpc_method_handler(at_once(refuse))


class _Inline(ThreadPoolExecutor):
    """Runs what is submitted before it returns. It has no threads."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **named))  # gRPC's own function, which catches what a handler raises
        return future


_INLINE = _Inline()


def at_once(handler: Callable[[Any, grpc.ServicerContext], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
    """``handler``, to be run by the thread that accepts calls: it must neither wait nor yield. Without a thread of the
    pool the call is over before the next is counted."""

    def run(requests: Any, context: grpc.ServicerContext) -> Any:
        return handler(requests, context)

    run.experimental_thread_pool = _INLINE  # type: ignore[attr-defined]
    return run


def peer_of(context: grpc.ServicerContext) -> str:
    """Where a call comes from: "ipv4:10.0.0.7:51234", "unix:"."""
    return unquote(context.peer())


def bearer_of(metadata: Any) -> str | None:
    """What a call shows; None when that is nothing, or several things."""
    shown = [value for name, value in metadata or () if name == "authorization"]
    if len(shown) != 1 or not isinstance(shown[0], str):
        return None
    scheme, _, bearer = shown[0].partition(" ")
    return bearer if scheme.lower() == "bearer" and bearer else None
