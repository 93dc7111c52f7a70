"""What stands before transformers' server: who may ask, and for what."""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .params import log_failure
from .serve_refusal import Refusal, refusal_response

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

HEALTH, METRICS, MODELS = "/health", "/metrics", "/v1/models"
ROUTES = {
    ("GET", HEALTH),
    ("GET", METRICS),
    ("GET", MODELS),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
}
JSON = b"application/json"
NAME_OF_THIS_HOST = re.compile(rb"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)


class Gate:
    """ASGI middleware: lets through requests that show ``key``, to ROUTES alone.

    Without a key (None) it lets through those that call this host by a name of its own, or any web page could have it
    asked by one of the page's. ``over`` is told the id of each request that has ended, however it did: a stream of
    which nothing was read can't tell the thread that generates for it.
    """

    def __init__(self, app: App, key: str | None, over: Callable[[str], None]) -> None:
        self._app = app
        self._over = over
        self._key = None if key is None else _digest(key.encode())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except Refusal as refusal:
            await refusal_response(refusal)(scope, receive, send)
            return
        # transformers keeps requests apart by this: no client may give it
        request_id = str(uuid.uuid4())
        headers = dict(scope["headers"])
        headers[b"x-request-id"] = request_id.encode()
        headers[b"content-type"] = headers.get(b"content-type") or JSON
        try:
            await self._app({**scope, "headers": [*headers.items()]}, receive, send)
        except Exception as error:  # of which the client has been told
            log_failure(f"{scope['method']} {scope['path']}", error)
        finally:
            self._over(request_id)

    def _check(self, scope: Message) -> None:
        method, path = scope["method"], scope["path"]
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if self._key is None and not NAME_OF_THIS_HOST.fullmatch(headers.get(b"host", b"")):
            raise Refusal(
                400,
                "Without an API key this server answers to names of its own machine alone: ask localhost, 127.0.0.1 or "
                "[::1], or give it a key (--api-key-file).",
                code="invalid_host",
            )
        if path != HEALTH and not self._knows(headers.get(b"authorization", b"")):
            raise Refusal(
                401,
                "The API key is missing or wrong.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if (method, path) not in ROUTES and not (method == "GET" and path.startswith(MODELS + "/")):
            raise Refusal(404, f"There is no {method} {path} here.", code="unknown_url")
        if method == "POST" and not headers.get(b"content-type") and b"origin" in headers:
            # browsers send it to another site without asking that first, but not a body of JSON that says so
            raise Refusal(400, "A request of a web page needs the Content-Type application/json.")

    def _knows(self, authorization: bytes) -> bool:
        if self._key is None:
            return True
        scheme, _, shown = authorization.partition(b" ")
        return hmac.compare_digest(_digest(shown.strip()), self._key) and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    """Of one length for all keys: how long a comparison takes says nothing."""
    return hashlib.sha256(key).digest()
