"""Streams that send signs of life, and streams that are read late."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, AsyncIterator

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')

from readers import PATIENCE

from moetier.tools.serve.waiting import kept_alive, read_ahead


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


class Numbers:
    """A stream of numbers up to ``end``; then it fails if it is told so."""

    def __init__(self, end: int, error: Exception | None = None) -> None:
        self.ended = asyncio.Event()
        self._end, self._error = end, error

    async def __aiter__(self) -> AsyncGenerator[int]:
        try:
            for number in range(self._end):
                yield number
                await asyncio.sleep(0)
            if self._error is not None:
                raise self._error
        finally:
            self.ended.set()


def test_a_stream_ends_before_it_is_read() -> None:
    async def read() -> list[int]:
        numbers = Numbers(1000)
        stream = read_ahead(aiter(numbers))
        first = await anext(stream)
        await asyncio.wait_for(numbers.ended.wait(), PATIENCE)
        return [first, *[number async for number in stream]]

    assert asyncio.run(read()) == [*range(1000)]


def test_a_stream_that_fails_fails_after_what_it_had() -> None:
    found = list[int]()

    async def read() -> None:
        async for number in read_ahead(aiter(Numbers(3, OSError("broken")))):
            found.append(number)

    with pytest.raises(OSError, match="broken"):
        asyncio.run(read())
    assert found == [0, 1, 2]


def test_a_stream_that_is_closed_ends() -> None:
    async def read() -> bool:
        numbers = Numbers(1 << 60)
        stream = read_ahead(aiter(numbers))
        await anext(stream)
        await stream.aclose()
        return numbers.ended.is_set()

    assert asyncio.run(read())
