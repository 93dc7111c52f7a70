"""Streams that send signs of life."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')

from moetier.tools.serve.waiting import kept_alive


def test_a_stream_that_its_client_leaves_as_it_ends_logs_no_error() -> None:
    said: list[object] = []

    async def leave() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
        may_end, has_ended = asyncio.Event(), asyncio.Event()

        async def events() -> AsyncIterator[str]:
            await may_end.wait()
            has_ended.set()
            if said:
                yield ""

        stream = kept_alive(events(), 0.001, lambda: "alive")
        assert await anext(stream) == "alive"
        may_end.set()
        await has_ended.wait()
        for _ in range(5):  # until the task that waits for it has ended
            await asyncio.sleep(0)
        await stream.aclose()
        gc.collect()

    asyncio.run(leave())
    assert said == []
