"""Measure the engine with several requests at a time, computed one after the other or together.

    python tests/measurements/serving.py DIR [--ram SIZE] [--requests 1 2 4 8] [--prompt 64] [--tokens 32] [--rounds 5]

``--requests`` gives how many requests the engine gets at once. There is no HTTP. Prompts are random tokens, all
different; decoding is greedy. The engine answers one request before it is measured. The ways take turns.

The first table has medians: tokens per second of all requests together, prompts included, and how many experts are read
per token. The second one is about decoding alone, while all requests of the engine decode: tokens per second, their
ratio to those of one request, the experts that a block needs in a step, and the share of the bound: the least seconds
of a step, divided by the measured ones. The least seconds are, for the trunk's matrices and for the experts, the larger
of bytes / rate of memory and of the time of the products with as many rows, with matrices in the processor's cache.
All rates are measured before, in this process. Reads of keys and values are not in the bound.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import transformers

import moetier
from moetier.runtime.kernels.products.matmul import matmul
from moetier.runtime.moe.experts import experts_modules
from moetier.runtime.moe.linear import quantized_linears
from moetier.tools.cli.report import table
from moetier.tools.rates.products import UNCACHED_BYTES, KernelProbe, median_seconds, memory_rate, random_records

CACHED_ROWS = 256  # of a matrix of the trunk that stays in the processor's cache
RUNS = 20


class Demands:
    """Number of experts of each demand, and when it came."""

    def __init__(self, model: Any) -> None:
        self.counts: list[tuple[float, int]] = []
        for module in experts_modules(model).values():
            module.tiered = replace(
                module.tiered, on_demand=lambda _, experts: self.counts.append((time.perf_counter(), len(experts)))
            )


def answer(engine: moetier.Engine, prompts: Sequence[list[int]], tokens: int) -> list[list[float]]:
    """Compute answers of ``tokens`` tokens to all prompts. Return the times of their tokens."""
    times: list[list[float]] = [[] for _ in prompts]
    ends = [threading.Event() for _ in prompts]
    for prompt, of_one, end in zip(prompts, times, ends, strict=True):
        request = moetier.Request(tuple(prompt), tokens, {"do_sample": False, "min_new_tokens": tokens})

        def on_token(_: object, __: object, of_one: list[float] = of_one) -> None:
            of_one.append(time.perf_counter())

        def on_end(_: object, end: threading.Event = end) -> None:
            end.set()

        engine.submit(request, on_token, on_end)
    for end in ends:
        end.wait()
    return times


def least_seconds(model: Any, requests: int, experts: float, memory: float) -> float:
    """Return the least seconds of a step of ``requests`` tokens, in which a block needs ``experts`` experts."""
    manifest, tiered = model.tiers.manifest, next(iter(experts_modules(model).values())).tiered
    layout, hidden = manifest.layout(0), model.config.get_text_config().hidden_size
    used = experts * layout.payload_bytes * len(manifest.blocks)
    rows = max(1, round(requests * manifest.blocks[0].top_k / experts))
    products = KernelProbe(tiered.kernels, layout, random_records(layout, 0)).rate(rows, at_least=0.2)
    embedding = model.get_input_embeddings().weight
    is_tied = getattr(model.get_output_embeddings(), "weight", None) is embedding
    trunk = sum(p.nbytes for p in model.parameters() if p.dim() == 2 and (p is not embedding or is_tied))
    quantised = sum(linear.record.nbytes for linear in quantized_linears(model))
    weight, x = torch.randn(CACHED_ROWS, hidden).to(model.dtype), torch.randn(requests, hidden).to(model.dtype)
    of_trunk = weight.nbytes / median_seconds(lambda: matmul(x, weight, x.dtype), least_runs=RUNS, least_seconds=0.2)
    # quantised matrices are taken to be multiplied as fast as experts are with as many rows
    of_quantised = KernelProbe(tiered.kernels, layout, random_records(layout, 0)).rate(requests, at_least=0.2)
    return used / min(memory, products) + trunk / min(memory, of_trunk) + quantised / min(memory, of_quantised)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ram", default="100%")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    most, context = max(arguments.requests), arguments.prompt + arguments.tokens
    model, _ = moetier.load(
        arguments.directory, ram=arguments.ram, daemon=None, context=context, sequences=most + 1, speculate="off"
    )
    torch.manual_seed(0)
    whole: dict[tuple[int, str], list[tuple[float, float]]] = {}  # tokens/s, experts read a token
    decoding: dict[int, list[tuple[float, float]]] = {}  # seconds of a step, experts of a block
    with model.tiers:
        memory, demands = memory_rate(UNCACHED_BYTES)[0], Demands(model)
        for _ in range(arguments.rounds):
            for way, together in (("one by one", 1), ("together", most)):
                for requests in arguments.requests:
                    prompts = torch.randint(10, model.config.vocab_size - 10, (requests + 1, arguments.prompt)).tolist()
                    with moetier.Engine.of(model, max_sequences=together) as engine:  # another one has no prompts
                        answer(engine, prompts[-1:], arguments.tokens)
                        before, begin = model.tiers.stats()[0].misses, time.perf_counter()
                        times = answer(engine, prompts[:requests], arguments.tokens)
                        seconds = time.perf_counter() - begin
                    tokens = sum(map(len, times))
                    misses = (model.tiers.stats()[0].misses - before) / tokens
                    whole.setdefault((requests, way), []).append((tokens / seconds, misses))
                    if way == "together":
                        first, last = max(of_one[0] for of_one in times), min(of_one[-1] for of_one in times)
                        steps = sum(first < at <= last for of_one in times for at in of_one) / requests
                        counts = [count for at, count in demands.counts if first < at <= last]
                        # steps that were computed by turns demand experts token by token
                        counts = [count for count in counts if count > model.tiers.manifest.blocks[0].top_k] or counts
                        decoding.setdefault(requests, []).append(((last - first) / steps, fmean(counts)))
        lines = [["requests at once", "tokens/s", "experts read a token"]]
        for (requests, way), results in whole.items():
            rate, misses = map(median, zip(*results, strict=True))
            lines.append([f"{requests} {way}", f"{rate:.1f}", f"{misses:.1f}"])
        print(table(lines))
        lines = [["decoding at once", "tokens/s", "of one request", "experts of a block", "share of the bound"]]
        one = median(seconds for seconds, _ in decoding[min(decoding)]) / min(decoding)
        for requests, results in decoding.items():
            seconds, experts = map(median, zip(*results, strict=True))
            share = least_seconds(model, requests, experts, memory) / seconds
            rate = requests / seconds
            lines.append([f"{requests}", f"{rate:.1f}", f"{rate * one:.2f}", f"{experts:.1f}", f"{share:.2f}"])
    print(f"memory is read at {memory / 1e9:.1f} GB/s, {torch.get_num_threads()} threads\n{table(lines)}")


if __name__ == "__main__":
    main()
