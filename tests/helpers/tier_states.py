"""States of a host tier that tests wait for or bring about."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from readers import PATIENCE
from threads import Task

from moetier.tiers.errors import ClosedError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey


def is_closed(tier: HostTier) -> bool:
    """Return whether ``close`` has begun."""
    try:
        tier.prefetch(len(tier.manifest.blocks) - 1, [])
    except ClosedError:
        return True
    return False


@contextlib.contextmanager
def held_lock(tier: HostTier, key: ExpertKey) -> Iterator[None]:
    """Another thread holds the tier's lock: it delivers a session's lease of ``key``, which is READY."""
    reached, go_on = threading.Event(), threading.Event()

    def deliver(event: object) -> None:
        reached.set()
        assert go_on.wait(PATIENCE)

    with contextlib.closing(tier.session(deliver)) as session:
        task = Task(lambda: session.acquire(1, [key]))
        try:
            assert reached.wait(PATIENCE)
            yield
        finally:
            go_on.set()
            task.result()
