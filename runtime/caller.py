"""Who makes a gRPC call: what it shows, where it comes from, and whether it is served."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NoReturn
from urllib.parse import unquote

import grpc

from moetier.tiers.errors import RefusedError

from .logfmt import Sparing
from .status import abort

_HEALTH = "/grpc.health.v1.Health/"

_log = logging.getLogger(__name__)


class CallerCheck(grpc.ServerInterceptor):
    """Lets those calls in whose bearer is accepted; to health checks everybody."""

    def __init__(self, accepts: Callable[[str], bool], *, anonymous: bool) -> None:
        self._accepts = accepts
        self._anonymous = anonymous
        self._refusals = Sparing(_log, "client-refused")

    def intercept_service(self, continuation: Callable[..., Any], handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_HEALTH) or self._anonymous:
            return handler
        bearer = bearer_of(handler_call_details.invocation_metadata)
        if bearer is not None and self._accepts(bearer):
            return handler
        cause = "no credential" if bearer is None else "a credential that is not known"
        return self._refusal(handler, cause)

    def _refusal(self, handler: Any, cause: str) -> Any:
        """A handler of the same kind that refuses."""

        def refuse(request: object, context: grpc.ServicerContext) -> NoReturn:
            self._refusals.say(peer=peer_of(context), cause=cause)
            abort(
                context,
                RefusedError(
                    "The call shows no credential that this daemon has issued or knows.",
                    "Give its token (--token-file); over a Unix socket, connect to its side socket first.",
                ),
            )

        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        return make(refuse)


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
