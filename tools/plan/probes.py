"""Rates of this machine, measured in a few seconds: what an estimate is made of."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from moetier.tiers.host.tier import LOADERS
from moetier.tiers.layout import ROW_TILE, Bits, RecordLayout
from moetier.tiers.store.atomic import disk_errors
from moetier.tools.bench.disk import RandomReads
from moetier.tools.bench.rates import (
    TIMES,
    UNCACHED_BYTES,
    KernelProbe,
    MemoryProbe,
    activation_dtype,
    random_records,
    record_rate,
)
from moetier.tools.convert.files import free_bytes

from .cost import DiskRate

DISK_SECONDS = 2.0  # of random reads, half of them one at a time
LEAST_FILE_BYTES = 64 << 20  # of a file that is there: in a smaller one reads would meet too often
FILE_BYTES = 256 << 20  # that is read from, where there is no other file; less for a smaller model
LEAST_MADE_BYTES = 16 << 20  # but not less than this
KERNEL_SECONDS = 0.25
ROWS = 32  # of a product with many
PROBED_WEIGHTS = 1 << 22  # of a matrix that is multiplied
QUANTISED_WEIGHTS = 1 << 19
DEVIATION = 0.03  # of theirs: the solver takes longer with what no model has
OPERATIONS = 2000


def disk_rate(reads: RandomReads) -> DiskRate:
    """Measure the disk's rate with one read at a time, and with as many as there are loaders."""
    one, all_ = (reads.rate(depth, DISK_SECONDS / 2) for depth in (1, LOADERS))
    return DiskRate(one, all_, LOADERS)


@contextlib.contextmanager
def reads_at(folder: Path, block_bytes: int, model_bytes: int = FILE_BYTES) -> Iterator[RandomReads]:
    """Write a temporary file into ``folder`` and yield random reads of it.

    It is no larger than a model of ``model_bytes`` needs. Raises DiskSpaceError.
    """
    size = min(FILE_BYTES, max(LEAST_MADE_BYTES, model_bytes), free_bytes(folder) // 2)
    with disk_errors(folder, lambda: size), tempfile.NamedTemporaryFile(dir=folder, prefix=".moetier-plan-") as file:
        piece = os.urandom(1 << 20)
        for _ in range(max(1, size // len(piece))):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        yield RandomReads.of_files([Path(file.name)], block_bytes)


def probe_layout(layout: RecordLayout, bits: Bits) -> RecordLayout:
    """Return a layout of ``bits`` with the matrices of ``layout``, of PROBED_WEIGHTS at most.

    A whole expert may take seconds.
    """
    from moetier.tiers.quant.codec import layout_for

    shapes = {}
    for p in layout.projections:
        rows = min(p.rows, max(ROW_TILE, PROBED_WEIGHTS // p.columns))
        shapes[p.name] = ((rows, p.columns), "bfloat16")
    return layout_for(shapes, bits=bits)


def buffer_bytes(available: int) -> int:
    """Return the bytes to measure memory and kernels with: more than caches hold, where memory allows."""
    return min(UNCACHED_BYTES, available // 4)


def memory_rate(nbytes: int) -> float:
    """Measure the bytes a second that a buffer of ``nbytes`` is read at."""
    return MemoryProbe(nbytes)().rate


def kernel_rates(layouts: Mapping[Bits, RecordLayout], nbytes: int) -> tuple[dict[Bits, float], dict[Bits, float]]:
    """Measure records of each of ``layouts``, in turns over ``nbytes``.

    Returns, by bits, bytes a second with one row, and bytes times rows a second with many.
    """
    import torch

    from moetier.runtime.kernels.choose import kernels_for

    one: dict[Bits, float] = {}
    many: dict[Bits, float] = {}
    kernels = kernels_for(torch.device("cpu"))
    for bits, layout in layouts.items():
        record, *_ = random_records(layout, 0)
        copies = [record.clone() for _ in range(max(2, nbytes // layout.record_bytes))]
        probe = KernelProbe(kernels, layout, copies)
        one[bits] = record_rate(probe, layout, 1, at_least=KERNEL_SECONDS)
        many[bits] = ROWS * record_rate(probe, layout, ROWS, at_least=KERNEL_SECONDS)
    return one, many


def plain_rate(memory: float, nbytes: int) -> float:
    """Measure the bytes a second of a product of one row with a bf16 matrix.

    Where torch computes in fp32 that is the memory's rate.
    """
    import torch

    from moetier.runtime.kernels.row import linear_row

    dtype = activation_dtype()
    if dtype != torch.bfloat16:
        return memory
    weight, x = torch.full((max(1, nbytes // 8192), 4096), 0.01, dtype=dtype), torch.ones((1, 4096), dtype=dtype)
    found = []
    with torch.inference_mode():
        for _ in range(TIMES):
            began = time.perf_counter()
            if linear_row(x, weight) is None:
                torch.nn.functional.linear(x, weight)
            found.append(time.perf_counter() - began)
    return weight.nbytes / statistics.median(found)


def quantising_rates(widths: Collection[Bits]) -> dict[Bits, float]:
    """Measure the weights a second that one worker makes records of, by bits, without 16 bits."""
    import numpy as np
    import torch

    from moetier.tiers.quant.codec import encode, layout_for
    from moetier.tools.convert.encoder import one_thread_each

    found = {}
    shape = (QUANTISED_WEIGHTS // 1024, 1024)
    matrix = DEVIATION * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weights = {"weight": matrix.bfloat16()}
    with one_thread_each():
        torch.set_num_threads(1)
        for bits in widths:
            layout = layout_for({"weight": (shape, "bfloat16")}, bits=bits)
            record = np.empty(layout.record_bytes, np.uint8)
            encode(weights, layout, record)
            began = time.perf_counter()
            encode(weights, layout, record)
            found[bits] = QUANTISED_WEIGHTS / (time.perf_counter() - began)
    return found


def operation_seconds() -> float:
    """Measure the seconds of one operation of torch on a few numbers, called from Python."""
    import torch

    numbers = torch.ones(64)
    with torch.inference_mode():
        for _ in range(OPERATIONS // 10):
            numbers.add(numbers)
        began = time.perf_counter()
        for _ in range(OPERATIONS):
            numbers.add(numbers)
        return (time.perf_counter() - began) / OPERATIONS
