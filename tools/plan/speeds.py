"""Rates of this machine, measured in a few seconds, from which a plan's estimates are computed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moetier.runtime.formats.tensors import StoredTensor
from moetier.tiers.layout import ROW_TILE, Bits, RecordLayout
from moetier.tiers.source import LOADERS
from moetier.tiers.store.checksum import READ_PIECE_BYTES
from moetier.tiers.store.folder import GROUP, is_cache
from moetier.tools.convert.model_files import free_bytes
from moetier.tools.rates.hardware import CpuTimes
from moetier.tools.rates.products import (
    TIMES,
    UNCACHED_BYTES,
    KernelProbe,
    activation_dtype,
    median_seconds,
    memory_rate,
    random_records,
)
from moetier.tools.rates.reads import DISK_SECONDS, GB, RandomReads

from .choices import Choice, ModelChoices
from .fit import MachineResources

MIN_FILE_BYTES = 64 << 20  # of an existing file that is read; in a smaller one, reads would repeat too often
FILE_BYTES = 256 << 20  # of the temporary file that is read if there is no other; less for a smaller model
MIN_TEMPORARY_BYTES = 16 << 20  # least size of that temporary file
KERNEL_SECONDS = 0.25
ROWS = 32  # of a product with many rows
PROBED_WEIGHTS = 1 << 22  # most weights of a measured matrix: a whole expert may take seconds
QUANTISED_WEIGHTS = 1 << 19
DEVIATION = 0.03  # standard deviation of the quantised weights, as in models: HQQ takes longer with unusual weights
OPERATIONS = 2000  # of torch, timed together


@dataclass(frozen=True, slots=True)
class DiskRate:
    """Bytes a second of random reads: with one read in flight, and with as many as there are loaders."""

    one: float
    all: float
    loaders: int

    def at(self, reads: float) -> float:
        """Return the interpolated rate with ``reads`` in flight."""
        share = (min(max(reads, 1.0), self.loaders) - 1) / max(self.loaders - 1, 1)
        return self.one + (self.all - self.one) * share


@dataclass(frozen=True, slots=True)
class MachineRates:
    """Rates of this machine."""

    disk: DiskRate
    memory: float  # bytes a second
    one_row: Mapping[Bits, float]  # bytes a second of records, by bits: products of one row, as in decoding
    many_rows: Mapping[Bits, float]  # bytes times rows a second: products of many rows, as in a prompt
    plain: float  # bytes a second of matrices of 16 bits outside records, with one row
    operation: float  # seconds of an operation of torch on a few numbers

    def seconds(self, nbytes: float, bits: Bits, rows: float) -> float:
        """Return the seconds for a product of ``rows`` tokens with ``nbytes`` of weights of ``bits`` bits."""
        return max(nbytes / self.one_row[bits], nbytes * rows / self.many_rows[bits])

    @classmethod
    def measure(cls, disk: DiskRate, choices: Sequence[Choice], resources: MachineResources) -> MachineRates:
        """Measure all rates on the CPU except that of the disk, which is given.

        Products use matrices of the experts' shapes, with all numbers of bits of the experts and trunks in ``choices``.
        """
        import torch

        from moetier.runtime.devices.cpu import Cpu

        nbytes = min(UNCACHED_BYTES, resources.host.bytes // 4)  # more than caches hold, where memory allows
        memory, _ = memory_rate(nbytes)
        expert = next(iter(choices[0].manifest.layouts.values()))
        kernels = Cpu().kernels()
        one: dict[Bits, float] = {}
        many: dict[Bits, float] = {}
        for bits in sorted({16, *(width for choice in choices for width in (choice.bits, choice.trunk_bits))}):
            layout = _probed_layout(expert, bits)
            probe = KernelProbe(kernels, layout, random_records(layout, nbytes))
            one[bits] = probe.rate(1, at_least=KERNEL_SECONDS)
            many[bits] = ROWS * probe.rate(ROWS, at_least=KERNEL_SECONDS)
        numbers = torch.ones(64)
        with torch.inference_mode():
            operations = median_seconds(lambda: [numbers.add(numbers) for _ in range(OPERATIONS)])
        return cls(disk, memory, one, many, _plain_rate(memory, nbytes), operations / OPERATIONS)


@dataclass(frozen=True)
class Speeds:
    """All measured speeds of this machine; ``rates`` is None on a GPU, where no speed is estimated."""

    disk: DiskRate
    disk_by: str  # a text that says how the disk was measured
    rates: MachineRates | None
    quantising: Mapping[Bits, float]  # weights a second of one worker, by bits
    workers: int  # of a conversion
    others: float = 0.0  # CPUs that other processes used meanwhile

    @classmethod
    def measure(
        cls,
        model_choices: ModelChoices,
        choices: Sequence[Choice],
        resources: MachineResources,
        disk: float | None,
        workers: int,
    ) -> Speeds:
        """Measure all speeds, for a few seconds. ``disk``: the disk's rate in GB/s; None to measure it."""
        times = CpuTimes.read()
        if disk is None:
            rate, by = _disk_rate(model_choices, choices, resources)
        else:
            rate, by = DiskRate(disk * GB, disk * GB, LOADERS), "given"
        rates = MachineRates.measure(rate, choices, resources) if not resources.device.has_memory else None
        measured_choices = choices if model_choices.headers is not None else ()
        widths = {bits for choice in measured_choices for bits in (choice.bits, choice.trunk_bits)} - {16}
        quantising = quantising_rates(sorted(widths))
        return cls(rate, by, rates, quantising, workers, times.used_by_others())


def _disk_rate(
    model_choices: ModelChoices, choices: Sequence[Choice], resources: MachineResources
) -> tuple[DiskRate, str]:
    """Measure the disk. Return its rate, and a text that says how it was measured.

    It reads records of a model directory. For a checkpoint, it reads the checkpoint's files if they are on the disk of
    ``resources.into``, or else a temporary file.
    """
    block = min(max(layout.slot_bytes for layout in choices[0].manifest.layouts.values()), READ_PIECE_BYTES)
    with ExitStack() as closing:
        folder, headers = Path(model_choices.source), model_choices.headers
        if headers is None and not is_cache(folder / GROUP):
            reads, what = RandomReads.of_records(folder), "its records"
        elif headers is not None and (files := _files_on(resources.into, headers.checkpoint.tensors.values())):
            reads, what = RandomReads.of_files(files, block), "the checkpoint's files"
        else:
            size = probe_bytes(max(choice.disk_bytes for choice in choices), free_bytes(resources.into))
            what = "a temporary file"
            reads = closing.enter_context(RandomReads.of_new_file(resources.into, size, block))
        # during the first half, one read is in flight
        one, several = (reads.rate(depth, DISK_SECONDS / 2) for depth in (1, LOADERS))
        return DiskRate(one, several, LOADERS), f"{reads.by}, on {what}"


def _files_on(folder: Path, tensors: Collection[StoredTensor]) -> list[Path]:
    """Return the files of ``tensors`` that are on the disk of ``folder``, and large enough for random reads."""
    present = [file for file in sorted({tensor.file for tensor in tensors}) if file.is_file()]
    device = folder.stat().st_dev
    return [f for f in present if f.stat().st_dev == device and f.stat().st_size >= MIN_FILE_BYTES]


def probe_bytes(model_bytes: int, free: int) -> int:
    """Return the size of the temporary file to measure a disk with, for a model of ``model_bytes``.

    The file takes at most half of the ``free`` bytes.
    """
    return min(FILE_BYTES, max(MIN_TEMPORARY_BYTES, model_bytes), free // 2)


def _probed_layout(layout: RecordLayout, bits: Bits) -> RecordLayout:
    """Return a layout of ``bits`` with the projections of ``layout``, each cut to about PROBED_WEIGHTS weights."""
    from moetier.tiers.quant.codec import layout_for

    shapes = {}
    for p in layout.projections:
        rows = min(p.rows, max(ROW_TILE, PROBED_WEIGHTS // p.columns))
        shapes[p.name] = ((rows, p.columns), "bfloat16")
    return layout_for(shapes, bits=bits)


def _plain_rate(memory: float, nbytes: int) -> float:
    """Measure the bytes a second of a product of one row with a bf16 matrix of about ``nbytes``.

    If activations are in fp32 on this CPU, return ``memory``, the rate of memory, instead.
    """
    import torch

    from moetier.runtime.kernels.products.row import RowWeight

    dtype = activation_dtype()
    if dtype != torch.bfloat16:
        return memory
    weight = RowWeight(torch.full((max(1, nbytes // 8192), 4096), 0.01, dtype=dtype), requires_grad=False)
    x = torch.ones((1, 4096), dtype=dtype)
    with torch.inference_mode():
        return weight.nbytes / median_seconds(partial(torch.nn.functional.linear, x, weight), least_runs=TIMES)


def quantising_rates(widths: Collection[Bits]) -> dict[Bits, float]:
    """Measure how many weights a second one worker quantises, for each number of bits in ``widths``, all below 16."""
    import numpy as np
    import torch

    from moetier.runtime.kernels.quantise.encode import encode
    from moetier.tiers.quant.codec import layout_for
    from moetier.tools.convert.encoder import one_thread_each

    quantising = {}
    shape = (QUANTISED_WEIGHTS // 1024, 1024)
    weights = {"weight": DEVIATION * torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()}
    with one_thread_each():
        torch.set_num_threads(1)
        for bits in widths:
            layout = layout_for({"weight": (shape, "bfloat16")}, bits=bits)
            record = np.empty(layout.record_bytes, np.uint8)
            quantising[bits] = QUANTISED_WEIGHTS / median_seconds(
                partial(encode, weights, layout, record), least_runs=TIMES
            )
    return quantising
