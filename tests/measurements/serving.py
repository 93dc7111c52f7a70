"""Measure the engines of `moetier serve`, which answer requests one by one, or together as with --parallel.

    python tests/measurements/serving.py DIR [--ram SIZE] [--requests 1 2 4 8] [--prompt 64] [--tokens 32]

``--requests`` gives how many requests an engine gets at once. There is no HTTP. Prints the tokens per second of all
requests together, and how many experts are read per token. Prompts are random tokens, all different; decoding is
greedy. Each engine answers one request before it is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

import torch
import transformers

import moetier
from moetier.runtime.config import COMMAND_OPTIONS
from moetier.tools.cli.report import table
from moetier.tools.serve.batched import Together
from moetier.tools.serve.engine import Engine, Job
from moetier.tools.serve.sequential import OneByOne


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ram", default="100%")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    most, context = max(arguments.requests), arguments.prompt + arguments.tokens
    model, tokenizer = moetier.load(
        arguments.directory, ram=arguments.ram, daemon=None, context=most * context, speculate="off"
    )
    torch.manual_seed(0)
    prompts = torch.randint(10, model.config.vocab_size - 10, (most + 1, arguments.prompt)).tolist()

    async def answers(engine: Engine, prompts: list[list[int]]) -> int:
        """How many tokens came."""
        given = [engine.submit(Job(ids, arguments.tokens, {"temperature": 0})) for ids in prompts]
        for answer in given:
            async for _ in answer.pieces():
                pass
        return sum(answer.new_tokens for answer in given)

    lines = [["requests at once", "tokens/s", "experts read a token"]]
    with model.tiers:
        for way in ("one by one", "together"):
            parts = model, tokenizer, context, COMMAND_OPTIONS["prefill_chunk"].default
            engine = OneByOne(*parts) if way == "one by one" else Together(*parts, most)
            with engine.running():
                asyncio.run(answers(engine, prompts[-1:]))
                for requests in arguments.requests:
                    before, start = model.tiers.stats()[0].misses, time.perf_counter()
                    tokens = asyncio.run(answers(engine, prompts[:requests]))
                    seconds, misses = time.perf_counter() - start, model.tiers.stats()[0].misses - before
                    lines.append([f"{requests} {way}", f"{tokens / seconds:.1f}", f"{misses / tokens:.1f}"])
    print(table(lines))


if __name__ == "__main__":
    main()
