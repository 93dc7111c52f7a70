"""Models of a server: each is loaded when a request needs it, and unloaded when another one needs its memory.

A request *pins* its model: it waits until the model is loaded, and the model stays loaded until the request has ended.
One thread loads and unloads, in the order of requests. While it makes room for a model, later requests for the models
that it will unload wait. So no model waits for ever.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moetier.runtime.libraries.lean import return_freed_memory
from moetier.runtime.machine.memory import Available, memory_for_model
from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import BudgetError
from moetier.tiers.threads import start_thread

from .catalogue import Catalogue
from .keys import Keys
from .metrics import Tally
from .pins import ModelEntry, Pin, refuse
from .protocols.refusal import ENDING, Refusal, log_failure, unknown_model

if TYPE_CHECKING:  # transformers is imported when a model is loaded, which takes less time and memory
    from moetier.runtime.engine.pages.saved_pages import Traffic

    from .serving import Served

TOO_LARGE = "model_too_large"  # code of the error of a model that does not fit
_log = logging.getLogger(__name__)


class LoadsModels(Protocol):
    """Loads models for a server."""

    @property
    def resources(self) -> Mapping[str, Any]:
        """Keyword arguments of ``load``."""

    @property
    def keys(self) -> Keys | None:
        """The API keys of the server; None: it has none."""

    def loaded(
        self, directory: Path, tally: Tally, options: Mapping[str, Any]
    ) -> contextlib.AbstractContextManager[Served]:
        """Load a model, and unload it at the end of the context; as ``ModelLoader.loaded``."""


class _UnwantedError(Exception):
    """No request waits for the model any longer."""


class Models(Closeable):
    """The models of a server. Thread-safe; requests may come in several event loops."""

    def __init__(
        self,
        catalogue: Catalogue,
        loader: LoadsModels,
        *,
        keep_alive: float | None = None,
        available: Callable[[], Available] = memory_for_model,
    ) -> None:
        """Load nothing yet.

        Args:
            catalogue: names and places of the models.
            loader: loads them.
            keep_alive: seconds after the end of its last request in which a model stays loaded; None: for ever.
            available: returns the memory that is free.
        """
        self.catalogue = catalogue
        self._loader = loader
        self._keep_alive = keep_alive
        self._available = available
        self._whole = Available(0, "this machine")  # memory that was free when no model was loaded
        # guards: ``_entries``, ``_wanted``, ``_thread``, ``_is_ending``, ``_is_closed``, ``_traffic``
        self._changed = threading.Condition()
        self._entries = {name: self._entry_of(name) for name in catalogue.models()}
        self._wanted: list[ModelEntry] = []  # for which requests wait, in the order of the first of them
        self._thread: threading.Thread | None = None
        self._is_ending = self._is_closed = False
        self._traffic: Traffic | None = None  # of keys and values on disk, of the models that were unloaded

    # -- requests -----------------------------------------------------------------------------------------------------

    def find(self, asked: str | None) -> str:
        """Return the name of the model that a request names. Raises Refusal if there is none."""
        if asked is None:
            if not self.catalogue.has_one:
                raise Refusal(400, "model: name one of the models that GET /v1/models lists.", param="model")
            (asked,) = self.catalogue.models()
        if (name := self.catalogue.find(asked)) is None:
            raise unknown_model(asked)
        return name

    def pin(self, name: str) -> Pin:
        """Return a request's hold on the model ``name``, which is loaded if it is not.

        Raises Refusal if the server shuts down.
        """
        with self._changed:
            if self._is_ending:
                raise Refusal(503, ENDING)
            if name not in self._entries:
                self._entries[name] = self._entry_of(name)
            entry = self._entries[name]
            pin = Pin(entry, self._release)
            if entry.is_ready:
                self._let_use(entry, [pin])
            else:
                entry.waiting.append(pin)
                if entry not in self._wanted:
                    self._wanted.append(entry)
                self._wake()
            return pin

    def _entry_of(self, name: str) -> ModelEntry:
        keys = self._loader.keys
        return ModelEntry(name, Tally([""] if keys is None else keys.names))

    def _let_use(self, entry: ModelEntry, pins: list[Pin]) -> None:
        """Let requests use a loaded model. The caller holds ``_changed``."""
        assert entry.served is not None
        for pin in pins:
            if pin.future.set_running_or_notify_cancel():
                entry.pin()
                pin.future.set_result(entry.served)

    def _release(self, pin: Pin) -> None:
        with self._changed:
            entry = pin.entry
            if pin in entry.waiting:
                entry.waiting.remove(pin)
            elif not pin.future.cancelled() and pin.future.exception() is None:
                entry.end_request()
            self._changed.notify_all()

    # -- what others see ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def seen(self) -> Iterator[list[tuple[str, Tally, Served | None]]]:
        """Yield the name, the counts and, if it is loaded, what serves each model. None is unloaded in the context."""
        names = self.catalogue.models()
        with self._changed:
            entries = [self._entries.setdefault(name, self._entry_of(name)) for name in names]
            loaded = [entry for entry in entries if entry.served is not None]
            for entry in loaded:
                entry.pin()
            seen = [(entry.name, entry.tally, entry.served) for entry in entries]
        try:
            yield seen
        finally:
            seen.clear()
            with self._changed:
                for entry in loaded:
                    entry.unpin()
                self._changed.notify_all()

    def used_tokens(self, key: str) -> int:
        """Return how many tokens of prompts and answers were counted for an API key, of all models."""
        with self._changed:
            entries = [*self._entries.values()]
        return sum(entry.tally.used_tokens(key) for entry in entries)

    @property
    def is_alive(self) -> bool:
        """Whether a loaded model can compute, or none is loaded. A request loads a model again that can't."""
        with self._changed:
            services = [entry.served.service for entry in self._entries.values() if entry.served is not None]
        return not services or any(service.is_alive for service in services)

    @property
    def traffic(self) -> Traffic | None:
        """Counts of what unloaded models have read and written on disk; None if there are none."""
        with self._changed:
            return self._traffic

    # -- loading ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def load_only(self) -> Iterator[Served]:
        """Load the only model now, on the calling thread, and yield it. It is not unloaded in the context.

        Raises MoetierError if it can't be loaded.
        """
        (name,) = self.catalogue.models()
        opened = self._opened(entry := self._entries[name], {})
        assert opened is not None, "there is no other model that could make room"
        self._keep(entry, *opened)
        yield opened[0]
        if self._keep_alive is not None:
            with self._changed:
                self._wake()  # the thread unloads the model, though no request may ever come

    def _wake(self) -> None:
        """Let the thread look what there is to do. The caller holds ``_changed``."""
        if self._thread is None:
            self._thread = start_thread("moetier-models", self._work)
        self._changed.notify_all()

    def _work(self) -> None:
        while (step := self._next()) is not None:
            step()
            del step  # an unload refers to what the model had on disk

    def _next(self) -> Callable[[], None] | None:
        """Wait until a request wants a model, or a model has been idle for ``keep_alive`` seconds.

        Return the function that loads or unloads it; None once the server is closed.
        """
        with self._changed:
            while not self._is_closed:
                self._wanted = [entry for entry in self._wanted if entry.waiting]
                if self._wanted:
                    return partial(self._provide, self._wanted[0])
                seconds = None
                if self._keep_alive is not None:
                    idle = [entry for entry in self._entries.values() if entry.served is not None and not entry.pins]
                    if (oldest := min(idle, key=lambda entry: entry.used, default=None)) is not None:
                        seconds = oldest.used + self._keep_alive - time.monotonic()
                        if seconds <= 0:
                            return self._take_out(oldest)  # at once: a request that comes now must not use it
                self._changed.wait(seconds)
        return None

    def _provide(self, entry: ModelEntry) -> None:
        """Load a model for the requests that wait for it, or refuse them."""
        refusal = None
        try:
            if not entry.is_ready:
                self._load(entry, self._make_room(entry))
        except _UnwantedError:
            return  # requests that have come since are found as new ones
        except BaseException as error:  # also a panic in a library that is written in Rust
            refusal = _refusal(entry.name, error)
        if refusal is not None:
            gc.collect()  # now that the error refers to no part of the model
            return_freed_memory()
        with self._changed:
            pins = entry.take_waiting()
            if refusal is None:
                self._let_use(entry, pins)
            else:
                refuse(pins, refusal)

    def _load(self, entry: ModelEntry, options: Mapping[str, Any]) -> None:
        """Load a model, with ``options`` in place of the server's. Others go if memory turns out to be too small.

        Raises _UnwantedError if no request waits for it any longer.
        """
        self._check_wanted(entry)
        while (opened := self._opened(entry, options)) is None:
            self._unload(self._first_to_go(entry), entry)
            self._check_wanted(entry)
            options = options if self._others(entry) else {}
        self._keep(entry, *opened)

    def _check_wanted(self, entry: ModelEntry) -> None:
        with self._changed:
            if not entry.waiting:
                raise _UnwantedError

    def _keep(self, entry: ModelEntry, served: Served, closing: contextlib.ExitStack) -> None:
        with self._changed:
            entry.keep(served, closing)

    def _opened(self, entry: ModelEntry, options: Mapping[str, Any]) -> tuple[Served, contextlib.ExitStack] | None:
        """Return a loaded model, with what unloads it; None if memory is too small beside others."""
        began = time.monotonic()
        try:
            with entry.loading(), contextlib.ExitStack() as closing:
                path = self.catalogue.models()[entry.name]
                served = closing.enter_context(self._loader.loaded(path, entry.tally, options))
                _log.info("%s is loaded, after %.1f s", entry.name, time.monotonic() - began)
                return served, closing.pop_all()
        except BudgetError:
            if not self._others(entry):
                raise
            return None

    def _make_room(self, entry: ModelEntry) -> Mapping[str, Any]:
        """Unload models until there is memory for another one. Return the options with which it is to be loaded.

        The memory is what it would take if no other were loaded. Raises BudgetError, before any is unloaded, if it does
        not fit then.
        """
        if entry.served is not None:  # its engine has failed
            self._unload(entry, entry)
        if self._others(entry):
            taken, free = self._taken(), self._available()
            bytes_ = min(self._whole.bytes, free.bytes + taken)
            whole = Available(bytes_, self._whole.limiter, self._whole.share)
            from .reservation import reservation_of

            reservation = reservation_of(self.catalogue.models()[entry.name], self._loader.resources, whole)
            while self._others(entry):
                if reservation is not None and reservation.nbytes <= whole.bytes - self._taken():
                    return reservation.options
                self._unload(self._first_to_go(entry), entry)
        self._whole = self._available()
        return {}

    def _others(self, entry: ModelEntry) -> list[ModelEntry]:
        with self._changed:
            return [other for other in self._entries.values() if other.served is not None and other is not entry]

    def _first_to_go(self, entry: ModelEntry) -> ModelEntry:
        """Return the model that was not used for longest, of those without a request if there is one."""
        return min(self._others(entry), key=lambda other: (other.pins > 0, other.used))

    def _taken(self) -> int:
        with self._changed:
            return sum(entry.served.reserved for entry in self._entries.values() if entry.served is not None)

    def _unload(self, entry: ModelEntry, wanted: ModelEntry) -> None:
        """Unload a model for ``wanted``, which needs its memory, once no request uses it.

        Raises _UnwantedError if no request waits for ``wanted`` any longer.
        """
        with self._changed:
            with entry.draining():
                self._changed.wait_for(lambda: not (entry.pins and wanted.waiting) or self._is_closed)
            if entry.pins or not wanted.waiting:
                raise _UnwantedError
            unload = self._take_out(entry)
        unload()

    def _take_out(self, entry: ModelEntry) -> Callable[[], None]:
        """Let no further request use a model, and return what unloads it. The caller holds ``_changed``."""
        served, closing = entry.take_out()
        disk = served.service.disk
        del served  # ``closing`` frees what nothing else refers to

        def unload() -> None:
            began = time.monotonic()
            try:
                closing.close()
            except KeyboardInterrupt:  # at the end, on the main thread
                raise
            except BaseException as error:  # also a panic in a library that is written in Rust
                log_failure(f"Unloading {entry.name}", error)
            if not self._is_closed:  # else the process ends, and its memory with it
                gc.collect()
                return_freed_memory()
            if self._others(entry):
                gc.freeze()  # again, as ``ModelLoader.loaded`` does
            if disk is not None:
                with self._changed:
                    self._traffic = disk.traffic() if self._traffic is None else self._traffic + disk.traffic()
            _log.info("%s is unloaded, after %.1f s", entry.name, time.monotonic() - began)

        return unload

    # -- the end ------------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """End all answers, and refuse others, because the server shuts down."""
        with self._changed:
            self._is_ending = True
            for entry in self._entries.values():
                refuse(entry.take_waiting(), Refusal(503, ENDING))
            services = [entry.served.service for entry in self._entries.values() if entry.served is not None]
            self._changed.notify_all()
        for service in services:
            service.cut()

    def close(self) -> None:
        """Unload all models, and end the thread once it has loaded or unloaded the model with which it is busy."""
        self.cut()
        with self._changed:
            self._is_closed = True
            thread = self._thread
            self._changed.notify_all()
        if thread is not None:
            thread.join()
        with self._changed:
            unloads = [self._take_out(entry) for entry in self._entries.values() if entry.served is not None]
        for unload in unloads:
            unload()


def _refusal(name: str, error: BaseException) -> Refusal:
    """Return the refusal of requests for a model that can't be loaded. The log gets the rest of ``error``."""
    log_failure(f"Loading {name}", error)
    if isinstance(error, BudgetError):
        return Refusal(507, f"The model {name} does not fit into memory. {error.cause}", code=TOO_LARGE)
    return Refusal(503, f"The model {name} can't be loaded; the server's log says why.")
