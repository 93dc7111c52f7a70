"""Measure decoding behind a long prompt with keys and values in 8 bits and in 16.

    python tests/measurements/eight_bits.py DIR [--tokens N] [--rounds N] [--threads N]

DIR is a model directory, whose layers all have keys and values, and whose experts fit into memory twice. The prompt is
not computed: its keys and values are random numbers. In each round both models decode 8 tokens behind it, by turns.
With one thread (the default), the seconds of the processor say how long that takes on a busy machine, too.
"""

from __future__ import annotations

import argparse
import time
import warnings
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch

import moetier
from moetier.runtime.engine.packed_runner import PackedRunner
from moetier.runtime.engine.runner import Task
from moetier.runtime.engine.sequence import Request, TokenSequence
from moetier.runtime.kernels.layer.paged_cache import PAGE_TOKENS

ANSWER = 8  # tokens


def filled(model: Any, tokens: int, bits: int) -> tuple[PackedRunner, list[int]]:
    """Return a runner whose pages hold random keys and values of ``tokens`` tokens, and the numbers of the pages."""
    config, random = model.config.get_text_config(decoder=True), torch.Generator().manual_seed(1)
    pages = [*range(-(-(tokens + ANSWER) // PAGE_TOKENS))]
    runner = PackedRunner(model, len(pages), later_chunk=PAGE_TOKENS, bits=bits)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        numbers = torch.randn(2, 1, config.num_key_value_heads, tokens, width, generator=random).to(model.dtype)
        runner.memory.write(layer, pages, 0, *numbers)
    return runner, pages


def seconds(runner: PackedRunner, pages: list[int], ids: tuple[int, ...]) -> tuple[float, float]:
    """Return the seconds that a token takes, and those of the processor."""
    sequence, walls, works = TokenSequence(Request(ids, ANSWER)), list[float](), list[float]()
    runner.begin(sequence)
    sequence.computed = len(ids) - 1
    for _ in range(ANSWER):
        wall, work = time.perf_counter(), time.process_time()
        (logits,) = runner.run([Task(sequence, sequence.computed, 1, pages)], lambda: False)
        walls.append(time.perf_counter() - wall)
        works.append(time.process_time() - work)
        assert logits is not None
        sequence.ids.append(int(logits.argmax()))
        sequence.computed += 1
    runner.end(sequence)
    return median(walls), median(works)


def main() -> None:
    """Parse the arguments, and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    ids = tuple(torch.randint(5, 1000, (arguments.tokens + 1,), generator=torch.Generator().manual_seed(0)).tolist())
    taken: dict[int, list[tuple[float, float]]] = {8: [], 16: []}
    with ExitStack() as closing:
        models = {}
        for bits in taken:
            options = {"kv_bits": bits, "context": arguments.tokens + ANSWER, "ram": "100%"}
            model, _ = moetier.load(arguments.directory, daemon=None, threads=arguments.threads, **options)
            closing.enter_context(model.tiers)
            models[bits] = filled(model, arguments.tokens, bits)
            seconds(*models[bits], ids)  # compiles
            print(f"{bits} bits: {model.tiers.kv.page_bytes:,} bytes a page", flush=True)
        for number in range(arguments.rounds):
            for bits in (8, 16) if number % 2 else (16, 8):
                taken[bits].append(seconds(*models[bits], ids))
    for at, what in enumerate(("", " of the processor")):
        eight, sixteen = ([pair[at] for pair in taken[bits]] for bits in (8, 16))
        shares = sorted(two / one for one, two in zip(eight, sixteen, strict=True))
        text = f"{1e3 * median(sixteen):.1f} with 16 bits, {1e3 * median(eight):.1f} with 8"
        print(f"ms{what} a token behind {arguments.tokens:,}: {text}")
        print(f"  {median(shares):.3f} times the rate ({shares[0]:.3f} to {shares[-1]:.3f})")


if __name__ == "__main__":
    main()
