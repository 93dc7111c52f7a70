"""Another user, for real. Skips where this one can't become another."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from moetier.testing import in_fork

NOBODY = 65534


def as_nobody(work: Callable[[], object]) -> str:
    """Run ``work`` in a forked child of another user. Return "returned ...", or its error."""
    need_root()

    def become_and_work() -> object:
        become_nobody()
        return work()

    return in_fork(become_and_work)


def become_nobody() -> None:
    """Change this process's user for good. Only for a child."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
