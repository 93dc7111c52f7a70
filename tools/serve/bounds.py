"""Bounds on what clients take of a server: requests at a time, bytes and seconds of a body."""

from __future__ import annotations

import asyncio
import contextlib

from .middleware import App, Message, Receive, Send
from .serve_refusal import Refusal, refusal_response

MOST_BYTES = 16 << 20  # of a request's body
BODY_SECONDS = 60.0  # for the whole of it
RETRY_SECONDS = 5


class Bounds:
    """ASGI middleware: read the body of a POST request, and end the request when its client goes away.

    Up to ``most`` POST requests are served at a time, those that wait for their turn among them; further ones are
    refused with 429. The bytes of a body are counted as they arrive, whatever the headers say.
    """

    def __init__(self, app: App, most: int, *, body_seconds: float = BODY_SECONDS) -> None:
        self._app = app
        self._most = most
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
                    f"{self._most} requests are computed or wait for their turn already. Try again later.",
                    code="queue_full",
                    headers={"Retry-After": str(RETRY_SECONDS)},
                )
            self._under_way += 1
            try:
                body = await self._body(scope, receive)
                if body is not None:
                    await self._serve(body, scope, receive, send)
            finally:
                self._under_way -= 1
        except Refusal as refusal:
            await refusal_response(refusal)(scope, receive, send)

    async def _body(self, scope: Message, receive: Receive) -> bytes | None:
        """Return the body, or None where the client went away before it had sent it all. Raises Refusal."""
        body, more = bytearray(), True
        stated: bytes = dict(scope["headers"]).get(b"content-length", b"")
        size = int(stated[:20]) if stated.isdigit() else 0
        try:
            async with asyncio.timeout(self._body_seconds):
                while more and size <= MOST_BYTES:
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
        if size > MOST_BYTES:
            raise Refusal(413, f"The request has more than {MOST_BYTES} bytes.", headers={"Connection": "close"})
        return bytes(body)

    async def _serve(self, body: bytes, scope: Message, receive: Receive, send: Send) -> None:
        gone, given = asyncio.Event(), False

        async def hear() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        work, watching = asyncio.ensure_future(self._app(scope, hear, send)), asyncio.ensure_future(watch())
        try:
            await asyncio.wait({work, watching}, return_when=asyncio.FIRST_COMPLETED)
            if gone.is_set():  # the cancellation ends the generation of its answer
                work.cancel()
            await work
        except asyncio.CancelledError:
            pass  # the client is gone, or the server has waited for the request for long enough
        finally:
            for task in (work, watching):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
