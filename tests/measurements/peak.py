"""Compare the products of an expert's rows with the processor's own peak of int8 products.

    python tests/measurements/peak.py

The peak is the rate of a loop over registers of the instruction that multiplies codes with rounded activations. An
expert gets as many rows as a chunk of a prompt sends it. The loop and the expert's tasks take turns, many times and
briefly. With one thread, the times are of the CPU, so that other processes matter little. With several, they are of a
clock, as the threads wait for each other: then the machine must be idle. Prints medians: the billions of products per
second in the loop, the share of them that the expert's products reach, alone and with all other tasks of the expert,
and each task's share of the time.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from array import array
from collections.abc import Sequence
from unittest.mock import patch

import torch
from llvmlite import ir

from moetier.runtime.kernels.experts import expert_kernels, expert_products
from moetier.runtime.kernels.experts.expert_code import Activation
from moetier.runtime.kernels.experts.expert_kernels import ExpertKernels
from moetier.runtime.kernels.jit.emitter import I8, I32, LANES, POINTER, Emitter, new_module, vector
from moetier.runtime.kernels.jit.processor import Processor, this_processor
from moetier.runtime.kernels.jit.team import Kernel, KernelTask, compile_kernel, run_all
from moetier.runtime.kernels.products.gemm_avx2 import is_narrow
from moetier.runtime.kernels.products.gemm_tile import dot
from moetier.tiers.quant.codec import layout_for
from moetier.tools.cli.report import table
from moetier.tools.rates.products import random_records

PEAK = "moetier_peak"
SUMS = 16  # independent sums in registers, for an instruction of some cycles
STEPS, ITEMS = 1000, 200  # of the loop: steps of an item, and items of a thread
PAUSE = 0.005  # seconds between rounds, in which other processes run
EXPERTS = {"qwen3": (2048, 768), "mixtral": (4096, 3584)}  # hidden and inner numbers; a quarter of mixtral's inner
TASKS = ("rounding", "gate, up", "activation", "down", "placing", "sum")  # of an expert's rows, in order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--experts", nargs="+", choices=EXPERTS, default=[*EXPERTS])
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    processor = this_processor()
    print(f"machine  {platform.machine()}, {processor.dot.value}; torch {torch.__version__}")
    peak = compile_kernel(processor, peak_module(processor), PEAK)
    lines = [["rows", "peak, G/s", "share of products", "with all tasks", *(f"{task}, %" for task in TASKS)]]
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for name in arguments.experts:
            expert = Expert(*EXPERTS[name])
            lines += (
                [f"{name}, {rows}, threads: {threads}", *measured(peak, expert, rows, arguments.rounds)]
                for rows in arguments.rows
            )
    print(table(lines))


def measured(peak: Kernel, expert: Expert, rows: int, rounds: int) -> list[str]:
    rates, products, all_tasks, shares = list[float](), list[float](), list[float](), list[list[float]]()
    x, outputs = (torch.randn(rows, expert.hidden).bfloat16() for _ in range(2))
    for _ in range(rounds):
        rate = peak_rate(peak)
        seconds = expert.seconds(x, outputs)
        rate = (rate + peak_rate(peak)) / 2
        count = rows * expert.weights
        rates.append(rate / 1e9)
        products.append(count / (seconds[1] + seconds[3]) / rate)
        all_tasks.append(count / sum(seconds) / rate)
        shares.append([100 * part / sum(seconds) for part in seconds])
        time.sleep(PAUSE)
    medians = [f"{statistics.median(part):.1f}" for part in zip(*shares, strict=True)]
    reached = [f"{statistics.median(part):.2f}" for part in (products, all_tasks)]
    return [f"{statistics.median(rates):.0f}", *reached, *medians]


def peak_rate(peak: Kernel) -> float:
    """Return the products per second in the loop over registers."""
    numbers = torch.ones(64 * SUMS, dtype=torch.int8)
    threads = torch.get_num_threads()
    items = ITEMS * threads
    seconds = seconds_of(KernelTask(peak, array("q", (0, items, numbers.data_ptr(), STEPS)), threads))
    return items * STEPS * SUMS * 4 * lanes_of(this_processor()) / seconds


def seconds_of(task: KernelTask) -> float:
    clock = time.perf_counter if torch.get_num_threads() > 1 else time.thread_time
    began = clock()
    run_all([task])
    return clock() - began


def lanes_of(processor: Processor) -> int:
    """Return the number of sums in a register."""
    return LANES // 2 if is_narrow(processor) else LANES


def peak_module(processor: Processor) -> ir.Module:
    """Emit the loop: the context is the items taken, all items, a pointer to numbers, and the steps of an item."""
    emit = Emitter(new_module(), PEAK, [POINTER])
    at, n = emit.at, emit.number
    begun, (items, numbers, steps) = emit.fields(4)
    numbers = at.inttoptr(numbers, POINTER)
    lanes = lanes_of(processor)
    sums = [at.alloca(vector(I32, lanes)) for _ in range(SUMS)]
    with emit.items(begun, items):
        q, x = (emit.load(numbers, n(64 * i), vector(I8, 4 * lanes)) for i in range(2))
        for place in sums:
            at.store(emit.all(I32, 0, lanes), place)
        with emit.loop(n(0), steps):
            for place in sums:
                at.store(dot(emit, processor, at.load(place), q, x), place)
        for i, place in enumerate(sums):
            emit.store(at.load(place), numbers, n(64 * i))
    return emit.finish()


class Expert:
    """An expert with random weights of 4 bits in groups of 64."""

    def __init__(self, hidden: int, inner: int) -> None:
        shapes = {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
        layout = layout_for({name: (shape, "bfloat16") for name, shape in shapes.items()}, bits=4)
        self.weights = 3 * hidden * inner
        self.hidden = hidden
        self._records = random_records(layout, 0)
        self._kernels = ExpertKernels(layout, Activation(), torch.bfloat16, 1)
        self._runs = 0

    def seconds(self, x: torch.Tensor, outputs: torch.Tensor) -> list[float]:
        """Return the seconds that each of TASKS takes for x [rows, hidden], whose results are written to ``outputs``.

        Threads of torch, which would be busy for a while after an operation, have none here.
        """
        spent: list[float] = []

        def run_one_by_one(tasks: Sequence[KernelTask]) -> None:
            spent.extend(seconds_of(task) for task in tasks)

        self._runs += 1
        record = self._records[self._runs % len(self._records)]
        seconds = [0.0] * len(TASKS)
        with (
            patch.object(expert_products, "run_all", run_one_by_one),
            patch.object(expert_kernels, "run_all", run_one_by_one),
        ):
            for first in range(0, len(x), expert_products.BATCH_OUTPUTS):
                part = x[first : first + expert_products.BATCH_OUTPUTS]
                jobs = array("q", (record.data_ptr(), 0, len(part)))
                self._kernels.compute(part, jobs, array("q", range(first, first + len(part))), outputs)
                seconds = [a + b for a, b in zip(seconds, [*spent, 0.0], strict=True)]
                spent.clear()
        with patch.object(expert_kernels, "run_all", run_one_by_one):
            rows, bounds = torch.arange(len(x)), torch.arange(len(x) + 1)
            self._kernels.add_up(outputs, torch.ones(len(x)), rows, bounds, torch.empty_like(outputs))
        seconds[-1] = spent[0]
        return seconds


if __name__ == "__main__":
    main()
