"""Measure how a prefill slows down the decoding that follows it, for each policy.

    python tests/measurements/prefill.py DIR --ram 50% --text FILE --rounds 20

Loads the model once for each policy. In each round, each model decodes ``--tokens`` tokens of a text, then gets another
prompt of ``--prompt`` tokens, all together, and then decodes ``--tokens`` more tokens of the text. Prints the times of
the prefill and of a decode step after it, as medians (quartiles), and the mean hit ratios before and after it. With
``--disk``, reads take as long as on a disk of so many GB/s.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from speculation import slow_down, tokens_of

import moetier
from moetier.runtime.config import Size
from moetier.runtime.generation.compat import CACHE
from moetier.tiers.cache.policies import POLICIES
from moetier.tiers.store.folder import read_manifest, store_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ram", default="50%", help="a share is of all experts (default: %(default)s)")
    parser.add_argument("--disk", type=float, default=0.0, metavar="GB/S", help="0: as fast as it is (default)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--prompt", type=int, default=512, help="tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="decoded before and after (default: %(default)s)")
    parser.add_argument("--text", type=Path, help="whose tokens are fed; random ones without it")
    arguments = parser.parse_args()
    ram = Size.parse(arguments.ram).of(read_manifest(store_folder(arguments.directory)).stored_bytes)
    if arguments.disk:
        slow_down(arguments.disk * 1e9)
    models = {
        name: moetier.load(arguments.directory, ram=ram, daemon=None, policy=name, speculate="off") for name in POLICIES
    }
    results: dict[str, list[list[float]]] = {name: [[] for _ in range(4)] for name in models}
    part = 2 * arguments.tokens + arguments.prompt + 1
    count = argparse.Namespace(rounds=arguments.rounds, tokens=part, text=arguments.text)
    ids = tokens_of(count, *next(iter(models.values())))
    for number in range(-1, arguments.rounds):  # one that is not counted
        piece = ids[(number + 1) * part : (number + 2) * part]
        for name in [*models] if number % 2 else [*models][::-1]:
            measured = one_round(models[name][0], piece, arguments.tokens)
            if number >= 0:
                for row, value in zip(results[name], measured, strict=True):
                    row.append(value)
    for name, (prefill, step, before, after) in results.items():
        print(
            f"{name:<5} prefill of {arguments.prompt} tokens {_spread(prefill, 1e3)} ms, "
            f"a decode step afterwards {_spread(step, 1e3)} ms; "
            f"hits before {statistics.fmean(before):.1%}, afterwards {statistics.fmean(after):.1%}",
            flush=True,
        )


@torch.no_grad()
def one_round(model: Any, ids: list[int], tokens: int) -> tuple[float, float, float, float]:
    """Seconds of the prefill and of a step afterwards; hit ratios of the steps before and afterwards."""
    text, prompt = ids[: 2 * tokens + 1], ids[2 * tokens + 1 :]
    output, before, _ = decode(model, None, text[: tokens + 1])
    began = time.perf_counter()
    model(torch.tensor([prompt]), use_cache=False)
    prefill = time.perf_counter() - began
    _, after, step = decode(model, output, text[tokens + 1 :])
    return prefill, step, before, after


def decode(model: Any, output: Any, ids: list[int]) -> tuple[Any, float, float]:
    """The last output, the hit ratio, and the seconds of a step."""
    counted, began = model.tiers.host.stats(), time.perf_counter()
    for token in ids:
        output = model(torch.tensor([[token]]), **{CACHE: output and output.past_key_values}, use_cache=True)
    seconds, now = time.perf_counter() - began, model.tiers.host.stats()
    hits, misses = now.hits - counted.hits, now.misses - counted.misses
    return output, hits / (hits + misses), seconds / len(ids)


def _spread(values: list[float], unit: float) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{unit * middle:.2f} ({unit * low:.2f} to {unit * high:.2f})"


if __name__ == "__main__":
    sys.exit(main())
