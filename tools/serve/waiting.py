"""Coroutines that wait: for work on another thread, and for the events of a stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, TypeVar, cast

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
        await ended(task)
        raise


async def ended(task: asyncio.Future[Any]) -> None:
    """Wait until a task has ended, even if the present one is cancelled meanwhile. Raises none of its errors."""
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # otherwise asyncio logs an error that was not taken


async def read_ahead(events: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """Yield ``events``, which a task takes as soon as they come, however late they are read.

    So what they need is released at their end. Raises what they raise.
    """
    taken: asyncio.Queue[T | None] = asyncio.Queue()

    async def take() -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    taken.put_nowait(event)
        finally:
            taken.put_nowait(None)

    taking = asyncio.ensure_future(take())
    try:
        while (event := await taken.get()) is not None:
            yield event
        await taking  # it may have failed
    finally:
        taking.cancel()
        await ended(taking)


async def kept_alive(
    events: AsyncIterator[str], seconds: float, progress_text: Callable[[], str]
) -> AsyncGenerator[str]:
    """Yield ``events``, and what ``progress_text`` returns whenever there was no event for ``seconds``.

    Proxies often close a connection on which nothing arrives for a minute.
    """
    upcoming: asyncio.Future[str] | None = None
    try:
        while True:
            upcoming = asyncio.ensure_future(anext(events))
            while not (await asyncio.wait({upcoming}, timeout=seconds))[0]:
                yield progress_text()
            try:
                event = upcoming.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        if upcoming is not None:
            upcoming.cancel()  # has an effect if the client is gone
            await ended(upcoming)
