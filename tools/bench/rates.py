"""How fast this machine reads memory, and multiplies with records: what a bound is made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetier.tiers.layout import RecordLayout

if TYPE_CHECKING:
    import torch

    from moetier.runtime.kernels.api import Kernels

UNCACHED_BYTES = 512 << 20  # far more than any cache: what is read through it comes from memory
TIMES = 4


@dataclass(frozen=True, slots=True)
class MemoryRate:
    """Bytes a second; ``by`` is the operation that was quickest."""

    rate: float
    by: str


class MemoryProbe:
    """Operations of torch that do nothing but read a buffer, or copy one half of it into the other."""

    def __init__(self, nbytes: int) -> None:
        import torch

        self._buffer = torch.ones(nbytes // 4)

    def __call__(self) -> MemoryRate:
        """Return the highest rate that any of them reaches, by the median of a few times."""
        numbers, nbytes = self._buffer, self._buffer.nbytes
        one, other = numbers.chunk(2)
        operations: dict[str, Callable[[], object]] = {
            "dot(x, x)": lambda: numbers.dot(numbers),
            "sum": numbers.sum,
            "copy": lambda: one.copy_(other),  # reads half, writes half
        }
        rates = {name: nbytes / statistics.median(_times(run, TIMES)) for name, run in operations.items()}
        best = max(rates, key=lambda name: rates[name])
        return MemoryRate(rates[best], best)


def _times(run: Callable[[], object], count: int) -> list[float]:
    run()
    found = []
    for _ in range(count):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return found


def projection_bytes(layout: RecordLayout, name: str) -> int:
    """Return the bytes of a record that a product with the projection ``name`` reads."""
    return sum(s.nbytes for s in layout.sections if s.name == name or s.name.startswith(f"{name}."))


def random_records(layout: RecordLayout, least_bytes: int) -> list[torch.Tensor]:
    """Make two or more records, of ``least_bytes`` at least, so that taking them in turns reads from memory.

    Each is uint8 [record_bytes]. Codes are random, scales small.
    """
    import torch

    chance = torch.Generator().manual_seed(0)
    sections = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    records = []
    for _ in range(max(2, -(-least_bytes // layout.record_bytes))):
        record = torch.randint(256, (layout.record_bytes,), dtype=torch.uint8, generator=chance)
        for s in layout.sections:
            if s.dtype in sections:
                record[s.offset : s.offset + s.nbytes].view(sections[s.dtype]).uniform_(-0.02, 0.02, generator=chance)
        records.append(record)
    return records


def activation_dtype() -> torch.dtype:
    """Return the type of activations that kernels are quickest with on this CPU."""
    import torch

    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


class KernelProbe:
    """Products with the projections of one layout, in turns over records that no cache holds."""

    def __init__(self, kernels: Kernels, layout: RecordLayout, records: Sequence[torch.Tensor]) -> None:
        self._kernels, self._layout, self._records = kernels, layout, records
        self._next = 0

    def seconds(self, name: str, rows: int, *, at_least: float) -> float:
        """Return the median seconds of a product of x [rows, K].

        Runs one product to warm up, then one or more until ``at_least`` seconds are over.
        """
        import torch

        projection = next(p for p in self._layout.projections if p.name == name)
        x = torch.full((rows, projection.columns), 0.5, dtype=activation_dtype())
        found: list[float] = []
        with torch.inference_mode():
            self._kernels.project(x, self._record(), self._layout, name)
            end = time.perf_counter() + at_least
            while not found or time.perf_counter() < end:
                record = self._record()
                began = time.perf_counter()
                self._kernels.project(x, record, self._layout, name)
                found.append(time.perf_counter() - began)
        return statistics.median(found)

    def _record(self) -> torch.Tensor:
        self._next = (self._next + 1) % len(self._records)
        return self._records[self._next]


def record_rate(probe: KernelProbe, layout: RecordLayout, rows: int, *, at_least: float) -> float:
    """Measure the bytes a second over all projections of a record."""
    names = [p.name for p in layout.projections]
    nbytes = sum(projection_bytes(layout, name) for name in names)
    return nbytes / sum(probe.seconds(name, rows, at_least=at_least / len(names)) for name in names)
