"""Workers that turn the weights of experts into records, in parallel.

Each worker computes on one thread, so the bytes of a record do not depend on the number of workers. Records are
yielded in order. Workers read and compute at the same time, also while a record is written. One worker at a time
merges what it has read, which takes a second copy. Memory is bounded: there is one record for each worker and one that
is being written, or a few more if records are small. A block whose experts can't be read one by one is encoded alone.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from queue import SimpleQueue
from typing import NamedTuple

import torch

from moetier.runtime.checkpoint.blueprint import Blueprint
from moetier.runtime.checkpoint.native import Kept, stored_in
from moetier.runtime.checkpoint.recipe import Expert, Merging
from moetier.runtime.formats.tensors import Bytes, read_range
from moetier.runtime.kernels.quantise.encode import encode
from moetier.runtime.machine.memory import available_memory
from moetier.runtime.machine.threads import usable_cpus
from moetier.tiers.layout import ZERO_POINTS, ExpertKey, RecordLayout
from moetier.tiers.manifest import Manifest
from moetier.tiers.quant.codec import WeightDeviation, sections
from moetier.tiers.quant.packing import band_bytes

from .options import Options

INTERPRETER_BYTES = 450 << 20  # torch, transformers, the solver's temporaries
QUEUED_BYTES, MAX_QUEUED = 64 << 20, 32  # of finished records that wait for the disk; one may always wait


class EncodedRecord(NamedTuple):
    """A record as it is stored, without its checksum, and how far its weights deviate from those of the checkpoint."""

    data: Bytes  # uint8 [record_bytes]
    deviation: WeightDeviation


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Set the calling thread's number of torch threads to 1 until the context ends. Workers set their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def pool_of(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of worker threads, in each of which torch uses one thread. At the end, cancel tasks in the queue."""
    with one_thread_each(), ThreadPoolExecutor(workers, "moetier-convert", lambda: torch.set_num_threads(1)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Encoder:
    """Makes the records of all experts of a store, with several workers."""

    blueprint: Blueprint
    manifest: Manifest  # of the store that is made
    workers: int
    fast: bool  # round to the nearest value instead of using HQQ

    @classmethod
    def of(cls, blueprint: Blueprint, manifest: Manifest, options: Options) -> Encoder:
        """Make an encoder, by default with one worker for each thread or CPU, or fewer if memory is short."""
        most = options.workers or options.threads or usable_cpus()
        least = 1 if options.workers is None else most
        encoders = [cls(blueprint, manifest, workers, options.fast) for workers in range(most, least - 1, -1)]
        free = min(available_memory().bytes, encoders[0].promised_bytes - INTERPRETER_BYTES)
        return next((encoder for encoder in encoders if encoder.peak_bytes <= free), encoders[-1])

    @property
    def peak_bytes(self) -> int:
        """Approximate peak memory in bytes, without the interpreter's.

        One worker holds two copies of a projection while it merges the parts. Each other worker holds a
        projection and its codes. Every worker also has a record to fill, and temporary memory for a band of rows. Some
        records wait to be written.
        """
        peak = 0
        for index, block in enumerate(self.blueprint.blocks):
            layout = self.manifest.layout(index)
            itemsize = max(getattr(torch, dtype).itemsize for _, dtype in block.parameters.values())
            sizes = [math.prod(shape) for shape, _ in block.parameters.values()]
            quantised = [p for p in layout.projections if p.bits != 16 and not p.coding]
            codes = max(sizes) if quantised else 0
            band = max((band_bytes(p, itemsize) for p in quantised), default=0)
            if block.is_separable:
                reading, held = 2 * itemsize * max(sizes), itemsize * max(sizes) + codes
            else:
                reading, held = itemsize * block.experts * (sum(sizes) + max(sizes)) + codes, codes
            records = self._buffers(layout.record_bytes) * layout.record_bytes
            peak = max(peak, reading + (self.workers - 1) * held + self.workers * band + records)
        return peak

    @property
    def promised_bytes(self) -> int:
        """Documented memory limit of a conversion with its interpreter, in bytes: two experts in fp32, plus 1 GiB.

        A block whose experts can't be read one by one may take more.
        """
        return max((8 * layout.weights for layout in self.manifest.layouts.values()), default=0) + (1 << 30)

    def records(self, blocks: Sequence[int]) -> Generator[EncodedRecord]:
        """Yield the record of each expert of ``blocks`` (numbers, in order), and how far its weights deviate.

        A record is valid until the next one is asked for. Close the generator to stop early.
        """
        waiting = deque(
            ExpertKey(block, expert) for block in blocks for expert in range(self.manifest.blocks[block].experts)
        )
        free: SimpleQueue[Bytes] = SimpleQueue()  # buffers: one for each task, and one for the record that is yielded
        size = max((self.manifest.layout(block).record_bytes for block in blocks), default=0)
        buffers = self._buffers(size)
        for _ in range(min(buffers, len(waiting))):
            free.put(torch.empty(size, dtype=torch.uint8).numpy())
        ahead: deque[tuple[ExpertKey, Future[tuple[Bytes, WeightDeviation]]]] = deque()
        merging = Merging()
        with pool_of(self.workers) as pool:
            while waiting or ahead:
                while waiting and len(ahead) < buffers and self._may_start(waiting[0], ahead):
                    key = waiting.popleft()
                    ahead.append((key, pool.submit(self._encode, key, free, merging)))
                key, future = ahead.popleft()
                record, deviation = future.result()
                if all(k.block != key.block for k in (*(k for k, _ in ahead), *islice(waiting, 1))):
                    merging.release()  # all experts of the block are encoded
                yield EncodedRecord(record[: self.manifest.layout(key.block).record_bytes], deviation)
                free.put(record)

    def _buffers(self, record_bytes: int) -> int:
        """Return how many records are in memory at any one time: one for each worker, and finished ones."""
        return self.workers + max(1, min(MAX_QUEUED, QUEUED_BYTES // max(1, record_bytes)))

    def _may_start(self, key: ExpertKey, ahead: Sequence[tuple[ExpertKey, object]]) -> bool:
        """Return whether ``key`` may be encoded together with the keys ``ahead``.

        A block that is read as a whole must be encoded alone.
        """
        blocks = self.blueprint.blocks
        return all(
            k.block == key.block or (blocks[k.block].is_separable and blocks[key.block].is_separable) for k, _ in ahead
        )

    def _encode(self, key: ExpertKey, free: SimpleQueue[Bytes], merging: Merging) -> tuple[Bytes, WeightDeviation]:
        layout, expert = self.manifest.layout(key.block), Expert(self.blueprint.blocks[key.block], key.expert, merging)
        record = free.get()
        if any(p.coding for p in layout.projections):
            _copy(expert, layout, record[: layout.record_bytes])
            return record, WeightDeviation()
        given = Kept(expert, layout) if any(p.pairs in ZERO_POINTS for p in layout.projections) else expert
        deviations = encode(given, layout, record[: layout.record_bytes], fast=self.fast)
        return record, sum(deviations.values(), WeightDeviation())


def _copy(expert: Expert, layout: RecordLayout, record: Bytes) -> None:
    """Fill ``record`` with an expert's bytes as the checkpoint stores them. Raises CheckpointError if a read fails."""
    record[:] = 0
    for name, view in sections(torch.from_numpy(record), layout).items():
        if "." not in name:
            view.copy_(expert[name])
            continue
        bytes_, at = view.view(-1).view(torch.uint8).numpy(), 0
        for stored in stored_in(expert.block, layout.section(name)):
            one = stored[expert.index]
            read_range(one.file, one.offset, bytes_[at : at + one.nbytes])
            at += one.nbytes
