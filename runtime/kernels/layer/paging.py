"""The step that this thread computes with keys and values in pages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor


class PagedStep(Protocol):
    """Computes the attention of a step's new tokens."""

    def attend(
        self, layer: int, query: Tensor, scaling: float | None, sinks: Tensor | None, window: int | None
    ) -> Tensor:
        """Compute query [1, heads, tokens, width] -> [1, tokens, heads, values]."""


_step: ContextVar[PagedStep | None] = ContextVar("moetier_paged_step", default=None)


@contextlib.contextmanager
def paged(step: PagedStep) -> Iterator[None]:
    """Let attention functions compute with ``step`` within the block, on this thread."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def paged_step() -> PagedStep | None:
    """Return the step that this thread computes; None if there is none."""
    return _step.get()
