"""Compare moetier's attention with torch's: of one token at several context lengths, and of whole prompts.

    python tests/measurements/attention.py

There are 32 heads of queries and 8 heads of keys and values, of 128 numbers each, in bf16, as in a layer of
Mixtral-8x7B. So many keys and values are used in turn that they are read from memory, not from a cache. The two
implementations take turns. Prints the microseconds of a layer, as medians (least to most), and the rate at which
moetier reads keys and values. Prompts have 4 heads of keys and values, as in Qwen3-30B-A3B; their rates are of the
multiplications and additions that causal attention needs, and the ratio is the median of the rounds' (least to most).
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from moetier.runtime.kernels.layer.attend import attend
from moetier.runtime.kernels.layer.attention import causal_attention
from moetier.tools.bench.output import Spread, alternate
from moetier.tools.cli.report import table

HEADS, KEY_HEADS, WIDTH = 32, 8, 128
KEY_HEADS_OF_PROMPTS = 4
UNCACHED = 256 << 20  # bytes
MIN_SECONDS = 0.3  # of a round

Pair = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 512, 4096, 32768])
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2000, 8000])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"machine  {platform.machine()}, {torch.get_num_threads()} threads; torch {torch.__version__}")
    one_token(arguments.lengths, arguments.rounds)
    prompts(arguments.prompts, arguments.rounds)


def one_token(lengths: list[int], rounds: int) -> None:
    lines = [["context", "moetier, us", "torch, us", "times as fast", "GB/s"]]
    for length in lengths:
        contexts = cycle(pairs(length))
        query = torch.randn(1, HEADS, 1, WIDTH).bfloat16()
        module = nn.Module()

        def own_way(contexts: Iterator[Pair] = contexts, query: Tensor = query, module: nn.Module = module) -> None:
            causal_attention(module, query, *next(contexts), None)

        def torchs_way(contexts: Iterator[Pair] = contexts, query: Tensor = query) -> None:
            scaled_dot_product_attention(query, *next(contexts), enable_gqa=True)

        ways = {"moetier": partial(microseconds, own_way), "torch": partial(microseconds, torchs_way)}
        with torch.inference_mode():
            spreads = {name: Spread.of(times) for name, times in alternate(rounds, ways).items()}
        own, torchs = spreads["moetier"], spreads["torch"]
        read = 2 * KEY_HEADS * length * WIDTH * 2
        rate = read / own.median / 1e3
        lines.append([str(length), own.text(), torchs.text(), f"{torchs.median / own.median:.1f}", f"{rate:.1f}"])
    print(table(lines))


def prompts(lengths: list[int], rounds: int) -> None:
    lines = [["prompt", "moetier, GFLOP/s", "torch, GFLOP/s", "times as fast"]]
    for length in lengths:
        query = torch.randn(1, HEADS, length, WIDTH).bfloat16()
        key, value = (torch.randn(1, KEY_HEADS_OF_PROMPTS, length, WIDTH).bfloat16() for _ in range(2))
        ways = {
            "moetier": partial(microseconds, partial(attend, query, key, value)),
            "torch": partial(
                microseconds,
                partial(scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True),
            ),
        }
        with torch.inference_mode():
            times = alternate(rounds, ways)
        work = 2 * 2 * HEADS * WIDTH * length * (length + 1) / 2
        rates = [f"{work / Spread.of(times[name]).median / 1e3:.0f}" for name in ways]
        ratio = Spread.of([other / own for own, other in zip(times["moetier"], times["torch"], strict=True)])
        lines.append([str(length), *rates, f"{ratio.median:.2f} ({ratio.min:.2f} to {ratio.max:.2f})"])
    print(table(lines))


def pairs(length: int) -> list[Pair]:
    """Keys and values [1, KEY_HEADS, length, WIDTH]."""
    nbytes = 2 * KEY_HEADS * length * WIDTH * 2
    shape = (1, KEY_HEADS, length, WIDTH)
    return [(torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()) for _ in range(max(2, UNCACHED // nbytes))]


def microseconds(call: Callable[[], object]) -> float:
    call()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < MIN_SECONDS:
        call()
        count += 1
    return (time.perf_counter() - began) / count * 1e6


if __name__ == "__main__":
    main()
