"""A source whose records are replaced under their readers, as a daemon's may be: what was leased first is garbage."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import CopySource, Lease
from moetier.tiers.stats import TierStats


class UnsteadySource:
    """Of ``source``'s leases some show other bytes, do not hold, and come again behind the others, steady or not."""

    def __init__(self, source: CopySource[Any], seed: int = 0, share: float = 0.5) -> None:
        self.source = source
        self.uses = source.uses
        self.random = random.Random(seed)
        self.share = share
        self.broken = 0  # leases that did not hold
        self.unasked = 0  # leases that were neither proved nor the last when the next was taken

    def acquire(self, keys: Sequence[ExpertKey], of_total: int = 0) -> Generator[Lease[Any], None, None]:
        left = list(keys)
        while left:
            again: list[ExpertKey] = []
            for lease in self.source.acquire(left):
                asked: list[bool] = []
                if self.random.random() < self.share:
                    self.broken += 1
                    yield Lease(lease.key, _garbage(lease.record), -1 - lease.slot, partial(_answer, asked, False))
                    again += [lease.key] * len(asked)  # who does not use it does not ask
                else:
                    yield Lease(lease.key, lease.record, lease.slot, partial(_answer, asked, True))
                self.unasked += asked == []
            left = again

    @contextmanager
    def pin(self, key: ExpertKey) -> Iterator[Lease[Any] | None]:
        with self.source.pin(key) as lease:
            if lease is not None and self.random.random() < self.share:
                self.broken += 1
                lease = Lease(lease.key, _garbage(lease.record), -1 - lease.slot, lambda: False)
            yield lease

    def residents(self, block: int) -> None:
        return None  # so that all is leased

    def release_leases(self) -> None:
        self.source.release_leases()

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        return self.source.absent(keys)

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        self.source.prefetch(block, keys)

    def stats(self) -> TierStats:
        return self.source.stats()

    def close(self) -> None:
        self.source.close()


def _answer(asked: list[bool], holds: bool) -> bool:
    assert not asked, "a lease is proved once"
    asked.append(holds)
    return holds


def _garbage(record: Any) -> Any:
    if isinstance(record, memoryview):
        return memoryview(bytes([0x3C]) * len(record))
    return torch.full_like(record, 0x3C)
