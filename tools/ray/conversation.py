"""Session ids for requests without one, so that Ray's router sends a conversation to the same replica each time.

The router sees a request's headers, but not its body. So middleware of Ray's HTTP proxies reads the body, and adds the
header with the session id that the router looks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from typing import Any

from moetier.tools.serve.middleware import BODY_SECONDS, MOST_BYTES, App, Message, Receive, Send

HEADER = (
    os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id").lower().encode()
)  # Ray's variable and default
PREFIX = 1000  # characters at the beginning of a text completion's prompt that tell conversations apart


def session_ids() -> list[Any]:
    """Return Starlette middleware that adds session ids. Ray calls the function that this variable names:

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=moetier.ray.session_ids
    """
    from starlette.middleware import Middleware

    return [Middleware(SessionIds)]


class SessionIds:
    """ASGI middleware that adds the header HEADER to requests for completions that lack it."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, with a session id if its body shows the conversation."""
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or not scope["path"].endswith("/completions")
            or any(name == HEADER for name, _ in scope["headers"])
        ):
            await self._app(scope, receive, send)
            return
        messages: list[Message] = []
        body, more = bytearray(), True
        with contextlib.suppress(TimeoutError):  # the replica waits for the rest, and refuses it if it takes too long
            async with asyncio.timeout(BODY_SECONDS):
                while more and len(body) <= MOST_BYTES:
                    messages.append(await receive())
                    body += messages[-1].get("body", b"")
                    more = messages[-1].get("more_body", False)
        if not more and (session := session_of(body)) is not None:
            scope = {**scope, "headers": [*scope["headers"], (HEADER, session.encode())]}
        messages.reverse()

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)


def session_of(body: bytes | bytearray) -> str | None:
    """Return a session id that is the same for all requests of a conversation, or None for an invalid body.

    It depends on what all of these begin with: the messages up to the first of the user, or the first PREFIX characters
    of a text completion's prompt.
    """
    try:
        given = json.loads(body)
        start: Any = given["prompt"][:PREFIX] if "prompt" in given else []
        for message in given.get("messages", ()):
            start.append(message)
            if message["role"] == "user":
                break
        text = json.dumps(start).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return hashlib.blake2b(text, digest_size=16).hexdigest()
