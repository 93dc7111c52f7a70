"""ASGI middleware in front of the application: access control, and limits on requests and their bodies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .keys import Keys, RateLimits
from .page import FILES
from .protocols.refusal import HEADER_BYTES, TOO_LONG, Refusal, headers_too_long, log_failure

AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]
App = Callable[[AsgiMessage, Receive, Send], Awaitable[None]]

HEALTH = "/health"
OPEN = {HEALTH, *FILES}  # what GET and HEAD need no key for
USER = "moetier.user"  # field of a scope: the name of the API key that the request has
JSON = b"application/json"
NAME_OF_THIS_HOST = re.compile(rb"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)

MAX_BYTES = 16 << 20  # maximum size of a request's body, however long the context is
BYTES_WITHOUT_PROMPT = 1 << 20  # size of a body's part that needs no room in the context
BYTES_OF_TOKEN = 64  # bytes of a body for each token of the context; JSON takes up to 6 for a character
BODY_SECONDS = 60.0  # longest time until a whole body has arrived
RETRY_SECONDS = 5  # time after which a client that was refused may try again


def most_bytes(context: int) -> int:
    """Return the maximum size of a body in bytes, for a context of ``context`` tokens."""
    return min(BYTES_WITHOUT_PROMPT + BYTES_OF_TOKEN * context, MAX_BYTES)


class AccessControl:
    """Pass on the requests that may use the server, refuse all others, and log errors of the application.

    A request must send one of ``keys`` as its bearer token or as ``x-api-key``, except for what is in OPEN. The scope
    has the key's name under USER. A POST must also be within the key's limits. If ``keys`` is None, no request needs a
    key, but its Host header must be localhost, 127.x.x.x or [::1]. Without this check a web page could reach the server
    through a host name of its own that resolves to this machine (DNS rebinding).
    """

    def __init__(self, app: App, keys: Keys | None, limits: RateLimits) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits

    async def __call__(self, scope: AsgiMessage, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        try:
            user = self._check(scope, headers)
        except Refusal as refusal:
            await refusal.response(scope["path"])(scope, receive, send)
            return
        headers[b"content-type"] = headers.get(b"content-type") or JSON
        try:
            await self._app({**scope, "headers": [*headers.items()], USER: user}, receive, send)
        except Exception as error:  # the client has received an error response
            log_failure(f"{scope['method']} {scope['path']}", error)

    def _check(self, scope: AsgiMessage, headers: dict[bytes, bytes]) -> str:
        """Check host, key, content type and the headers' size. Return the name of the key.

        Raises Refusal if one does not permit the request.
        """
        parts = [scope.get("raw_path") or b"", scope["query_string"], *itertools.chain(*scope["headers"])]
        if sum(map(len, parts)) > HEADER_BYTES:  # the listener limits only headers that arrive in several parts
            raise headers_too_long()
        if self._keys is None and not NAME_OF_THIS_HOST.fullmatch(headers.get(b"host", b"")):
            raise Refusal(
                400,
                "This server has no API key, so it accepts only requests to localhost, 127.0.0.1 or [::1]. Use one of "
                "these as the host, or start the server with a key (--api-key-file).",
                code="invalid_host",
            )
        is_open = scope["path"] in OPEN and scope["method"] in ("GET", "HEAD")
        user = "" if self._keys is None or is_open else self._admit(scope, headers)
        if scope["method"] == "POST" and not headers.get(b"content-type") and b"origin" in headers:
            # a web page can send a POST to another site without that site's consent (a preflight request), unless its
            # Content-Type is application/json
            raise Refusal(400, "A request from a web page needs the header 'Content-Type: application/json'.")
        return user

    def _admit(self, scope: AsgiMessage, headers: dict[bytes, bytes]) -> str:
        """Return the name of a request's key. Raises Refusal if it has none, or too many requests have it."""
        assert self._keys is not None
        key = self._keys.shown_by(headers)
        if key is None:
            raise Refusal(
                401,
                "The API key is missing or wrong. Send it in the header 'Authorization: Bearer KEY' or 'x-api-key'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if scope["method"] == "POST" and (exceeded := self._limits.admit(key)) is not None:
            limit, seconds = exceeded
            raise Refusal(
                429,
                f"This API key may use {limit} a minute. Try again in {seconds} s.",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(seconds)},
            )
        return key.name


class RequestLimits:
    """Pass on a POST request once its whole body has arrived, and cancel it if its client disconnects.

    Up to ``most`` POST requests are accepted at a time, including those that wait. Further requests are
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

    async def __call__(self, scope: AsgiMessage, receive: Receive, send: Send) -> None:
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

    async def _received(self, headers: dict[bytes, bytes], receive: Receive) -> asyncio.Queue[AsgiMessage] | None:
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
        messages: asyncio.Queue[AsgiMessage] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": bytes(body), "more_body": False})
        return messages

    async def _serve(
        self, messages: asyncio.Queue[AsgiMessage], scope: AsgiMessage, receive: Receive, send: Send
    ) -> None:
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
