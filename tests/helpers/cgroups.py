"""A real limit on a process's memory. Skips, saying why, where none can be set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from moetier.tiers.errors import ConfigError
from moetier.tools.bench.sandbox import MemoryGroup, memory_group


@contextlib.contextmanager
def memory_limit(limit: int) -> Iterator[MemoryGroup]:
    """A control group of ``limit`` bytes without swap."""
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(memory_group(limit))
        except ConfigError as error:
            pytest.skip(error.cause)
        yield group
