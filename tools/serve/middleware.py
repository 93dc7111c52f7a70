"""ASGI middleware in front of the application: access control, and limits on requests and their bodies."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import itertools
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .protocols.refusal import HEADER_BYTES, TOO_LONG, Refusal, headers_too_long, log_failure

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

HEALTH = "/health"
OPEN = {("GET", HEALTH), ("HEAD", HEALTH), ("HEAD", "/")}  # what needs no key
JSON = b"application/json"
NAME_OF_THIS_HOST = re.compile(rb"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)

MOST_BYTES = 16 << 20  # maximum size of a request's body, however long the context is
BYTES_WITHOUT_PROMPT = 1 << 20  # size of a body's part that needs no room in the context
BYTES_OF_TOKEN = 64  # bytes of a body for each token of the context; JSON takes up to 6 for a character
BODY_SECONDS = 60.0  # longest time until a whole body has arrived
RETRY_SECONDS = 5  # time after which a client that was refused may try again


def most_bytes(context: int) -> int:
    """Return the maximum size of a body in bytes, for a context of ``context`` tokens."""
    return min(BYTES_WITHOUT_PROMPT + BYTES_OF_TOKEN * context, MOST_BYTES)


class AccessControl:
    """Pass on the requests that may use the server, refuse all others, and log errors of the application.

    A request must send ``key`` as its bearer token or as ``x-api-key``, except for what is in OPEN. If ``key`` is None,
    no request needs a key, but its Host header must be localhost, 127.x.x.x or [::1]. Without this check a web page
    could reach the server through a host name of its own that resolves to this machine (DNS rebinding).
    """

    def __init__(self, app: App, key: str | None) -> None:
        self._app = app
        self._key = None if key is None else _digest(key.encode())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        try:
            self._check(scope, headers)
        except Refusal as refusal:
            await refusal.response(scope["path"])(scope, receive, send)
            return
        headers[b"content-type"] = headers.get(b"content-type") or JSON
        try:
            await self._app({**scope, "headers": [*headers.items()]}, receive, send)
        except Exception as error:  # the client has received an error response
            log_failure(f"{scope['method']} {scope['path']}", error)

    def _check(self, scope: Message, headers: dict[bytes, bytes]) -> None:
        """Check host, key, content type and the headers' size. Raises Refusal if one does not permit the request."""
        parts = [scope.get("raw_path") or b"", scope["query_string"], *itertools.chain(*scope["headers"])]
        if sum(map(len, parts)) > HEADER_BYTES:  # the listener limits only headers that arrive in several parts
            raise headers_too_long()
        if self._key is None and not NAME_OF_THIS_HOST.fullmatch(headers.get(b"host", b"")):
            raise Refusal(
                400,
                "This server has no API key, so it accepts only requests to localhost, 127.0.0.1 or [::1]. Use one of "
                "these as the host, or start the server with a key (--api-key-file).",
                code="invalid_host",
            )
        if (scope["method"], scope["path"]) not in OPEN and not self._knows(headers):
            raise Refusal(
                401,
                "The API key is missing or wrong. Send it in the header 'Authorization: Bearer KEY' or 'x-api-key'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if scope["method"] == "POST" and not headers.get(b"content-type") and b"origin" in headers:
            # a web page can send a POST to another site without that site's consent (a preflight request), unless its
            # Content-Type is application/json
            raise Refusal(400, "A request from a web page needs the header 'Content-Type: application/json'.")

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        """Return whether a request has the key. A client may send another one beside it, as Anthropic's do."""
        scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
        keys = [headers.get(b"x-api-key", b""), *([shown] if scheme.lower() == b"bearer" else [])]
        return self._key is None or any(hmac.compare_digest(_digest(key.strip()), self._key) for key in keys)


def _digest(key: bytes) -> bytes:
    """Return a digest of a key. As all digests have the same length, the time of a comparison reveals nothing."""
    return hashlib.sha256(key).digest()


class RequestLimits:
    """Pass on a POST request once its whole body has arrived, and cancel it if its client disconnects.

    Up to ``most`` POST requests are accepted at a time, including those that wait for their turn. Further requests are
    refused with status 429. A request whose client has disconnected counts until the application has ended its work.
    A body of more than ``most_bytes`` is refused with 413, whatever its Content-Length says, and a body that does not
    arrive within ``body_seconds`` with 408. Other requests than POST are passed on unchanged.
    """

    def __init__(self, app: App, most: int, most_bytes: int, *, body_seconds: float = BODY_SECONDS) -> None:
        self._app = app
        self._most = most
        self._most_bytes = most_bytes
        self._body_seconds = body_seconds
        self._under_way = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            if self._under_way >= self._most:
                raise Refusal(
                    429,
                    f"The queue is full: {self._most} requests are being computed or wait. Try again later.",
                    code="queue_full",
                    headers={"Retry-After": str(RETRY_SECONDS)},
                )
            self._under_way += 1
            try:
                messages = await self._received(dict(scope["headers"]), receive)
                if messages is not None:
                    await self._serve(messages, scope, receive, send)
            finally:
                self._under_way -= 1
        except Refusal as refusal:
            await refusal.response(scope["path"])(scope, receive, send)

    async def _received(self, headers: dict[bytes, bytes], receive: Receive) -> asyncio.Queue[Message] | None:
        """Return a queue that holds one message, with the whole body, so that nothing else holds the body.

        Return None if the client disconnects before the body is complete.
        Raises Refusal if the body is too large, or takes too long to arrive.
        """
        body, more = bytearray(), True
        stated = headers.get(b"content-length", b"")
        size = int(stated[:20]) if stated.isdigit() else 0
        try:
            async with asyncio.timeout(self._body_seconds):
                while more and size <= self._most_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    size = len(body)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise Refusal(
                408, f"The body did not arrive within {self._body_seconds:g} s.", headers={"Connection": "close"}
            ) from None
        if size > self._most_bytes:
            raise Refusal(
                413,
                f"The body has more than {self._most_bytes:,} bytes, and the context has no room for more.",
                code=TOO_LONG,
                headers={"Connection": "close"},
            )
        messages: asyncio.Queue[Message] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": bytes(body), "more_body": False})
        return messages

    async def _serve(self, messages: asyncio.Queue[Message], scope: Message, receive: Receive, send: Send) -> None:
        """Run the application on a request with ``messages``, and cancel it if the client disconnects."""

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        work, watching = asyncio.ensure_future(self._app(scope, messages.get, send)), asyncio.ensure_future(watch())
        try:
            await asyncio.wait({work, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():  # the client is gone
                work.cancel()
            await work
        except asyncio.CancelledError:
            pass  # the client is gone, or the server shuts down and GRACE is over
        finally:
            for task in (work, watching):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
