"""Session ids for requests without one, so that Ray's router sends a conversation to the same replica each time.

The router sees a request's headers, but not its body. So middleware of Ray's HTTP proxies reads the beginning of the
body, and adds the header with the session id that the router looks for. The proxies do not know the API key. So they
take the same small amount of memory and time for any request.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
from typing import Any

from moetier.tools.serve.middleware import App, AsgiMessage, Receive, Send

# Ray's variable and default
HEADER = os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id").lower().encode()
START_BYTES = 128 << 10  # size of the beginning of a body; few conversations have a longer first message
START_SECONDS = 10.0  # longest time until it has arrived
PREFIX = 1000  # characters at the beginning of a text completion's prompt that tell conversations apart

_DECODER = json.JSONDecoder()


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

    async def __call__(self, scope: AsgiMessage, receive: Receive, send: Send) -> None:
        """Pass a request on, with a session id if its body shows the conversation."""
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or not scope["path"].endswith("/completions")
            or any(name == HEADER for name, _ in scope["headers"])
        ):
            await self._app(scope, receive, send)
            return
        messages: list[AsgiMessage] = []
        start, more = bytearray(), True
        with contextlib.suppress(TimeoutError):  # the replica waits for the rest, and refuses it if it takes too long
            async with asyncio.timeout(START_SECONDS):
                while more and len(start) < START_BYTES:
                    messages.append(await receive())
                    start += messages[-1].get("body", b"")
                    more = messages[-1].get("more_body", False)
        is_cut = len(start) > START_BYTES or more
        if (session := session_of(bytes(start[:START_BYTES]), is_cut=is_cut)) is not None:
            scope = {**scope, "headers": [*scope["headers"], (HEADER, session.encode())]}
        messages.reverse()

        async def replay() -> AsgiMessage:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)


def session_of(start: bytes, *, is_cut: bool = False) -> str | None:
    """Return a session id that is the same for all requests of a conversation, or None if ``start`` shows none.

    ``start`` is a request's body, or, if ``is_cut``, the first START_BYTES of it. The id depends on what all requests
    of a conversation begin with: the messages up to the first of the user, or the first PREFIX characters of a text
    completion's prompt. If these are cut, it depends on the part that is there.
    """
    text = start.decode(errors="ignore")
    try:
        beginning = _beginning(text)
    except _CutError as cut:
        if not is_cut or len(start) < START_BYTES:  # invalid, or too slow
            return None
        beginning = text[cut.start :]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return hashlib.blake2b(json.dumps(beginning).encode(), digest_size=16).hexdigest()


class _CutError(Exception):
    """The text of the messages or of the prompt, which begins at ``start``, is invalid or incomplete."""

    def __init__(self, start: int) -> None:
        super().__init__(start)
        self.start = start


def _beginning(text: str) -> Any:
    """Return what the conversation in ``text``, the beginning of a JSON object, begins with.

    Raises _CutError, ValueError, TypeError, KeyError or RecursionError if ``text`` has no conversation.
    """
    at = _after("{", text, 0)
    while True:
        name, at = _DECODER.raw_decode(text, at)
        at = _after(":", text, at)
        if name in ("messages", "prompt"):
            try:
                return _messages(text, at) if name == "messages" else _prompt(text, at)
            except ValueError:
                raise _CutError(at) from None
        _, at = _DECODER.raw_decode(text, at)
        at = _after(",", text, at)


def _prompt(text: str, at: int) -> str:
    """Return the first PREFIX characters of the string at ``at``."""
    prompt, _ = _DECODER.raw_decode(text, at)
    if not isinstance(prompt, str):
        raise TypeError
    return prompt[:PREFIX]


def _messages(text: str, at: int) -> list[Any]:
    """Parse the JSON array at offset ``at``, up to and including the first message with role "user"."""
    messages: list[Any] = []
    at = _after("[", text, at)
    while True:
        message, at = _DECODER.raw_decode(text, at)
        messages.append(message)
        if message["role"] == "user" or re.compile(r"\s*\]").match(text, at):
            return messages
        at = _after(",", text, at)


def _after(mark: str, text: str, at: int) -> int:
    """Return the position after ``mark`` and blanks around it. Raises ValueError if ``mark`` is not at ``at``."""
    if (match := re.compile(rf"\s*{re.escape(mark)}\s*").match(text, at)) is None:
        raise ValueError
    return match.end()
