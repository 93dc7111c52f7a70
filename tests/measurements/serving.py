"""Measure the engine with several requests at a time, computed one after the other or together.

    python tests/measurements/serving.py DIR [--ram SIZE] [--requests 1 2 4 8] [--prompt 64] [--tokens 32]

``--requests`` gives how many requests the engine gets at once. There is no HTTP. Prints the tokens per second of all
requests together, and how many experts are read per token. Prompts are random tokens, all different; decoding is
greedy. The engine answers one request before it is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

import torch
import transformers

import moetier
from moetier.tools.cli.report import table


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
    model, _ = moetier.load(
        arguments.directory, ram=arguments.ram, daemon=None, context=context, sequences=most + 1, speculate="off"
    )
    torch.manual_seed(0)
    prompts = torch.randint(10, model.config.vocab_size - 10, (most + 1, arguments.prompt)).tolist()

    async def answer(engine: moetier.Engine, prompt: list[int]) -> int:
        """How many tokens came."""
        request = moetier.Request(tuple(prompt), arguments.tokens, {"do_sample": False})
        return len([token async for token in engine.stream_async(request)])

    async def answers(engine: moetier.Engine, prompts: list[list[int]]) -> int:
        return sum(await asyncio.gather(*(answer(engine, prompt) for prompt in prompts)))

    lines = [["requests at once", "tokens/s", "experts read a token"]]
    with model.tiers:
        for way, together in (("one by one", 1), ("together", most)):
            for requests in arguments.requests:
                with moetier.Engine.of(
                    model, max_sequences=together
                ) as engine:  # another one has none of these prompts
                    asyncio.run(answers(engine, prompts[-1:]))
                    before, start = model.tiers.stats()[0].misses, time.perf_counter()
                    tokens = asyncio.run(answers(engine, prompts[:requests]))
                    seconds, misses = time.perf_counter() - start, model.tiers.stats()[0].misses - before
                lines.append([f"{requests} {way}", f"{tokens / seconds:.1f}", f"{misses / tokens:.1f}"])
    print(table(lines))


if __name__ == "__main__":
    main()
