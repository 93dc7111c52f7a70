"""Order between the building of models and the computing with others in the same process.

While transformers builds a model, torch's default type of numbers is that of the model, for all threads. A model that
computes at that moment could make tensors of the wrong type. So models are built only while no engine computes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class ModelBuilding:
    """Keeps the building of models and computations apart. Builders go first. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards: ``_computing``, ``_waiting``, ``_builder``
        self._computing = 0  # number of computations
        self._waiting = 0  # number of builders, those that wait included
        self._builder: int | None = None  # thread that builds

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Compute in this context. Waits for builders."""
        self._begin_computing()
        try:
            yield
        finally:
            self._end_computing()

    def let_build(self) -> None:
        """Let builders go first that wait. Called between two parts of a long computation, in ``computing``."""
        if self._waiting:
            self._end_computing()
            self._begin_computing()

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Build a model in this context. Waits for computations; a model may be built within another."""
        own = threading.get_ident()
        if self._builder == own:
            yield
            return
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._computing and self._builder is None)
                self._builder = own
            except BaseException:
                self._waiting -= 1
                self._changed.notify_all()
                raise
        try:
            yield
        finally:
            with self._changed:
                self._waiting -= 1
                self._builder = None
                self._changed.notify_all()

    def _begin_computing(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)
            self._computing += 1

    def _end_computing(self) -> None:
        with self._changed:
            self._computing -= 1
            self._changed.notify_all()


BUILDING = ModelBuilding()  # of this process
