"""Coroutines that wait: for work on another thread, and for the events of a stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TypeVar, cast

T = TypeVar("T")


async def on_thread(work: Callable[[], T]) -> T:
    """Run ``work`` on another thread and return its result.

    If this task is cancelled, wait for the thread first. So the request keeps its place in ``RequestLimits``, and
    clients that have left can't occupy further threads. Work that has not begun by then is left out.
    """
    is_wanted = True

    def begin() -> T | None:
        return work() if is_wanted else None

    task = asyncio.ensure_future(asyncio.to_thread(begin))
    try:
        return cast("T", await asyncio.shield(task))
    except asyncio.CancelledError:
        is_wanted = False
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # else asyncio would log that the exception was not looked at
        raise


async def kept_alive(events: AsyncIterator[str], seconds: float, say: Callable[[], str]) -> AsyncGenerator[str]:
    """Yield ``events``, and what ``say`` returns whenever there was no event for ``seconds``.

    Proxies often close a connection on which nothing arrives for a minute.
    """
    upcoming: asyncio.Future[str] | None = None
    try:
        while True:
            upcoming = asyncio.ensure_future(anext(events))
            while not (await asyncio.wait({upcoming}, timeout=seconds))[0]:
                yield say()
            try:
                event = upcoming.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        if upcoming is not None:
            upcoming.cancel()  # has an effect if the client is gone
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await upcoming  # otherwise asyncio logs an error that was not taken
