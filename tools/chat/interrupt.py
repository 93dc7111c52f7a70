"""Ctrl-C while an answer is made."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class Interrupted(Exception):
    """Between two layers of a prefill."""


class Leave(KeyboardInterrupt):
    """Ctrl-C a second time, before the first one's wish came true."""


class Interrupt:
    """A context manager, of the main thread: within, the first Ctrl-C is a wish that is looked at where nothing is
    half done, between layers and between tokens; the second raises Leave at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def check(self) -> None:
        """Raises Interrupted."""
        if self.asked:
            raise Interrupted

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise Leave
        self.asked = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)
