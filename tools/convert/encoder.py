"""Experts -> records: workers quantise them side by side, their records come out in order.

Each worker computes on one thread, so the bytes depend on no machine. One reads while the others compute, and all go on
while a record is written, or synced. What is held at a time is bounded: one record for each worker, and one that is
being written, or a few where they are small; a block that must be read whole is the only one while it is worked on.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue

import torch

from moetier.runtime.checkpoint.blueprint import Blueprint
from moetier.runtime.checkpoint.safetensors import Bytes
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.quant.codec import WeightError, encode
from moetier.tiers.quant.packing import band_bytes

INTERPRETER_BYTES = 450 << 20  # torch, transformers, the solver's temporaries
SPARE_BYTES, MOST_SPARE = 16 << 20, 8  # of records that are finished while the disk is busy: one at least


class Encoder:
    """Makes the records of a plan with several workers."""

    def __init__(self, blueprint: Blueprint, plan: Manifest, *, workers: int, fast: bool) -> None:
        self.workers = workers
        self._blueprint = blueprint
        self._plan = plan
        self._fast = fast
        self._turn = threading.Lock()  # one worker reads and merges at a time: that takes two copies of a projection

    @property
    def peak_bytes(self) -> int:
        """About what it takes beside the interpreter: one worker reads (two copies of a projection, while it is
        merged), the others hold theirs and its codes; each has memory for a band and a record to fill, and some more
        wait to be written."""
        peak = 0
        for index, block in enumerate(self._blueprint.blocks):
            layout = self._plan.layout(index)
            itemsize = max(getattr(torch, dtype).itemsize for _, dtype in block.parameters.values())
            sizes = [math.prod(shape) for shape, _ in block.parameters.values()]
            quantised = [p for p in layout.projections if p.bits != 16]
            codes = max(sizes) if quantised else 0
            band = max((band_bytes(p, itemsize) for p in quantised), default=0)
            if block.apart:
                reading, held = 2 * itemsize * max(sizes), itemsize * max(sizes) + codes
            else:
                reading, held = itemsize * block.experts * (sum(sizes) + max(sizes)) + codes, codes
            records = self._slots(layout.record_bytes) * layout.record_bytes
            peak = max(peak, reading + (self.workers - 1) * held + self.workers * band + records)
        return peak

    @property
    def promised_bytes(self) -> int:
        """Most bytes that a conversion is to take, the interpreter included: two experts in fp32 and 1 GiB.

        A block that is read whole may take more.
        """
        return max((8 * layout.weights for layout in self._plan.layouts.values()), default=0) + (1 << 30)

    def records(self, keys: Sequence[ExpertKey]) -> Generator[tuple[ExpertKey, Bytes, WeightError]]:
        """Yield the key, record and weight error of each of ``keys``, in order.

        A record is valid until the next one is asked for. Close the generator to stop early.
        """
        free: SimpleQueue[Bytes] = SimpleQueue()  # one for each task that is ahead, and the one that is yielded
        size = max((self._plan.layout(key.block).record_bytes for key in keys), default=0)
        slots = self._slots(size)
        for _ in range(min(slots, len(keys))):
            free.put(torch.empty(size, dtype=torch.uint8).numpy())
        waiting = deque(keys)
        ahead: deque[tuple[ExpertKey, Future[tuple[Bytes, WeightError]]]] = deque()
        with one_thread_each(), ThreadPoolExecutor(self.workers, "convert", lambda: torch.set_num_threads(1)) as pool:
            try:
                while waiting or ahead:
                    while waiting and len(ahead) < slots and self._may_start(waiting[0], ahead):
                        key = waiting.popleft()
                        ahead.append((key, pool.submit(self._encode, key, free)))
                    key, future = ahead.popleft()
                    record, error = future.result()
                    if all(k.block != key.block for k in (*(k for k, _ in ahead), *islice(waiting, 1))):
                        self._blueprint.blocks[key.block].release()  # all of its experts are encoded
                    yield key, record[: self._plan.layout(key.block).record_bytes], error
                    free.put(record)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _slots(self, record_bytes: int) -> int:
        """Records that are held at a time: one for each worker, and finished ones."""
        return self.workers + max(1, min(MOST_SPARE, SPARE_BYTES // max(1, record_bytes)))

    def _may_start(self, key: ExpertKey, ahead: Sequence[tuple[ExpertKey, object]]) -> bool:
        """Whether a block that is read whole overlaps with no other block."""
        blocks = self._blueprint.blocks
        return all(k.block == key.block or (blocks[k.block].apart and blocks[key.block].apart) for k, _ in ahead)

    def _encode(self, key: ExpertKey, free: SimpleQueue[Bytes]) -> tuple[Bytes, WeightError]:
        layout = self._plan.layout(key.block)
        tensors: Mapping[str, torch.Tensor] = self._blueprint.blocks[key.block].expert(key.expert, self._turn)
        record = free.get()
        errors = encode(tensors, layout, record[: layout.record_bytes], fast=self._fast)
        return record, sum(errors.values(), WeightError())


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Set torch to one thread while workers compute, each of which sets its own number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
