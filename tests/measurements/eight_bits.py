"""Measure decoding behind a long prompt with keys and values in 8 bits and in 16.

    python tests/measurements/eight_bits.py DIR [--tokens N] [--rounds N] [--folder FOLDER]

DIR is a model directory. Both models are loaded in one process, with all experts in memory unless ``--ram`` says
otherwise, and each computes a prompt of N tokens. In each round both decode 32 tokens behind it, by turns. With
``--folder``, the prompts' keys and values are kept there, so that another run begins at once.
"""

from __future__ import annotations

import argparse
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import torch

import moetier
from moetier import Engine, Request
from moetier.runtime.engine.page_folder import PageOptions

ANSWER = 32  # tokens


def rate(engine: Engine, ids: tuple[int, ...]) -> float:
    """Return the tokens per second behind the first token of an answer."""
    answer = iter(engine.stream(Request(ids, ANSWER, {"min_new_tokens": ANSWER, "do_sample": False})))
    next(answer)
    begin = time.perf_counter()
    return len([*answer]) / (time.perf_counter() - begin)


def main() -> None:
    """Parse the arguments, and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--ram")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    ids = tuple(torch.randint(5, 1000, (arguments.tokens,), generator=torch.Generator().manual_seed(0)).tolist())
    disk = None if arguments.folder is None else PageOptions(arguments.folder, 1 << 40, 7 * 86_400.0)
    engines, rates = dict[int, Engine](), dict[int, list[float]]({8: [], 16: []})
    with ExitStack() as closing:
        for bits in rates:
            options = {"kv_bits": bits, "context": arguments.tokens + 2 * ANSWER, "ram": arguments.ram}
            model, _ = moetier.load(arguments.directory, daemon=None, **options)
            closing.enter_context(model.tiers)
            engine = engines[bits] = closing.enter_context(Engine.of(model, disk=disk))
            begin = time.perf_counter()
            rate(engine, ids)
            print(
                f"{bits} bits: {model.tiers.kv.page_bytes:,} bytes a page, prompt {time.perf_counter() - begin:.1f} s"
            )
            while engine.saved is not None and engine.saved.is_writing:
                time.sleep(0.1)
        for number in range(arguments.rounds):
            for bits in (8, 16) if number % 2 else (16, 8):
                rates[bits].append(rate(engines[bits], ids))
    shares = [one / two for one, two in zip(rates[8], rates[16], strict=True)]
    sixteen, eight = (median(rates[bits]) for bits in (16, 8))
    print(f"behind {arguments.tokens:,} tokens: {sixteen:.2f} tokens/s with 16 bits, {eight:.2f} with 8")
    print(f"  8 bits are {median(shares):.3f} times as fast ({min(shares):.3f} to {max(shares):.3f})")


if __name__ == "__main__":
    main()
