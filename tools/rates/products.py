"""Rates from which bounds are computed: how fast this machine reads memory, and multiplies with records."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from moetier.tiers.layout import RecordLayout

if TYPE_CHECKING:
    import torch

    from moetier.runtime.kernels.products.api import Kernels

UNCACHED_BYTES = 512 << 20  # far more than a CPU's caches, so that a pass over it reads memory
TIMES = 4  # least number of timed runs


def memory_rate(nbytes: int) -> tuple[float, str]:
    """Measure how fast memory is read, with several operations of torch on a buffer of ``nbytes``.

    Return the bytes per second of the fastest operation, and its name. An operation either reads the buffer, or copies
    one half of it to the other.
    """
    import torch

    numbers = torch.ones(nbytes // 8 * 2)
    one, other = numbers.chunk(2)
    operations: dict[str, Callable[[], object]] = {
        "dot(x, x)": lambda: numbers.dot(numbers),
        "sum": numbers.sum,
        "copy": lambda: one.copy_(other),  # reads half, writes half
    }
    return max((numbers.nbytes / median_seconds(run, least_runs=TIMES), name) for name, run in operations.items())


def median_seconds(run: Callable[[], object], *, least_runs: int = 1, least_seconds: float = 0.0) -> float:
    """Return the median seconds of a call of ``run``.

    After one call to warm up, ``run`` is called at least ``least_runs`` times and for at least ``least_seconds``.
    """
    run()
    seconds: list[float] = []
    end = time.perf_counter() + least_seconds
    while len(seconds) < least_runs or time.perf_counter() < end:
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def projection_bytes(layout: RecordLayout, name: str) -> int:
    """Return the bytes of a record that a product with the projection ``name`` reads."""
    return sum(s.nbytes for s in layout.sections if s.name == name or s.name.startswith(f"{name}."))


def random_records(layout: RecordLayout, least_bytes: int) -> list[torch.Tensor]:
    """Return two or more copies of one random record, which take at least ``least_bytes`` together.

    If they are larger than a CPU's cache, a loop over them reads memory. A record is uint8 [record_bytes], with random
    codes and small scales.
    """
    import torch

    chance = torch.Generator().manual_seed(0)
    sections = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    record = torch.randint(256, (layout.record_bytes,), dtype=torch.uint8, generator=chance)
    for s in layout.sections:
        if s.dtype in sections:
            record[s.offset : s.offset + s.nbytes].view(sections[s.dtype]).uniform_(-0.02, 0.02, generator=chance)
    return [record.clone() for _ in range(max(2, -(-least_bytes // layout.record_bytes)))]


def activation_dtype() -> torch.dtype:
    """Return the dtype of activations with which kernels are fastest on this CPU."""
    import torch

    from moetier.runtime.libraries.torch_internals import has_bf16_instructions

    return torch.bfloat16 if has_bf16_instructions() else torch.float32


class KernelProbe:
    """Times products with the projections of ``layout``. It cycles through ``records``, so that CPU caches miss."""

    def __init__(self, kernels: Kernels, layout: RecordLayout, records: Sequence[torch.Tensor]) -> None:
        self._kernels, self._layout = kernels, layout
        self._records = cycle(records)

    def seconds(self, name: str, rows: int, *, at_least: float) -> float:
        """Return the median seconds of a product of x [rows, K] with the projection ``name``.

        The product is repeated for at least ``at_least`` seconds.
        """
        import torch

        projection = next(p for p in self._layout.projections if p.name == name)
        x = torch.full((rows, projection.columns), 0.5, dtype=activation_dtype())
        with torch.inference_mode():
            return median_seconds(
                lambda: self._kernels.project(x, next(self._records), self._layout, name), least_seconds=at_least
            )

    def rate(self, rows: int, *, at_least: float) -> float:
        """Measure the bytes per second of products with all projections of a record, for ``at_least`` seconds."""
        names = [p.name for p in self._layout.projections]
        nbytes = sum(projection_bytes(self._layout, name) for name in names)
        return nbytes / sum(self.seconds(name, rows, at_least=at_least / len(names)) for name in names)
