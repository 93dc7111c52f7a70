"""What stands before transformers' server: who may ask, and for what."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .serve_refusal import Refusal, refusal_response
from .serve_wanted import log_failure

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
MOST_BYTES = 16 << 20  # of a request's body
NAME_OF_THIS_HOST = re.compile(rb"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)


class Gate:
    """ASGI middleware: lets through whoever has ``key``, to ROUTES alone. Without a key (None) whoever calls this host
    by a name of its own, or any web page could have it asked by one of the page's. A client that goes away ends its
    request, be it a stream or not. ``over`` is told the id of each request that has ended, however it did: a stream
    that nobody began to read can't tell whoever generates for it."""

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
        # transformers keeps requests apart by this: nobody else may give it
        request_id = str(uuid.uuid4())
        headers = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
        headers.append((b"x-request-id", request_id.encode()))
        try:
            await self._serve({**scope, "headers": headers}, receive, send)
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
            raise Refusal(401, "The API key is missing or wrong.", code="invalid_api_key")
        if (method, path) not in ROUTES and not (method == "GET" and path.startswith(MODELS + "/")):
            raise Refusal(404, f"There is no {method} {path} here.", code="unknown_url")
        if method == "POST":
            length = headers.get(b"content-length", b"")
            if not length.isdigit():
                raise Refusal(411, "The request says no Content-Length.")
            if int(length) > MOST_BYTES:
                raise Refusal(413, f"The request has more than {MOST_BYTES} bytes.")

    def _knows(self, authorization: bytes) -> bool:
        if self._key is None:
            return True
        scheme, _, shown = authorization.partition(b" ")
        return hmac.compare_digest(_digest(shown.strip()), self._key) and scheme.lower() == b"bearer"

    async def _serve(self, scope: Message, receive: Receive, send: Send) -> None:
        gone, read = asyncio.Event(), asyncio.Event()

        async def hear() -> Message:
            if read.is_set():
                await gone.wait()
                return {"type": "http.disconnect"}
            message = await receive()
            if not message.get("more_body", False):
                read.set()
            return message

        async def watch() -> None:
            await read.wait()
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        work = asyncio.ensure_future(self._app(scope, hear, send))
        watcher = asyncio.ensure_future(watch())
        try:
            await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if gone.is_set():  # whoever generates for it is told by the cancellation
                work.cancel()
            await work
        except asyncio.CancelledError:
            pass  # by a client that is gone, or by a server that has waited for it for long enough
        except Exception as error:  # of which the client has been told
            log_failure(f"{scope['method']} {scope['path']}", error)
        finally:
            for task in (work, watcher):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task


def _digest(key: bytes) -> bytes:
    """Of one length for all keys: how long a comparison takes says nothing."""
    return hashlib.sha256(key).digest()
