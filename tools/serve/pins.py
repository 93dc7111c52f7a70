"""State of a model of a server, and requests that wait for it or use it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .metrics import Tally
from .protocols.refusal import Refusal

if TYPE_CHECKING:  # transformers is imported when a model is loaded
    from .serving import Served


@dataclass(eq=False)
class ModelEntry:
    """State of a model: whether it is loaded, what uses it, and what waits for it.

    All but ``name`` and ``tally`` is read, and changed by the methods, under the lock of ``Models``. But
    ``is_loading`` is set without the lock: it is only said to clients that wait.
    """

    name: str
    tally: Tally
    served: Served | None = None  # None: it is not loaded
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # unloads it
    pins: int = 0  # requests that use it, and those that read its counts
    waiting: list[Pin] = field(default_factory=list)  # requests that wait until it is loaded
    used: float = 0.0  # time of the end of its last request
    drains: bool = False  # whether it is unloaded as soon as no request uses it
    is_loading: bool = False

    def pin(self) -> None:
        """Keep the model loaded until ``unpin``."""
        self.pins += 1

    def unpin(self) -> None:
        """End the effect of one ``pin``."""
        self.pins -= 1

    def end_request(self) -> None:
        """Unpin the model, and note that a request has used it until now."""
        self.unpin()
        self.used = time.monotonic()

    def keep(self, served: Served, closing: contextlib.ExitStack) -> None:
        """Keep what was loaded, and what unloads it."""
        self.served, self.closing, self.used = served, closing, time.monotonic()

    def take_out(self) -> tuple[Served, contextlib.ExitStack]:
        """Return what is loaded, and what unloads it. No further request can use it."""
        assert self.served is not None
        taken = self.served, self.closing
        self.served, self.closing = None, contextlib.ExitStack()
        return taken

    def take_waiting(self) -> list[Pin]:
        """Return the requests that wait. They don't any more."""
        waiting, self.waiting = self.waiting, []
        return waiting

    @contextlib.contextmanager
    def draining(self) -> Iterator[None]:
        """In the context, no further request can use the model."""
        self.drains = True
        try:
            yield
        finally:
            self.drains = False

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """In the context, the model is being loaded."""
        self.is_loading = True
        try:
            yield
        finally:
            self.is_loading = False

    @property
    def is_ready(self) -> bool:
        """Whether further requests can use it."""
        return self.served is not None and self.served.service.is_alive and not self.drains


class Pin:
    """A request's hold on a model, from its arrival to its end. A context manager."""

    def __init__(self, entry: ModelEntry, release: Callable[[Pin], None]) -> None:
        self.entry = entry
        self.future: Future[Served] = Future()
        self._release = release

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.entry.name

    async def served(self) -> Served:
        """Wait until the model is loaded, and return it. Raises Refusal if it can't be loaded."""
        return self.future.result() if self.future.done() else await asyncio.wrap_future(self.future)

    def progress_text(self) -> str:
        """Return what a client waits for."""
        return f"loading {self.entry.name}" if self.entry.is_loading else f"{self.entry.name} waits to be loaded"

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, *error: object) -> None:
        self._release(self)


def refuse(pins: Iterable[Pin], refusal: Refusal) -> None:
    """Refuse requests that wait."""
    for pin in pins:
        if pin.future.set_running_or_notify_cancel():
            pin.future.set_exception(refusal)
