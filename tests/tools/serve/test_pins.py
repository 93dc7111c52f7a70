"""Requests that wait for a model of a server, and hold it."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from moetier.tools.serve.metrics import Tally
from moetier.tools.serve.pins import ModelEntry, Pin, refuse
from moetier.tools.serve.protocols.refusal import Refusal


def served(*, is_alive: bool = True) -> Any:
    return SimpleNamespace(service=SimpleNamespace(is_alive=is_alive))


def test_a_model_is_ready_while_it_is_loaded_can_compute_and_stays() -> None:
    entry = ModelEntry("m", Tally())
    assert not entry.is_ready
    entry.keep(served(), contextlib.ExitStack())
    assert entry.is_ready
    with entry.draining():
        assert not entry.is_ready
    assert entry.is_ready
    assert not ModelEntry("m", Tally(), served(is_alive=False)).is_ready


def test_a_request_gets_the_model_and_releases_it_once() -> None:
    released: list[Pin] = []
    model, entry = served(), ModelEntry("m", Tally())

    async def use() -> Any:
        with Pin(entry, released.append) as pin:
            assert pin.name == "m"
            waits = asyncio.ensure_future(pin.served())
            await asyncio.sleep(0)
            assert not waits.done()
            pin.future.set_result(model)
            assert await waits is await pin.served() is model
            assert not released
        assert released == [pin]

    asyncio.run(use())


def test_it_says_what_it_waits_for() -> None:
    entry = ModelEntry("m", Tally())
    pin = Pin(entry, lambda _: None)
    assert pin.progress_text() == "m waits to be loaded"
    with entry.loading():
        assert pin.progress_text() == "loading m"
    assert pin.progress_text() == "m waits to be loaded"


def test_what_is_taken_out_is_no_longer_ready_and_unloads_once() -> None:
    unloaded: list[str] = []
    model, entry, closing = served(), ModelEntry("m", Tally()), contextlib.ExitStack()
    closing.callback(unloaded.append, "m")
    entry.keep(model, closing)
    assert entry.take_out() == (model, closing)
    assert not entry.is_ready
    entry.closing.close()
    assert not unloaded
    closing.close()
    assert unloaded == ["m"]


def test_requests_that_wait_are_taken_once() -> None:
    entry = ModelEntry("m", Tally())
    entry.waiting.append(pin := Pin(entry, lambda _: None))
    assert entry.take_waiting() == [pin]
    assert entry.take_waiting() == []


def test_requests_that_wait_are_refused_and_those_that_were_cancelled_are_not() -> None:
    pin, cancelled = (Pin(ModelEntry("m", Tally()), lambda _: None) for _ in range(2))
    cancelled.future.cancel()
    refuse([cancelled, pin], Refusal(503, "no memory"))
    with pytest.raises(Refusal, match="no memory"):
        asyncio.run(pin.served())
    assert cancelled.future.cancelled()
